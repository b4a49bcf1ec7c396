#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Classify images: files, or all images below folders.

    python tools/predict.py -cfg configs/gmlp_s16_224.yaml -pretrained gmlp_s16_224.pdparams photos/ cat.jpg
    python tools/predict.py -pretrained output/latest -topk 3 -output predictions.csv photos/

Loader and transform are those of the evaluation. docs/predict_export.md describes the output.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

from datasets.bands import image_extensions
from deploy.inference import FilePrediction, load_trained, predict_files
from engine import distributed
from tasks import PredictionOptions
from tools._common import find_images, trained_config
from tools._output import add_output_file
from utils.cli import run
from utils.errors import UserError
from utils.files import atomic_write, open_regular
from utils.flags import flag_parser
from utils.runlog import progress
from utils.text import one_line

MAX_CLASS_NAMES = 64 << 20  # bytes; ten million names


def main(argv: list[str] | None = None) -> int:
    """Return 1 if an image could not be read, else 0."""
    args = parse(argv)
    config = trained_config(args)
    paths = find_images(args.images, image_extensions(config.DATA.IMAGE_CHANNELS))
    distributed.start()
    task, model = load_trained(config)
    model = task.on_engine(model)
    names = read_class_names(args.class_names, model.num_classes) if args.class_names else None
    options = PredictionOptions(args.topk, names)
    columns = task.prediction_columns(options)
    unreadable: list[str] = []
    predictions = collect_unreadable(predict_files(config, task, model, paths, options), unreadable)
    if args.target is None:
        print_lines(predictions)
    else:
        predictions = save_pictures(predictions, os.path.splitext(args.target)[0])
        with atomic_write(args.target) as file:
            predictions = progress(predictions, len(paths), 'images', shown=True)
            if args.target.endswith('.csv'):
                write_csv(file, predictions, columns)
            else:
                write_json(file, predictions)
    print(f'{len(paths)} images, {len(unreadable)} of them unreadable')
    return int(len(unreadable) > 0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = ('-cfg', '-pretrained', '-batch_size', '-image_size', '-num_workers', '-engine')
    parser = flag_parser('Classify images.', flags)
    parser.add_argument('images', nargs='+', metavar='PATH', help='image files, or folders with images anywhere below')
    parser.add_argument(
        '-topk', type=int, default=5, metavar='K', help='classes printed per image, the most likely first'
    )
    parser.add_argument(
        '-class_names', metavar='FILE', help='text file with one class name per line, in the order of the classes'
    )
    add_output_file(parser, '.csv', '.json', what='file to write instead of printing')
    parser.set_defaults(batch_size=32)
    args = parser.parse_args(argv)
    if args.topk < 1:
        raise UserError(f'-topk is {args.topk}, but must be at least 1.')
    return args


def read_class_names(path: str, num_classes: int) -> list[str]:
    """Read one name per class."""
    try:
        with open_regular(path, MAX_CLASS_NAMES, encoding='utf-8-sig') as file:
            names = file.read().rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read -class_names '{path}': {getattr(error, 'strerror', 0) or error}.") from None
    if len(names) != num_classes:
        raise UserError(f"-class_names '{path}' has {len(names)} lines, but the model has {num_classes} classes.")
    return names


def collect_unreadable(predictions: Iterable[FilePrediction], unreadable: list[str]) -> Iterator[FilePrediction]:
    """Yield the predictions, and add the images without one to `unreadable`."""
    for prediction in predictions:
        if prediction.error is not None:
            unreadable.append(prediction.image)
        yield prediction


# ---------------------------------------------------------------------------------------------------- output
def save_pictures(predictions: Iterable[FilePrediction], folder: str) -> Iterator[FilePrediction]:
    """Yield the predictions, and write their pictures to `folder` as NUMBER_NAME_SUFFIX.png."""
    for number, file in enumerate(predictions):
        name = os.path.splitext(os.path.basename(file.image))[0]
        for suffix, picture in (file.prediction.pictures if file.prediction else {}).items():
            with atomic_write(os.path.join(folder, f'{number:06d}_{name}_{suffix}.png')) as target:
                picture.save(target, 'PNG')
        yield file


def print_lines(predictions: Iterable[FilePrediction]) -> None:
    for file in predictions:
        print(f'{one_line(file.image)}: {file.error or file.prediction.text}', flush=True)


def write_csv(file: IO[bytes], predictions: Iterable[FilePrediction], columns: Sequence[str]) -> None:
    """Write a line per image: path, the cells of the task, the error."""
    text = io.TextIOWrapper(file, 'utf-8', errors='surrogateescape', newline='')
    writer = csv.writer(text)
    writer.writerow(['image', *columns, 'error'])
    for image, prediction, error in predictions:
        writer.writerow([image, *(prediction.cells if prediction else [''] * len(columns)), error or ''])
    text.detach()


def write_json(file: IO[bytes], predictions: Iterable[FilePrediction]) -> None:
    """Write a list with an object per image: `image`, and the row of the task or `error`."""
    separator = b'[\n'
    for image, prediction, error in predictions:
        row = {'image': image, **(prediction.row if prediction else {'error': error})}
        file.write(separator + json.dumps(row).encode())
        separator = b',\n'
    file.write(b'\n]\n')


if __name__ == '__main__':
    run(main)
