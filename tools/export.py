#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Export a trained model as an inference program that runs without this code.

    python tools/export.py -cfg configs/gmlp_s16_224.yaml -pretrained gmlp_s16_224.pdparams -output exported/gmlp_s16_224
    python tools/export.py -pretrained output/latest -output exported/mine

Writes exported/mine.json (program), .pdiparams (weights) and .preprocess.json (preprocessing of images). The files appear
only if the output of the program equals that of the model. docs/predict_export.md shows how to use them.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import paddle

from deploy.inference import load_classifier
from models.exported import INPUT_NAME, PREPROCESS, PROGRAM, WEIGHTS, Predictor, save_program
from tasks import Task, build_task
from tools._common import trained_config
from tools._output import add_output_prefix
from utils.cli import run
from utils.errors import UserError
from utils.files import cannot_write, json_text
from utils.flags import flag_parser

TOLERANCE = 1e-5  # largest difference of a logit, relative to the largest logit
BATCHES = (1, 3)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = trained_config(args)
    folder, name = os.path.split(os.path.abspath(args.target))
    paddle.set_device('cpu')  # the files do not depend on the device, and the CPU computes in full float32
    model = load_classifier(config)
    config.MODEL.NUM_CLASSES = model.num_classes
    task = build_task(config)
    try:
        os.makedirs(folder, exist_ok=True)
        with unfinished_files(folder, name) as prefix:
            difference = 0.0
            for _ in task.exports(model):
                difference = max(difference, export(model, task, prefix))
            with open(prefix + PREPROCESS, 'w', encoding='utf-8') as file:
                file.write(json_text(describe(config, model.num_classes, task), indent=2))
            publish(prefix, os.path.join(folder, name))
    except OSError as error:
        raise cannot_write(args.target, error) from error
    print(f'largest relative difference between program and model: {difference:.1e}')
    print(f'written: {", ".join(args.target + suffix for suffix in (PROGRAM, WEIGHTS, PREPROCESS))}')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser('Export a trained model as an inference program.', ('-cfg', '-pretrained', '-image_size'))
    add_output_prefix(parser, PROGRAM, WEIGHTS, PREPROCESS)
    return parser.parse_args(argv)


@contextlib.contextmanager
def unfinished_files(folder: str, name: str) -> Iterator[str]:
    """Yield a file prefix in a temporary folder below `folder`, through a link, since Paddle takes plain names only."""
    with (
        tempfile.TemporaryDirectory(prefix=f'.{name}.', suffix='.tmp', dir=folder) as unfinished,
        tempfile.TemporaryDirectory() as plain,
    ):
        link = os.path.join(plain, 'files')
        os.symlink(unfinished, link)
        yield os.path.join(link, 'program')


def export(model: paddle.nn.Layer, task: Task, prefix: str) -> float:
    """Write the program and run it. Return the largest difference of an output, relative to its largest value.

    Raises:
        UserError: the difference is too large.
    """
    rng, shape = np.random.default_rng(0), task.image_shape()
    batches = [(rng.standard_normal((size, *shape), 'float32'), task.program_inputs(size)) for size in BATCHES]
    with paddle.no_grad():
        expected = [outputs_of(model, images, more) for images, more in batches]
    save_program(model, shape, prefix, batches[0][1])
    try:
        predictor = Predictor(prefix)
    except Exception as error:  # of any type: Paddle reports no error on a full disk
        raise UserError(
            'the exported program cannot be read back, so nothing is written; free space on its disk, or write elsewhere '
            '(-output).'
        ) from error
    found = [as_tuple(predictor(images, **more)) for images, more in batches]
    differences = [task.program_difference(*pair) for pair in zip(found, expected)]
    worst = float(np.max(differences))
    if not worst <= TOLERANCE:  # NaN included
        raise UserError(
            f'the exported program disagrees with the model by {worst:.1e} of the largest logit, more than {TOLERANCE}: '
            'nothing is written.'
        )
    return worst


def outputs_of(model: paddle.nn.Layer, images: np.ndarray, more: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Return the outputs of a model as arrays."""
    outputs = model(paddle.to_tensor(images), *map(paddle.to_tensor, more.values()))
    return tuple(output.numpy() for output in as_tuple(outputs))


def as_tuple(outputs: Any) -> tuple:
    """One output or several -> a tuple of them."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def describe(config, num_classes: int, task: Task | None = None) -> dict:
    """Return the preprocessing that gives a program the same inputs as the evaluation."""
    data, task = config.DATA, build_task(config) if task is None else task
    return {
        'model': config.MODEL.NAME,
        'num_classes': num_classes,
        'input': {'name': INPUT_NAME, 'dtype': 'float32', 'shape': [None, *task.image_shape()]},
        **{
            f'input_{name}': {'name': name, 'dtype': str(array.dtype), 'shape': [None, *array.shape[1:]]}
            for name, array in task.program_inputs(1).items()
        },
        'exif_rotate': data.EXIF_ROTATE,
        'mode': {1: 'L', 3: 'RGB'}.get(data.IMAGE_CHANNELS),
        **task.preprocessing(),
        'mean': list(data.IMAGENET_MEAN[: data.IMAGE_CHANNELS]),
        'std': list(data.IMAGENET_STD[: data.IMAGE_CHANNELS]),
    }


def publish(prefix: str, target: str) -> None:
    """Move the files to their target. The old program is removed first and the new one is moved last, since all need it."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target + PROGRAM)
    for suffix in (WEIGHTS, PREPROCESS, PROGRAM):
        with open(prefix + suffix, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(prefix + suffix, target + suffix)


if __name__ == '__main__':
    run(main)
