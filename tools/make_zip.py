#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write train.zip, train_map.txt, val.zip and val_map.txt from list files, class folders, or other image files with a class or a
label map each.

    python tools/make_zip.py -data_path /dataset/imagenet -output /ssd/imagenet
    python main_single_gpu.py -dataset zip -data_path /ssd/imagenet -opts DATA.CACHE part
    python tools/make_zip.py -dataset ade20k -data_path /dataset/ADEChallengeData2016 -output /ssd/ade20k

Image files are stored uncompressed, and unchanged unless -max_side shrinks them. A zip file gets its name after each member
has been verified, then its map is written. So an interrupted run leaves only complete splits. datasets/zip.py describes the
format.
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
from datasets.bands import ARRAY
from datasets.dataset import FileStorage
from datasets.images import EXTENSIONS
from datasets.packed_maps import describe_maps
from datasets.segmentation import SegmentationDataset
from datasets.zip import MAPS, zip_paths
from tools._packing import parse, refuse_existing, source_of, stored_file, summary
from utils.cli import exit_status, run
from utils.errors import UserError
from utils.files import atomic_write

_DATE = (1980, 1, 1, 0, 0, 0)  # date of all members, so that equal images give equal files


def main(argv: list[str] | None = None) -> int | None:
    args = parse(__doc__, argv)
    targets = {split: zip_paths(args.folder, split) for split in args.split}
    refuse_existing((path for paths in targets.values() for path in paths), args)
    try:
        for split, (archive, listing) in targets.items():
            write_part(source_of(args, split), archive, listing)
    except KeyboardInterrupt as error:
        print('interrupted; the unfinished file is removed.', file=sys.stderr)
        return exit_status(error)


def write_part(dataset: Images, archive: str, listing: str) -> None:
    """Write `archive`, then `listing`. The old map is removed before the new archive appears, so that they never disagree."""
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
    """Return the names of all files in the archive."""
    return [member_name(storage, index) for index in range(len(storage))]


def member_name(storage: FileStorage, index: int) -> str:
    """Return the name of a file in the archive: its path in the data set."""
    path = storage.describe(index)
    name = os.path.relpath(path, storage.root).replace(os.sep, '/')
    if '\t' in name or len(name.splitlines()) != 1:
        raise UserError(f'{path!r} has a tab or a line break in its name; rename it.')
    if not name.lower().endswith((*EXTENSIONS, ARRAY)):
        raise UserError(f"'{path}' is not an image by its name ({' '.join(EXTENSIONS)}); rename or unlist it.")
    try:
        name.encode('utf-8')
    except UnicodeEncodeError:
        raise UserError(f'{path!r} is not UTF-8, which names in a zip file must be; rename it.') from None
    return name


def write_members(file: IO[bytes], dataset: Images, names: list[list[str]], archive: str) -> None:
    """Store each file once, even if it is listed several times; the description of label maps comes first."""
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
    """Return storage and name of the image `index`, and of its label map."""
    return zip(dataset.storages, (column[index] for column in names))


def verify(file: IO[bytes], dataset: Images, names: list[list[str]], archive: str) -> None:
    """Compare each member on disk with its file."""
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
                        f"'{name}' in '{archive}' differs from its image file; check the disk and try again."
                    )


if __name__ == '__main__':
    run(main)
