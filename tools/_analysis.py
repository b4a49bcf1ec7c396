# SPDX-License-Identifier: Apache-2.0
"""Shared code of the tools that analyze the layers of Vision Transformers: flags, images, models."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import paddle
from paddle import Tensor
from yacs.config import CfgNode

from datasets import Dataset, Loader, build_dataset
from datasets.batch import to_device
from datasets.subset import first_images, random_subset
from models import build_model
from models.vision_transformer import VisionTransformer
from models.weights.load import load_pretrained
from tools._output import add_output_prefix
from utils.errors import UserError
from utils.flags import flag_parser
from utils.runlog import progress

FLAGS = ('-cfg', '-pretrained', '-dataset', '-data_path', '-batch_size', '-image_size', '-num_workers')


def analysis_parser(description: str) -> argparse.ArgumentParser:
    """Build a parser of the flags of one model, of the images and of the output files."""
    parser = flag_parser(description, FLAGS)
    parser.set_defaults(batch_size=128)
    parser.add_argument('-images', type=int, default=1024, metavar='N', help='number of images')
    parser.add_argument('-split', choices=('train', 'val'), default='val', help='split of the images')
    parser.add_argument(
        '-shuffle', action='store_true', help='draw the images at random by SEED instead of taking the first ones'
    )
    add_output_prefix(parser, '.json', '.png')
    return parser


def chosen_images(args: argparse.Namespace, config: CfgNode) -> Dataset:
    """Return the images to analyze, at most `args.images`."""
    if args.images < 1:
        raise UserError(f'-images is {args.images}, but must be at least 1.')
    any_classes = config.clone()
    any_classes.defrost()
    any_classes.MODEL.NUM_CLASSES = None  # the images may have other classes than the model
    data = build_dataset(any_classes, args.split)
    return random_subset(data, args.images, config.SEED) if args.shuffle else first_images(data, args.images)


def normalized(loader: Loader, configs: Sequence[CfgNode], label: str, shown: bool = True) -> Iterator[list[Tensor]]:
    """Yield the images of each batch, [b, C, H, W], normalized for each of the models; `label`: title of the progress bar."""
    for batch in progress(loader.epoch(0), loader.num_batches, label, shown):
        if len(batch):
            yield [to_device(batch, config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD).images for config in configs]


def load_transformer(config: CfgNode) -> VisionTransformer:
    """Build the model of a configuration without classifier, and load MODEL.PRETRAINED; None: random weights.

    Raises:
        UserError: the model is no Vision Transformer, or the weights do not fit.
    """
    config = config.clone()
    config.defrost()
    config.MODEL.NUM_CLASSES = 0
    paddle.seed(config.SEED)
    model = build_model(config)
    encoder = getattr(model, 'base_encoder', model)  # MoCo v3: not the momentum encoder
    if not isinstance(encoder, VisionTransformer):
        raise UserError(f'MODEL.TYPE is {config.MODEL.TYPE}, but this tool analyzes Vision Transformers.')
    if config.MODEL.PRETRAINED is None:
        print(f'----- {config.MODEL.NAME}: no weights given, random weights are drawn by SEED {config.SEED}')
    else:
        load_pretrained(model, config.MODEL.PRETRAINED)
    encoder.eval()
    return encoder
