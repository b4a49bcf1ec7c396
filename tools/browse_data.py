#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw the images of a training batch as the model gets them: augmented, mixed, masked, with label maps or boxes.

    python tools/browse_data.py -cfg configs/deit_small_patch16_224.yaml -data_path /dataset/imagenet -output batch.png
    python tools/browse_data.py -cfg configs/mae_digits.yaml -output masks.png -epoch 3 -batch 5 -images 24

Each picture shows the pixels after augmentation, random erasing and mixing. They are those of a training in one process with
the same SEED: every random number is a function of SEED, epoch and batch. docs/visualize.md explains the pictures.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse
import contextlib
import math

import numpy as np
from yacs.config import CfgNode

from config import config_file_of, get_config, update_config
from datasets import Batch, Images
from datasets.batch import to_device
from engine import distributed
from engine.run import build_loader
from engine.train import step_draws
from tasks import Task, build_task
from tasks.pictures import contact_sheet
from tools._output import add_output_file
from utils.cli import run
from utils.errors import UserError
from utils.files import atomic_write
from utils.flags import flag_parser


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = update_config(get_config(), args)
    config.DATA.NUM_WORKERS, config.DATA.CACHE = 0, 'no'  # for one batch, with the same images
    task = build_task(config)
    dataset = task.dataset('train')
    with atomic_write(args.target) as file:
        batch = load_batch(config, task, dataset, args.epoch, args.batch)
        draws = step_draws(config, args.epoch, args.batch, rank=0)
        shown = task.training_pictures(batch, np.random.default_rng(draws), dataset, min(args.images, len(batch)))
        contact_sheet(shown, args.columns or columns_of(len(shown), len(shown[0].pictures))).save(file, 'PNG')
    for index, example in zip(batch.indices, shown):
        print(f'{dataset.describe(int(index))}: {example.caption}')
    print(f'{args.target}: {len(shown)} of {len(batch)} images of batch {args.batch}, epoch {args.epoch}')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser(
        'Draw the images of a training batch as the model gets them.',
        ('-cfg', '-dataset', '-data_path', '-batch_size', '-image_size', '-num_classes'),
    )
    add_output_file(parser, '.png', required=True)
    parser.add_argument('-epoch', type=int, default=1, metavar='N', help='epoch, from 1')
    parser.add_argument('-batch', type=int, default=0, metavar='N', help='micro-batch of the epoch, from 0')
    parser.add_argument('-images', type=int, default=16, metavar='N', help='images to draw, the first of the batch')
    parser.add_argument('-columns', type=int, metavar='N', help='images in a row (default: about as many as rows)')
    parser.add_argument(
        '-seed', type=int, default=argparse.SUPPRESS, metavar='N', help='replaces SEED of the configuration'
    )
    args = parser.parse_args(argv)
    if config_file_of(args) is None:
        raise UserError('-cfg is missing: give the YAML file of a recipe.')
    if 'seed' in args:
        args.opts = [*args.opts, 'SEED', args.seed]
    for flag, least in (('epoch', 1), ('batch', 0), ('images', 1), ('columns', 1)):
        value = getattr(args, flag, None)
        if value is not None and value < least:
            raise UserError(f'-{flag} is {value}, but must be at least {least}.')
    return args


def load_batch(config: CfgNode, task: Task, dataset: Images, epoch: int, index: int) -> Batch:
    """Return micro-batch `index` of an epoch as tensors.

    Raises:
        UserError: the epoch has fewer batches, or an image cannot be read.
    """
    with build_loader(config, task, dataset, 'train', distributed.start()) as loader:
        if index >= loader.num_batches:
            raise UserError(
                f'-batch is {index}, but an epoch has {loader.num_batches} batches of {config.DATA.BATCH_SIZE} images: the '
                f'last one is {loader.num_batches - 1}.'
            )
        with contextlib.closing(loader.epoch(epoch, index)) as batches:
            return to_device(next(batches), config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)


def columns_of(count: int, pictures: int) -> int:
    """Return the images in a row of an about square sheet; each has `pictures` pictures side by side."""
    return max(1, round(math.sqrt(count / pictures)))


if __name__ == '__main__':
    run(main)
