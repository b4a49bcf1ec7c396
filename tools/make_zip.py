#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes train.zip, train_map.txt, val.zip and val_map.txt from list files, a folder per class, or other image files
with a class or a label map each.

    python tools/make_zip.py -data_path /dataset/imagenet -output /ssd/imagenet
    python main_single_gpu.py -dataset zip -data_path /ssd/imagenet -opts DATA.CACHE part
    python tools/make_zip.py -dataset ade20k -data_path /dataset/ADEChallengeData2016 -output /ssd/ade20k

Image files are stored as they are, uncompressed. A zip file takes its name when each of its members has been read back, its map
after that: interrupted, the tool leaves nothing, or complete parts. datasets/zip.py describes the format.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start(paddle=False)

import contextlib
import os
import sys
import zipfile
from collections.abc import Iterator
from typing import IO

from tqdm import tqdm

from datasets import Dataset, Images
from datasets.dataset import FileStorage
from datasets.images import EXTENSIONS
from datasets.packed_maps import describe_maps
from datasets.segmentation import SegmentationDataset
from datasets.zip import MAPS, zip_paths
from tools._packing import parse, refuse_existing, source_of, stored_file, summary
from utils.cli import exit_status, run
from utils.errors import UserError
from utils.files import atomic_write

_DATE = (1980, 1, 1, 0, 0, 0)  # of all members, so that equal images make equal files


def main(argv: list[str] | None = None) -> int | None:
    args = parse(__doc__, argv)
    targets = {split: zip_paths(args.folder, split) for split in args.split}
    refuse_existing((path for paths in targets.values() for path in paths), args)
    try:
        for split, (archive, listing) in targets.items():
            write_part(source_of(args, split), archive, listing)
    except KeyboardInterrupt as error:
        print('interrupted; the part that was being written is gone.', file=sys.stderr)
        return exit_status(error)


def write_part(dataset: Images, archive: str, listing: str) -> None:
    """Writes `archive`, then `listing`; in between neither is there, so that no map meets an archive it was not made for."""
    names = [member_names(storage) for storage in dataset.storages]
    labels = dataset.labels.tolist() if isinstance(dataset, Dataset) else names[1]
    with atomic_write(archive, 'w+b') as file:
        write_members(file, dataset, names, archive)
        verify(file, dataset, names, archive)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(listing)
    with atomic_write(listing) as file:
        file.writelines(os.fsencode(f'{name}\t{label}\n') for name, label in zip(names[0], labels))
    print(summary(archive, dataset))


def member_names(storage: FileStorage) -> list[str]:
    """What files are called in the archive: their paths as the data set lists them."""
    return [member_name(storage, index) for index in range(len(storage))]


def member_name(storage: FileStorage, index: int) -> str:
    """What a file is called in the archive."""
    path = storage.describe(index)
    name = os.path.relpath(path, storage.root).replace(os.sep, '/')
    if '\t' in name or len(name.splitlines()) != 1:
        raise UserError(f'{path!r} has a tabulator or a line break in its name; rename it.')
    if not name.lower().endswith(EXTENSIONS):
        raise UserError(f"'{path}' is not an image by its name ({' '.join(EXTENSIONS)}); rename or unlist it.")
    try:
        name.encode('utf-8')
    except UnicodeEncodeError:
        raise UserError(f'{path!r} is not UTF-8, which names in a zip file must be; rename it.') from None
    return name


def write_members(file: IO[bytes], dataset: Images, names: list[list[str]], archive: str) -> None:
    """Stores each file once, also where it is listed several times; the description of label maps comes first."""
    seen = set()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as target:
        if isinstance(dataset, SegmentationDataset):
            target.writestr(zipfile.ZipInfo(MAPS, _DATE), describe_maps(dataset))
        for index in tqdm(range(len(dataset)), archive, unit='image', disable=None):
            for storage, name in files_of(dataset, names, index):
                if name not in seen:
                    seen.add(name)
                    target.writestr(zipfile.ZipInfo(name, _DATE), stored_file(storage, index))


def files_of(dataset: Images, names: list[list[str]], index: int) -> Iterator[tuple[FileStorage, str]]:
    """Storage and name of the image `index`, and of its label map."""
    return zip(dataset.storages, (column[index] for column in names))


def verify(file: IO[bytes], dataset: Images, names: list[list[str]], archive: str) -> None:
    """Compares each member as it is on disk with its file."""
    file.flush()
    with zipfile.ZipFile(file) as written:
        for index in tqdm(range(len(dataset)), f'verifying {archive}', unit='image', disable=None):
            for storage, name in files_of(dataset, names, index):
                try:
                    same = written.read(name) == stored_file(storage, index)
                except (OSError, zipfile.BadZipFile, KeyError):
                    same = False
                if not same:
                    raise UserError(
                        f"'{name}' came back from '{archive}' differently than it was written; is the disk sound?"
                    )


if __name__ == '__main__':
    run(main)
