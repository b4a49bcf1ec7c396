# SPDX-License-Identifier: Apache-2.0
"""What the tools that look into the layers of Vision Transformers share: flags, images, models."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import paddle
from paddle import Tensor
from yacs.config import CfgNode

from config import flag_parser
from datasets import Dataset, Loader, build_dataset
from datasets.batch import to_device
from datasets.subset import first_images, random_subset
from models import build_model
from models.vision_transformer import VisionTransformer
from models.weights.load import load_pretrained
from tools._output import add_output_prefix
from utils.errors import UserError
from utils.runlog import progress

FLAGS = ('-cfg', '-pretrained', '-dataset', '-data_path', '-batch_size', '-image_size', '-num_workers')


def analysis_parser(description: str) -> argparse.ArgumentParser:
    """The flags of one model, of the images and of the files to write."""
    parser = flag_parser(description, FLAGS)
    parser.set_defaults(batch_size=128)
    parser.add_argument('-images', type=int, default=1024, metavar='N', help='images to look at')
    parser.add_argument('-split', choices=('train', 'val'), default='val', help='where they are taken from')
    parser.add_argument(
        '-shuffle', action='store_true', help='draw them from all of it by SEED, instead of taking the first ones'
    )
    add_output_prefix(parser, '.json', '.png')
    return parser


def chosen_images(args: argparse.Namespace, config: CfgNode) -> Dataset:
    """The images to look at; all where there are fewer."""
    if args.images < 1:
        raise UserError(f'-images is {args.images}, but must be at least 1.')
    unlabelled = config.clone()
    unlabelled.defrost()
    unlabelled.MODEL.NUM_CLASSES = None  # the images may be of other classes than the model's
    data = build_dataset(unlabelled, args.split)
    return random_subset(data, args.images, config.SEED) if args.shuffle else first_images(data, args.images)


def normalised(loader: Loader, configs: Sequence[CfgNode], label: str, shown: bool = True) -> Iterator[list[Tensor]]:
    """Yields the images of each batch, [b, C, H, W], as each of the models takes them; `label` names the progress bar."""
    for batch in progress(loader.epoch(0), loader.num_batches, label, shown):
        if len(batch):
            yield [to_device(batch, config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD).images for config in configs]


def load_transformer(config: CfgNode) -> VisionTransformer:
    """The model of a configuration, without classifier, with the weights MODEL.PRETRAINED; random ones where it is None.

    Raises:
        UserError: it is no Vision Transformer, or the weights do not fit.
    """
    config = config.clone()
    config.defrost()
    config.MODEL.NUM_CLASSES = 0
    paddle.seed(config.SEED)
    model = build_model(config)
    encoder = getattr(model, 'base_encoder', model)  # of MoCo-v3 the one that is trained
    if not isinstance(encoder, VisionTransformer):
        raise UserError(f'MODEL.TYPE is {config.MODEL.TYPE}, but this tool looks into Vision Transformers.')
    if config.MODEL.PRETRAINED is None:
        print(f'----- {config.MODEL.NAME}: no weights, random ones are drawn by SEED {config.SEED}')
    else:
        load_pretrained(model, config.MODEL.PRETRAINED)
    encoder.eval()
    return encoder
