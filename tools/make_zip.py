#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write train.zip, train_map.txt, val.zip and val_map.txt from list files, class folders, or other image files.

    python tools/make_zip.py -data_path /dataset/imagenet -output /ssd/imagenet
    python main_single_gpu.py -dataset zip -data_path /ssd/imagenet -opts DATA.CACHE part

Image files are stored unchanged and uncompressed. A zip file gets its name after each member has been verified, then its map
is written. So an interrupted run leaves only complete splits. datasets/zip.py describes the format.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start(paddle=False)

import contextlib
import os
import sys
import zipfile
from typing import IO

from tqdm import tqdm

from datasets import Dataset
from datasets.images import EXTENSIONS
from datasets.zip import zip_paths
from tools._packing import image_file, parse, refuse_existing, source_of
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


def write_part(dataset: Dataset, archive: str, listing: str) -> None:
    """Write `archive`, then `listing`. The old map is removed before the new archive appears, so that they never disagree."""
    names = [member_name(dataset, index) for index in range(len(dataset))]
    with atomic_write(archive, 'w+b') as file:
        write_members(file, dataset, names, archive)
        verify(file, dataset, names, archive)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(listing)
    with atomic_write(listing) as file:
        file.writelines(os.fsencode(f'{name}\t{label}\n') for name, label in zip(names, dataset.labels.tolist()))
    print(f'{archive}: {len(dataset)} images, {dataset.num_classes} classes, {os.path.getsize(archive) / 1e6:.1f} MB')


def member_name(dataset: Dataset, index: int) -> str:
    """Return the name of an image in the archive: its path in the data set."""
    path = dataset.describe(index)
    name = os.path.relpath(path, dataset.storage.root).replace(os.sep, '/')
    if '\t' in name or len(name.splitlines()) != 1:
        raise UserError(f'{path!r} has a tab or a line break in its name; rename it.')
    if not name.lower().endswith(EXTENSIONS):
        raise UserError(f"'{path}' is not an image by its name ({' '.join(EXTENSIONS)}); rename or unlist it.")
    try:
        name.encode('utf-8')
    except UnicodeEncodeError:
        raise UserError(f'{path!r} is not UTF-8, which names in a zip file must be; rename it.') from None
    return name


def write_members(file: IO[bytes], dataset: Dataset, names: list[str], archive: str) -> None:
    """Store each image once, even if it is listed several times."""
    seen = set()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as target:
        for index, name in enumerate(tqdm(names, archive, unit='image', disable=None)):
            if name not in seen:
                seen.add(name)
                target.writestr(zipfile.ZipInfo(name, _DATE), image_file(dataset, index))


def verify(file: IO[bytes], dataset: Dataset, names: list[str], archive: str) -> None:
    """Compare each member on disk with its image file."""
    file.flush()
    with zipfile.ZipFile(file) as written:
        for index, name in enumerate(tqdm(names, f'verifying {archive}', unit='image', disable=None)):
            try:
                same = written.read(name) == image_file(dataset, index)
            except (OSError, zipfile.BadZipFile, KeyError):
                same = False
            if not same:
                raise UserError(f"'{name}' in '{archive}' differs from its image file; check the disk and try again.")


if __name__ == '__main__':
    run(main)
