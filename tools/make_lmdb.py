#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write train.lmdb and val.lmdb from list files, class folders, or any other data set of image files.

    python tools/make_lmdb.py -data_path /dataset/imagenet -output /ssd/imagenet
    python main_single_gpu.py -dataset lmdb -data_path /ssd/imagenet ...

Image files are stored unchanged. An interrupted run continues where it stopped. A file gets its name only after each record
has been verified. datasets/lmdb.py describes the format.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start(paddle=False)

import bisect
import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator

from tqdm import tqdm

from datasets import Dataset
from datasets.lmdb import (
    CLASSES_KEY,
    FORMAT,
    FORMAT_KEY,
    LABELS_KEY,
    lmdb_module,
    pack_record,
    record_key,
    unpack_record,
)
from tools._packing import image_file, parse, refuse_existing, source_of
from utils.cli import exit_status, run
from utils.errors import UserError
from utils.files import writing

_SOURCE_KEY = b'__source__'  # fingerprint of the data set; a run continues only with the same one
_CHUNK = 256  # images per transaction
_FIRST_SIZE = 1 << 30  # initial map size; it grows with the data


def main(argv: list[str] | None = None) -> int | None:
    args = parse(__doc__, argv)
    targets = {split: os.path.join(args.folder, f'{split}.lmdb') for split in args.split}
    refuse_existing(targets.values(), args)
    try:
        for split, target in targets.items():
            dataset = source_of(args, split)
            with writing(target):
                write_lmdb(dataset, target)
    except KeyboardInterrupt as error:
        print('interrupted; the same command continues.', file=sys.stderr)
        return exit_status(error)
    except lmdb_module().Error as error:
        raise UserError(f"cannot write '{target}': {error}; fix this, then the same command continues.") from None


def write_lmdb(dataset: Dataset, target: str) -> None:
    """Write `target` through `target`.partial, which may hold the records of an interrupted run."""
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    partial = target + '.partial'
    with partial_file(partial, fingerprint(dataset)) as environment:
        fill(environment, dataset, target)
        verify(environment, dataset, target)
        finish(environment, dataset)
    os.replace(partial, target)
    print(f'{target}: {len(dataset)} images, {dataset.num_classes} classes, {os.path.getsize(target) / 1e6:.1f} MB')


def fingerprint(dataset: Dataset) -> bytes:
    """Return a hash of the images, their labels and their order."""
    digest = hashlib.sha256(dataset.labels.tobytes())
    for index in range(len(dataset)):
        digest.update(os.fsencode(dataset.describe(index)) + b'\0')
    return digest.digest()


@contextlib.contextmanager
def partial_file(path: str, source: bytes) -> Iterator:
    """Open and lock an unfinished file for writing. A file from another source is cleared."""
    lmdb = lmdb_module()
    with open(path, 'ab') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"'{path}' is being written by another process.") from None
        if not _continues(path, source):
            os.truncate(path, 0)
        size = max(_FIRST_SIZE, os.path.getsize(path))
        with lmdb.open(os.fsencode(path), map_size=size, subdir=False, lock=False) as environment:
            with environment.begin(write=True) as transaction:
                transaction.put(_SOURCE_KEY, source)
            yield environment


def _continues(path: str, source: bytes) -> bool:
    lmdb = lmdb_module()
    try:
        with lmdb.open(os.fsencode(path), subdir=False, readonly=True, lock=False, create=False) as environment:
            complete = (environment.info()['last_pgno'] + 1) * environment.stat()['psize'] <= os.path.getsize(path)
            with environment.begin() as transaction:
                return complete and transaction.get(_SOURCE_KEY) == source
    except lmdb.Error:
        return False


def fill(environment, dataset: Dataset, target: str) -> None:
    """Store the missing images. Transactions are in order, so the missing images are the last ones."""
    with environment.begin() as transaction:
        missing = _Missing(transaction, len(dataset))
        start = bisect.bisect_left(missing, True)
    if start:
        print(f'{target}: continues after {start} images')
    with tqdm(total=len(dataset), initial=start, desc=target, unit='image', disable=None) as bar:
        for begin in range(start, len(dataset), _CHUNK):
            chunk = range(begin, min(begin + _CHUNK, len(dataset)))
            put_all(environment, [(record_key(index), record_of(dataset, index)) for index in chunk])
            bar.update(len(chunk))


class _Missing:
    """A sequence for bisection: True for each image that is not stored yet."""

    def __init__(self, transaction, length: int):
        self._transaction = transaction
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> bool:
        return self._transaction.get(record_key(index)) is None


def record_of(dataset: Dataset, index: int) -> bytes:
    return pack_record(image_file(dataset, index), int(dataset.labels[index]))


def put_all(environment, items: list[tuple[bytes, bytes]]) -> None:
    """Store all items or none; the map grows as needed."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value)
            return
        except lmdb_module().MapFullError:
            environment.set_mapsize(2 * environment.info()['map_size'])


def verify(environment, dataset: Dataset, target: str) -> None:
    """Read every record back and check it."""
    with environment.begin() as transaction:
        for index in tqdm(range(len(dataset)), desc=f'verifying {target}', unit='image', disable=None):
            try:
                _, label = unpack_record(transaction.get(record_key(index)) or b'')
            except ValueError as error:
                raise UserError(
                    f"'{target}.partial', record {index}: {error}; delete that file and try again."
                ) from None
            if label != dataset.labels[index]:
                raise UserError(
                    f"'{target}.partial', record {index} has another label; delete that file and try again."
                )


def finish(environment, dataset: Dataset) -> None:
    """Store the labels and the format key, without which a file is not readable."""
    items = [(LABELS_KEY, dataset.labels.astype('<i4').tobytes()), (FORMAT_KEY, FORMAT)]
    if dataset.class_names is not None:
        items.append((CLASSES_KEY, json.dumps(dataset.class_names).encode()))
    put_all(environment, items)
    environment.sync(True)


if __name__ == '__main__':
    run(main)
