#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Export a trained model as an inference program that runs without this code.

    python tools/export.py -cfg configs/gmlp_s16_224.yaml -pretrained gmlp_s16_224.pdparams -output exported/gmlp_s16_224
    python tools/export.py -pretrained output/latest -output exported/mine
    python tools/export.py -pretrained output/latest -output exported/mine -format onnx
    python tools/export.py -pretrained output/latest -output exported/mine -format onnx -precision int8

Writes exported/mine.json (program), .pdiparams (weights) and .preprocess.json (preprocessing of images); with -format onnx
exported/mine.onnx and .preprocess.json. The files appear only if the output of the program equals that of the model.
docs/predict_export.md shows how to use them.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from deploy.inference import load_classifier
from models.engines import Engine
from models.exported import INPUT_NAME, PREPROCESS, PROGRAM, WEIGHTS, Predictor, save_program
from models.onnx_files import ONNX, OnnxRuntime, convert_program, quantize_weights
from tasks import Task, build_task
from tools._common import trained_config
from tools._output import add_output_prefix
from utils.cli import run
from utils.errors import UserError
from utils.files import cannot_write, json_text
from utils.flags import flag_parser

TOLERANCE = 1e-5  # largest difference of a logit, relative to the largest logit
INT8_TOLERANCE = 0.5  # the same after quantization: finds broken files; accuracy is to be measured on data
BATCHES, RUNS = (1, 3), 2
FILES = {'paddle': (PROGRAM, WEIGHTS, PREPROCESS), 'onnx': (ONNX, PREPROCESS)}  # by format; the program is the first


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
                difference = max(difference, export(model, task, prefix, args.format, args.precision))
            with open(prefix + PREPROCESS, 'w', encoding='utf-8') as file:
                file.write(json_text(describe(config, model.num_classes, task), indent=2))
            publish(prefix, os.path.join(folder, name), FILES[args.format])
    except OSError as error:
        raise cannot_write(args.target, error) from error
    print(f'largest relative difference between program and model: {difference:.1e}')
    print(f'written: {", ".join(args.target + suffix for suffix in FILES[args.format])}')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser('Export a trained model as an inference program.', ('-cfg', '-pretrained', '-image_size'))
    parser.add_argument('-format', choices=list(FILES), default='paddle', help='Paddle inference program, or ONNX file')
    parser.add_argument(
        '-precision', choices=('fp32', 'int8'), default='fp32', help='of the linear layers of the ONNX file'
    )
    add_output_prefix(parser, PROGRAM, WEIGHTS, PREPROCESS, ONNX)
    args = parser.parse_args(argv)
    if args.precision == 'int8' and args.format != 'onnx':
        raise UserError('-precision int8 needs -format onnx.')
    return args


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


def export(model: paddle.nn.Layer, task: Task, prefix: str, kind: str = 'paddle', precision: str = 'fp32') -> float:
    """Write the program and run it. Return the largest difference of an output, relative to its largest value.

    Args:
        kind: a format of FILES.
        precision: 'fp32', or 'int8' for ONNX files.

    Raises:
        UserError: the difference is too large, or the model cannot be converted.
    """
    rng, shape = np.random.default_rng(0), task.image_shape()
    batches = [(rng.standard_normal((size, *shape), 'float32'), task.program_inputs(size)) for size in BATCHES]
    with paddle.no_grad():
        expected = [outputs_of(model, images, more) for images, more in batches]
    save_program(model, shape, prefix, batches[0][1])

    def check(tolerance: float) -> float:
        predictor = read_back(prefix, kind)
        # Twice: a program may be right in its first run with a batch size and wrong in the next ones.
        found = [as_tuple(predictor(images, **more)) for images, more in batches for _ in range(RUNS)]
        pairs = zip(found, [outputs for outputs in expected for _ in range(RUNS)])
        worst = float(np.max([task.program_difference(*pair) for pair in pairs]))
        if not worst <= tolerance:  # NaN included
            raise UserError(
                f'the exported program disagrees with the model by {worst:.1e} of the largest logit, more than '
                f'{tolerance}: nothing is written.'
            )
        return worst

    if kind == 'onnx':
        convert_program(prefix)
    worst = check(TOLERANCE)
    if precision == 'int8':
        os.replace(quantize_weights(prefix + ONNX), prefix + ONNX)
        worst = check(INT8_TOLERANCE)
    return worst


def read_back(prefix: str, kind: str) -> Engine:
    """Return what runs the exported files."""
    try:
        return OnnxRuntime(prefix + ONNX) if kind == 'onnx' else Predictor(prefix)
    except UserError:
        raise
    except Exception as error:  # of any type: Paddle reports no error on a full disk
        raise UserError(
            'the exported program cannot be read back, so nothing is written; free space on its disk, or write elsewhere '
            '(-output).'
        ) from error


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


def publish(prefix: str, target: str, suffixes: Sequence[str] = FILES['paddle']) -> None:
    """Move the files to their target. The old program is removed first and the new one is moved last, since all need it."""
    program, *others = suffixes
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target + program)
    for suffix in (*others, program):
        with open(prefix + suffix, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(prefix + suffix, target + suffix)


if __name__ == '__main__':
    run(main)
