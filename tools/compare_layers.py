#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare the layers of two Vision Transformers on the same images by centered kernel alignment (CKA).

    python tools/compare_layers.py -cfg configs/vit_tiny_patch16_224_mae_finetune.yaml -pretrained mae_tiny.pdparams \
        -cfg2 configs/deit_tiny_patch16_224.yaml -pretrained2 deit_tiny_patch16_224.pdparams \
        -data_path /dataset/imagenet -output analysis/mae_tiny-deit_tiny

Writes a table of similarities (.json) and its heat map (.png); see docs/analysis.md.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse
import json
import os

import numpy as np

from analysis.attention import MIN_BATCH, compare_layers
from config import config_file_of
from datasets import build_dataloader
from engine import distributed
from tools._analysis import analysis_parser, chosen_images, load_transformer, normalized
from tools._common import result_files, trained_config
from utils.cli import run
from utils.errors import UserError


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    configs = [trained_config(args), trained_config(of_second(args))]
    check(*configs)
    data = chosen_images(args, configs[0])
    distributed.start()
    models = [load_transformer(config) for config in configs]
    with (
        result_files(args.target, 'json', 'png') as files,
        build_dataloader(configs[0], data, training=False) as loader,
    ):
        cka, images = compare_layers(*models, normalized(loader, configs, 'layers'))
        result = {
            'models': [{'model': config.MODEL.NAME, 'weights': config.MODEL.PRETRAINED} for config in configs],
            'split': args.split,
            'shuffled': args.shuffle,
            'images': images,
            'batch_size': loader.batch_size,
            'cka': [[None if np.isnan(value) else value for value in row] for row in cka.tolist()],
        }
        json.dump(result, files['json'], indent=2, allow_nan=False)
        draw(result).savefig(files['png'], format='png', dpi=150)
    if images < len(data):
        print(f'{len(data) - images} images are skipped: unreadable, or in a batch of fewer than {MIN_BATCH}.')
    if np.isnan(cka).any():
        print(f'{np.isnan(cka).sum()} pairs of layers have no CKA: the output of a layer is the same for all images.')
    print(f'written: {args.target}.json, {args.target}.png ({images} images)')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = analysis_parser('Compare the layers of two models. Images and transform are those of the first model.')
    parser.add_argument(
        '-cfg2', metavar='FILE', help='YAML file of the second model (default: that of its run folder, else -cfg)'
    )
    parser.add_argument('-pretrained2', metavar='FILE', required=True, help='weights of the second model')
    parser.add_argument(
        '-opts2', nargs=argparse.REMAINDER, default=[], metavar='KEY VALUE',
        help='any configuration keys of the second model; after all flags except -opts',
    )  # fmt: skip
    args = parser.parse_args(argv)
    # Each of the two flags takes all following words, so the values of the first one contain the second one.
    for mine, other in (('opts', 'opts2'), ('opts2', 'opts')):
        values = getattr(args, mine)
        if f'-{other}' in values:
            at = values.index(f'-{other}')
            setattr(args, mine, values[:at])
            setattr(args, other, values[at + 1 :])
    return args


def of_second(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags of the second model under the names of the first."""
    second = argparse.Namespace(pretrained=args.pretrained2, opts=args.opts2)
    second.cfg = args.cfg2 or config_file_of(second) or config_file_of(args)
    if 'image_size' in args:
        second.image_size = args.image_size
    return second


def check(first, second) -> None:
    """Raise UserError if the two models cannot take the same images."""
    for key, advice in (('IMAGE_SIZE', '; give both -image_size'), ('IMAGE_CHANNELS', '')):
        ours, theirs = first.DATA[key], second.DATA[key]
        if ours != theirs:
            raise UserError(
                f'DATA.{key} of the first model is {ours}, of the second {theirs}: both must take the same images{advice}.'
            )
    batch = first.DATA.BATCH_SIZE_EVAL or first.DATA.BATCH_SIZE
    if batch < MIN_BATCH:
        raise UserError(f'CKA needs batches of at least {MIN_BATCH} images, but -batch_size is {batch}.')


def draw(result: dict):
    """Draw the table as a heat map from 0 (dark) to 1 (bright); the first layers are at the lower left."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    cka = np.array(result['cka'], dtype=float)
    figure = Figure(figsize=(6, 5), layout='constrained')
    axes = figure.subplots()
    colors = colormaps['magma'].with_extremes(bad='#cccccc')
    picture = axes.imshow(cka, origin='lower', cmap=colors, vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label='CKA')
    rows, columns = cka.shape
    names = [label(model) for model in result['models']]
    axes.set(ylabel=f'layers of {names[0]}', xlabel=f'layers of {names[1]}', yticks=ticks(rows), xticks=ticks(columns))
    axes.set_title(f'{result["images"]} images')
    return figure


def label(model: dict) -> str:
    """Return the name of a model and of its weights."""
    weights = os.path.basename(os.path.normpath(model['weights'])) if model['weights'] else 'random'
    return f'{model["model"]} ({weights.removesuffix(".pdparams")})'


def ticks(layers: int) -> list[int]:
    """Return evenly spaced layer numbers for the axes: 0, 3, 6, 9, 12 of 13."""
    return list(range(0, layers, max(1, round((layers - 1) / 4))))


if __name__ == '__main__':
    run(main)
