# SPDX-License-Identifier: Apache-2.0
"""Shared code of the tools that pack image files into a few large files."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterable

from PIL import ExifTags, Image

from config import get_config
from datasets import Dataset, Images, build_dataset
from datasets.augment import BICUBIC
from datasets.dataset import FileStorage
from datasets.images import UnreadableImage, loaded, to_rgb
from datasets.segmentation import SegmentationDataset
from tools._output import add_output_folder
from utils.errors import UserError

_ORIENTATION = ExifTags.Base.Orientation


def parse(description: str, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add('-data_path', metavar='DIR', required=True, help='folder of the data, see docs/data.md')
    add_output_folder(parser, 'to write to (default: -data_path)')
    add('-dataset', default='imagenet2012', metavar='NAME', help='any data set of image files (default: imagenet2012)')
    add('-split', nargs='+', default=['train', 'val'], choices=('train', 'val'), help='splits to write (default: both)')
    add(
        '-max_side',
        type=int,
        metavar='N',
        help='shrink larger images to N pixels on their longer side (default: unchanged)',
    )
    add('-force', action='store_true', help='overwrite existing files')
    args = parser.parse_args(argv)
    args.folder = args.folder or args.data_path
    if args.max_side is not None and args.max_side < 1:
        raise UserError(f'-max_side is {args.max_side}, but must be at least 1.')
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
    if args.max_side is not None:
        if isinstance(dataset, SegmentationDataset):
            raise UserError('-max_side does not shrink label maps; leave it out to pack images with label maps.')
        return dataset.with_storages(lambda files: ShrunkFiles(files, args.max_side))
    return dataset


class ShrunkFiles(FileStorage):
    """Image files of which those above `max_side` pixels on their longer side are shrunk, with an antialiased bicubic filter.

    JPEG files stay JPEG files (quality 95), others become PNG files. The EXIF orientation is kept.
    """

    def __init__(self, files: FileStorage, max_side: int):
        self.root = files.root
        self.max_side = max_side
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def describe(self, index: int) -> str:
        return self._files.describe(index)

    def read(self, index: int) -> bytes:
        return shrunk(self._files.read(index), self.max_side)


def shrunk(data: bytes, max_side: int) -> bytes:
    """Return an image file of at most `max_side` pixels on its longer side; smaller ones are returned unchanged.

    Raises:
        UnreadableImage: the file is damaged or no image.
    """
    with loaded(data) as image:
        longer = max(image.size)
        if longer <= max_side:
            return data
        size = tuple(max(1, round(side * max_side / longer)) for side in image.size)
        picture, exif = _resizable(image), Image.Exif()
        if _ORIENTATION in image.getexif():
            exif[_ORIENTATION] = image.getexif()[_ORIENTATION]
        options = {'format': 'JPEG', 'quality': 95} if image.format in ('JPEG', 'MPO') else {'format': 'PNG'}
        stream = io.BytesIO()
        picture.resize(size, BICUBIC).save(stream, exif=exif, **options)
        return stream.getvalue()


def _resizable(image: Image.Image) -> Image.Image:
    """Convert modes that Pillow does not resize with a filter (palettes, bits, 16 bits) to those that images are read as."""
    return image if image.mode in ('L', 'RGB', 'CMYK') else to_rgb(image)


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
