#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure mean attention distance and attention entropy of each head of a Vision Transformer.

    python tools/analyze_attention.py -cfg configs/deit_tiny_patch16_224.yaml -pretrained deit_tiny_patch16_224.pdparams \
        -data_path /dataset/imagenet -output analysis/deit_tiny

Writes analysis/deit_tiny.json (one number per head and block) and .png (box plots over the heads); see docs/analysis.md.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse
import json
import math

import numpy as np

from analysis.attention import PATCH_DISTANCE, mean_grid_distance, measure_attention
from datasets import build_dataloader
from engine import distributed
from tools._analysis import analysis_parser, chosen_images, load_transformer, normalized
from tools._common import result_files, trained_config
from utils.cli import run
from utils.errors import UserError

COLUMNS = '{:>5} {:>7} {:>8} {:>9}'
COLOR, FAINT = '#1f77b4', '#777777'


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = trained_config(args)
    data = chosen_images(args, config)
    distributed.start()
    model = load_transformer(config)
    if not any(block.attn_weight for block in model.blocks):
        raise UserError(f'{config.MODEL.NAME} has no attention; see MODEL.LAMBDA.')
    patch_distance = float(config.MODEL.TRANS.PATCH_SIZE) if args.pixels else PATCH_DISTANCE
    with result_files(args.target, 'json', 'png') as files, build_dataloader(config, data, training=False) as loader:
        batches = (images for (images,) in normalized(loader, [config], 'attention'))
        measured = measure_attention(model, batches, patch_distance)
        if not measured['images']:
            raise UserError(f'none of the {len(data)} images of {data.source} could be read.')
        result = {
            'model': config.MODEL.NAME,
            'weights': config.MODEL.PRETRAINED,
            'split': args.split,
            'shuffled': args.shuffle,
            'patches': model.patch_embed.num_patches,
            'grid': list(model.patch_embed.grid_size),
            'patch_distance': patch_distance,
            **measured,
        }
        json.dump(result, files['json'], indent=2, allow_nan=False)
        draw(result).savefig(files['png'], format='png', dpi=150)
    report(result)
    print(f'written: {args.target}.json, {args.target}.png')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = analysis_parser('Measure mean distance and entropy of attention heads.')
    parser.add_argument(
        '-pixels',
        action='store_true',
        help=f'distances in pixels of the input, instead of {PATCH_DISTANCE:g} per patch',
    )
    return parser.parse_args(argv)


def report(result: dict) -> None:
    """Print the means over the heads."""
    print(COLUMNS.format('block', 'tokens', 'entropy', 'distance'))
    for block, (tokens, entropy, distance) in enumerate(zip(*map(result.get, ('tokens', 'entropy', 'distance')))):
        means = ('-', '-') if tokens is None else (f'{np.mean(entropy):.3f}', f'{np.mean(distance):.2f}')
        print(COLUMNS.format(block, tokens or '-', *means))
    print(f'means over the heads, {result["images"]} images')


def draw(result: dict):
    """Draw box plots over the heads of each block: entropies (left), distances (right); dashed: uniform attention."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout='constrained')
    left, right = figure.subplots(1, 2)
    even = (math.log(result['patches']), mean_grid_distance(result['grid'], result['patch_distance']))
    labels = ('average entropy', 'average distance')
    for axes, name, limit, label in zip((left, right), ('entropy', 'distance'), even, labels):
        blocks = [block for block, heads in enumerate(result[name]) if heads is not None]
        heads = [result[name][block] for block in blocks]
        axes.axhline(limit, color=FAINT, linestyle='--', linewidth=1, label='even attention to all patches')
        axes.boxplot(
            heads, positions=blocks, widths=0.6, patch_artist=True, manage_ticks=False,
            boxprops={'facecolor': (COLOR, 0.5), 'edgecolor': COLOR}, medianprops={'color': COLOR},
            whiskerprops={'color': COLOR}, capprops={'color': COLOR}, flierprops={'markeredgecolor': COLOR},
        )  # fmt: skip
        top = max(map(max, heads), default=0.0)
        axes.set(xlabel='block', ylabel=label, ylim=(0, 1.08 * max(limit, top)), xlim=(-0.7, len(result[name]) - 0.3))
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.legend(loc='lower right')
    figure.suptitle(f'{result["model"]}, {result["images"]} images')
    return figure


if __name__ == '__main__':
    run(main)
