#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Select the attention layers of a trained Vision Transformer to remove, by transfer entropy.

    python tools/select_layers.py -cfg configs/deit_base_patch16_224.yaml -pretrained deit_base_patch16_224.pdparams \
        -data_path /dataset/imagenet -number 5 -output selection/deit_base

Writes selection/deit_base.json (all entropies), .png (their plots) and .yaml (a configuration in which the attention of the
selected layers decays). Under Paddle's launcher each process takes a part of the images. docs/lambda_vit.md explains it.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start(single_process=False)

import argparse
import math
import os
from collections.abc import Iterator

import yaml

import datasets
from analysis.selection import TARGETS, Step, branch_entropies, select_layers
from config import config_file_of
from datasets.subset import random_subset
from deploy.inference import load_classifier
from engine import distributed
from models.vision_transformer import VisionTransformer
from tools._analysis import FLAGS, normalized
from tools._common import result_files, trained_config
from tools._output import add_output_prefix
from utils.cli import run
from utils.errors import UserError
from utils.files import json_text
from utils.flags import flag_parser

SUFFIXES = ('json', 'png', 'yaml')
YAML = """\
# {name} whose attention decays in blocks {layers}, selected by tools/select_layers.py
# ({images} images, entropy of the {target}). Train it from the weights of the selection:
#
#   python main_multi_gpu.py -cfg={path} -pretrained={weights}
{base}
MODEL:
  NAME: {name}_fading
  LAMBDA:
    PRUNE_LAYERS: [{layers}]
"""


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = trained_config(args)
    if config.MODEL.EVIT.KEEP_RATE < 1 or config.MODEL.TOME.R or config.MODEL.TOME.SCHEDULE:
        raise UserError(
            'layers are selected on models with all tokens: set MODEL.EVIT.KEEP_RATE to 1, MODEL.TOME.R to 0.'
        )
    context = distributed.start()
    data = random_subset(datasets.build_dataset(config, args.split), args.images, config.SEED)
    if len(data) < 2 * context.world_size:
        raise UserError(f'{len(data)} images are too few for {context.world_size} processes.')
    log = print if context.is_main else lambda line: None
    model = load_classifier(config, log=log)
    if not isinstance(model, VisionTransformer):
        raise UserError(f'MODEL.TYPE is {config.MODEL.TYPE}, but attention is removed from Vision Transformers.')
    with (
        result_files(args.target, *(SUFFIXES if context.is_main else ())) as files,
        datasets.build_dataloader(config, data, False, context.rank, context.world_size) as loader,
    ):

        def batches(label: str) -> Iterator:
            return (images for (images,) in normalized(loader, [config], label, context.is_main))

        branches = branch_entropies(model, batches('branches'), context)
        steps = []
        for step in select_layers(model, lambda i: batches(f'layer {i + 1}'), args.number, context, args.target_output):
            steps.append(step)
            log(f'{len(steps)}. block {step.chosen}, transfer entropy {step.transfer[step.chosen]:.4f}')
        if context.is_main:
            result = describe(args, config, len(data), branches, steps)
            files['json'].write(json_text(result, indent=2))
            draw(result).savefig(files['png'], format='png', dpi=150)
            files['yaml'].write(recipe(args, config, result))
    log(f'written: {", ".join(f"{args.target}.{suffix}" for suffix in SUFFIXES)}')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser('Select the attention layers to remove.', FLAGS)
    parser.add_argument('-number', type=int, required=True, metavar='N', help='number of layers to select')
    parser.add_argument(
        '-target', dest='target_output', choices=TARGETS, default=TARGETS[0],
        help='output whose entropy decides: the logits, or the input of the classifier',
    )  # fmt: skip
    parser.add_argument('-images', type=int, default=50000, metavar='N', help='number of images, drawn by SEED')
    parser.add_argument('-split', choices=('train', 'val'), default='train', help='split of the images')
    add_output_prefix(parser, *(f'.{suffix}' for suffix in SUFFIXES))
    return parser.parse_args(argv)


def describe(args: argparse.Namespace, config, images: int, branches: dict, steps: list[Step]) -> dict:
    """Return the content of the JSON file."""
    return {
        'model': config.MODEL.NAME,
        'weights': config.MODEL.PRETRAINED,
        'target': args.target_output,
        'split': args.split,
        'images': images,
        'order': [step.chosen for step in steps],
        'layers': sorted(step.chosen for step in steps),
        'steps': [
            {'base': step.base, 'entropies': step.entropies, 'transfer': step.transfer, 'chosen': step.chosen}
            for step in steps
        ],
        'branches': branches,
    }


def recipe(args: argparse.Namespace, config, result: dict) -> str:
    """Return the configuration in which the attention of the selected layers decays."""
    path = f'{args.target}.yaml'
    base = os.path.relpath(config_file_of(args), os.path.dirname(path) or '.')
    return YAML.format(
        name=result['model'],
        layers=', '.join(map(str, result['layers'])),
        images=result['images'],
        target=result['target'],
        path=path,
        weights=config.MODEL.PRETRAINED,
        base=yaml.safe_dump({'BASE': base}, width=math.inf).rstrip(),
    )


def draw(result: dict):
    """Draw the transfer entropy of each layer at each step, with the selected one circled, and the branch entropies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout='constrained')
    left, right = figure.subplots(1, 2)
    for number, step in enumerate(result['steps'], 1):
        points = left.plot(list(step['transfer']), list(step['transfer'].values()), marker='.', label=f'layer {number}')
        left.scatter(
            step['chosen'], step['transfer'][step['chosen']], s=90, facecolors='none', edgecolors=points[0].get_color()
        )
    left.set(xlabel='block', ylabel='transfer entropy', title=f'{result["model"]}: {result["target"]}')
    for name, layers in result['branches'].items():
        right.plot(list(layers), list(layers.values()), marker='.', label=name)
    right.set(xlabel='block', ylabel='entropy', title='outputs of the branches')
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return figure


if __name__ == '__main__':
    run(main)
