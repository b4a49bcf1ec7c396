# SPDX-License-Identifier: Apache-2.0
"""Shared code of the tools that pack image files into a few large files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable

from config import get_config
from datasets import Dataset, Images, build_dataset
from datasets.dataset import FileStorage
from datasets.images import UnreadableImage
from datasets.segmentation import SegmentationDataset
from tools._output import add_output_folder
from utils.errors import UserError


def parse(description: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add('-data_path', metavar='DIR', required=True, help='folder of the data, see docs/data.md')
    add_output_folder(parser, 'to write to (default: -data_path)')
    add('-dataset', default='imagenet2012', metavar='NAME', help='any data set of image files (default: imagenet2012)')
    add('-split', nargs='+', default=['train', 'val'], choices=('train', 'val'), help='splits to write (default: both)')
    add('-force', action='store_true', help='overwrite existing files')
    args = parser.parse_args(argv)
    args.folder = args.folder or args.data_path
    return args


def source_of(args: argparse.Namespace, split: str) -> Images:
    """Return the images of a split, with a class or a label map each."""
    config = get_config(None, ['DATA.DATASET', args.dataset, 'DATA.DATA_PATH', args.data_path])
    dataset = build_dataset(config, split)
    if not isinstance(dataset.storage, FileStorage):
        raise UserError(f'-dataset {args.dataset} does not consist of image files; only image files can be packed.')
    if not isinstance(dataset, (Dataset, SegmentationDataset)):
        raise UserError(
            f'-dataset {args.dataset} cannot be packed; only images with one class or one label map each can be.'
        )
    for note in dataset.notes:
        print(note, file=sys.stderr)
    return dataset


def refuse_existing(paths: Iterable[str], args: argparse.Namespace) -> None:
    for path in paths:
        if os.path.exists(path) and not args.force:
            raise UserError(f"'{path}' exists; -force overwrites it.")


def stored_file(storage: FileStorage, index: int) -> bytes:
    """Return the bytes of the file of an image or label map."""
    try:
        return storage.read(index)
    except UnreadableImage as error:
        raise UserError(
            f"cannot read '{storage.describe(index)}': {error}; repair it or remove it from the list."
        ) from None


def summary(target: str, dataset: Images) -> str:
    """Describe a written file in one line."""
    maps = ' with label maps' if isinstance(dataset, SegmentationDataset) else ''
    size = os.path.getsize(target) / 1e6
    return f'{target}: {len(dataset)} images{maps}, {dataset.num_classes} classes, {size:.1f} MB'
