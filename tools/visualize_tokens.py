#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Shows which patches of an image a Vision Transformer keeps, drops and fuses on its way through the blocks.

    python tools/visualize_tokens.py -cfg configs/evit_small_patch16_224_k07_fuse.yaml -pretrained evit.pdparams \
        -output pictures photos/ cat.jpg
    python tools/visualize_tokens.py -pretrained output/latest -output pictures -grid grid.png -columns 2 photos/

Writes a PNG strip per image: the image as the model sees it, then a panel for each block that reduced the tokens.
docs/visualize.md explains the pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from utils.environment import tune_process

if __name__ == '__main__':
    tune_process()  # before Paddle is imported

import numpy as np
import paddle
from PIL import Image, ImageDraw, ImageFont

from config import flag_parser
from datasets import Batch
from datasets.batch import to_tensor
from datasets.dataset import FileStorage
from datasets.images import UnreadableImage
from datasets.transforms import build_transform
from engine import distributed
from engine.inference import load_classifier
from models.vision_transformer import VisionTransformer
from tools._common import output_file, trained_config
from tools.predict import find_images
from utils.cli import run
from utils.errors import UserError


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = trained_config(args)
    paths = find_images(args.images)
    targets = strip_paths(paths, args.output)
    if args.grid and os.path.realpath(args.grid) in map(os.path.realpath, paths + targets):
        raise UserError(f"-grid '{args.grid}' is the path of another picture of this run; give another one.")
    distributed.start()
    model = load_classifier(config)
    strips = []
    with output_file(args.grid, 'wb') if args.grid else contextlib.nullcontext() as grid:
        for strip, target in zip(*draw_images(config, model, paths), targets):
            strips.append(strip)
        if grid:
            tile(strips, args.columns).save(grid, 'PNG')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser('Show which patches are kept, dropped and fused.', ('-cfg', '-pretrained', '-image_size'))
    parser.add_argument('images', nargs='+', metavar='PATH', help='image files, or folders with images anywhere below')
    parser.add_argument('-output', metavar='DIR', required=True, help='folder for a PNG per image')
    parser.add_argument('-grid', metavar='FILE', help='.png file that shows all images')
    parser.add_argument('-columns', type=int, default=1, metavar='N', help='images side by side in the grid')
    args = parser.parse_args(argv)
    if args.columns < 1:
        raise UserError(f'-columns is {args.columns}, but must be at least 1.')
    return args


def strip_paths(paths: Sequence[str], folder: str) -> list[str]:
    """`folder/NAME_tokens.png` for each image; a number tells equal names apart, and no image is written over."""
    taken = {os.path.realpath(path) for path in paths}
    targets = []
    for path in paths:
        stem = os.path.join(folder, os.path.splitext(os.path.basename(path))[0])
        names = (f'{stem}_tokens{number}.png' for number in itertools.chain([''], itertools.count(2)))
        targets.append(next(name for name in names if os.path.realpath(name) not in taken))
        taken.add(os.path.realpath(targets[-1]))
    return targets
