#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Classifies images: files, or all images below folders.

    python tools/predict.py -cfg configs/gmlp_s16_224.yaml -pretrained gmlp_s16_224.pdparams photos/ cat.jpg
    python tools/predict.py -pretrained output/latest -topk 3 -output predictions.csv photos/

Images pass through the loader and transform of the evaluation. docs/predict_export.md describes the output.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse
import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import IO

from config import flag_parser
from engine import distributed
from engine.inference import Prediction, classify, load_classifier
from tools._common import find_images, trained_config
from utils.cli import run
from utils.errors import UserError
from utils.files import atomic_write
from utils.runlog import progress


def main(argv: list[str] | None = None) -> int:
    """Returns 1 when an image could not be read, else 0."""
    args = parse(argv)
    config = trained_config(args)
    paths = find_images(args.images)
    distributed.start()
    model = load_classifier(config)
    names = read_class_names(args.class_names, model.num_classes) if args.class_names else None
    topk = min(args.topk, model.num_classes)
    unreadable: list[str] = []
    predictions = noting_unreadable(classify(config, model, paths, topk), unreadable)
    if args.target is None:
        print_lines(predictions, names)
    else:
        with atomic_write(args.target) as file:
            write = write_csv if args.target.endswith('.csv') else write_json
            write(file, progress(predictions, len(paths), 'images', shown=True), names, topk)
    print(f'{len(paths)} images, {len(unreadable)} of them unreadable')
    return int(len(unreadable) > 0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = ('-cfg', '-pretrained', '-batch_size', '-image_size', '-num_workers')
    parser = flag_parser('Classify images.', flags)
    parser.add_argument('images', nargs='+', metavar='PATH', help='image files, or folders with images anywhere below')
    parser.add_argument('-topk', type=int, default=5, metavar='K', help='classes told per image, the most likely first')
    parser.add_argument('-class_names', metavar='FILE', help='a name per line, in the order of the classes')
    parser.add_argument(
        '-output', dest='target', metavar='FILE', help='.csv or .json file to write instead of printing'
    )
    parser.set_defaults(batch_size=32)
    args = parser.parse_args(argv)
    if args.topk < 1:
        raise UserError(f'-topk is {args.topk}, but must be at least 1.')
    if args.target and not args.target.endswith(('.csv', '.json')):
        raise UserError(f"-output is '{args.target}', but must end in .csv or .json.")
    return args


def read_class_names(path: str, num_classes: int) -> list[str]:
    """One name per class."""
    try:
        with open(path, encoding='utf-8-sig') as file:
            names = file.read().rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read -class_names '{path}': {getattr(error, 'strerror', 0) or error}.") from None
    if len(names) != num_classes:
        raise UserError(f"-class_names '{path}' has {len(names)} lines, but the model has {num_classes} classes.")
    return names


def noting_unreadable(predictions: Iterable[Prediction], unreadable: list[str]) -> Iterator[Prediction]:
    """Passes predictions on and collects the images without one."""
    for prediction in predictions:
        if prediction.error is not None:
            unreadable.append(prediction.image)
        yield prediction


# ---------------------------------------------------------------------------------------------------- output
def print_lines(predictions: Iterable[Prediction], names: list[str] | None) -> None:
    for prediction in predictions:
        told = [f'{names[k] if names else k} {p:.4f}' for k, p in zip(prediction.classes, prediction.probabilities)]
        print(f'{prediction.image}: {prediction.error or ", ".join(told)}', flush=True)


def write_csv(file: IO[bytes], predictions: Iterable[Prediction], names: list[str] | None, topk: int) -> None:
    """A line per image: path, then number, name (with `names`) and probability of each class, then the error."""
    parts = ('class', 'name', 'probability') if names else ('class', 'probability')
    text = io.TextIOWrapper(file, 'utf-8', errors='surrogateescape', newline='')
    writer = csv.writer(text)
    writer.writerow(['image', *(f'{part}{rank}' for rank in range(1, topk + 1) for part in parts), 'error'])
    for prediction in predictions:
        cells = [cell for entry in entries(prediction, names) for cell in entry.values()]
        cells += [''] * (len(parts) * topk - len(cells))
        writer.writerow([prediction.image, *cells, prediction.error or ''])
    text.detach()


def write_json(file: IO[bytes], predictions: Iterable[Prediction], names: list[str] | None, topk: int) -> None:
    """A list with an object per image: `image`, and `predictions` or `error`."""
    separator = b'[\n'
    for prediction in predictions:
        if prediction.error is None:
            row = {'image': prediction.image, 'predictions': entries(prediction, names)}
        else:
            row = {'image': prediction.image, 'error': prediction.error}
        file.write(separator + json.dumps(row).encode())
        separator = b',\n'
    file.write(b'\n]\n')


def entries(prediction: Prediction, names: list[str] | None) -> list[dict]:
    """The classes of an image as `class`, `name` (with `names`) and `probability`."""
    return [
        {'class': number, **({'name': names[number]} if names else {}), 'probability': probability}
        for number, probability in zip(prediction.classes, prediction.probabilities)
    ]


if __name__ == '__main__':
    run(main)
