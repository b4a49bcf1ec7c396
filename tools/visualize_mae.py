#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw the reconstructions of a masked autoencoder: the image, its visible patches, and the reconstructed image.

    python tools/visualize_mae.py -cfg configs/mae_tiny_patch16_224.yaml -pretrained mae.pdparams -output mae.png photos/
    python tools/visualize_mae.py -pretrained output/latest -output mae.png cat.jpg dog.jpg -opts MODEL.MAE.MASK_RATIO 0.5

Writes one PNG with a row per image; see docs/mae.md.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse
import os

import numpy as np
import paddle

from datasets.bands import image_extensions
from engine import distributed
from models import build_model
from models.mae import MaskedAutoencoder
from models.weights.load import load_pretrained
from tasks.mae_pictures import reconstruct
from tasks.pictures import image_grid
from tools._common import find_images, trained_config
from tools._output import add_output_file
from tools._pictures import readable, single_batch
from utils.cli import run
from utils.errors import UserError
from utils.files import atomic_write
from utils.flags import flag_parser


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = trained_config(args)
    paths = find_images(args.images, image_extensions(config.DATA.IMAGE_CHANNELS))
    if os.path.realpath(args.target) in map(os.path.realpath, paths):
        raise UserError(f"-output '{args.target}' is one of the images; give another path.")
    distributed.start()
    model = load_autoencoder(config)
    rows, patches = [], model.patch_embed.num_patches
    with atomic_write(args.target) as target:
        for index, image in readable(paths, config):
            noise = paddle.to_tensor(np.random.default_rng([args.seed, index]).random((1, patches), 'float32'))
            rows += reconstruct(
                model, single_batch(image, config), noise, config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD
            )
        image_grid(rows).save(target, 'PNG')
    print(f'{args.target}: {len(rows)} of {len(paths)} images')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser('Draw the reconstructions of a masked autoencoder.', ('-cfg', '-pretrained', '-image_size'))
    parser.add_argument('images', nargs='+', metavar='PATH', help='image files, or folders with images anywhere below')
    add_output_file(parser, '.png', required=True)
    parser.add_argument('-seed', type=int, default=0, metavar='N', help='seed of the masked patches')
    return parser.parse_args(argv)


def load_autoencoder(config) -> MaskedAutoencoder:
    """Build the model of a configuration, load MODEL.PRETRAINED, and set evaluation mode."""
    model = build_model(config)
    if not isinstance(model, MaskedAutoencoder) or not model.decoder_depth:
        raise UserError(f'MODEL.TYPE is {config.MODEL.TYPE}, which has no decoder; give the -cfg of an MAE.')
    load_pretrained(model, config.MODEL.PRETRAINED, replace_head=False)
    model.eval()
    return model


if __name__ == '__main__':
    run(main)
