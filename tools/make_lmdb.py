#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write train.lmdb and val.lmdb from list files, class folders, or any other data set of image files with a class or a label map
each.

    python tools/make_lmdb.py -data_path /dataset/imagenet -output /ssd/imagenet
    python main_single_gpu.py -dataset lmdb -data_path /ssd/imagenet ...
    python tools/make_lmdb.py -dataset ade20k -data_path /dataset/ADEChallengeData2016 -output /ssd/ade20k

Image files are stored unchanged, unless -max_side shrinks them. An interrupted run continues where it stopped. A file gets
its name only after each record has been verified. datasets/lmdb.py describes the format.
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

from datasets import Dataset, Images
from datasets.lmdb import (
    CLASSES_KEY,
    COUNT_KEY,
    FORMAT,
    FORMAT_KEY,
    LABELS_KEY,
    MAPS_FORMAT,
    MAPS_KEY,
    lmdb_module,
    map_key,
    pack_record,
    record_key,
    unpack_record,
)
from datasets.packed_maps import describe_maps
from tools._packing import ShrunkFiles, parse, refuse_existing, source_of, stored_file, summary
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


def write_lmdb(dataset: Images, target: str) -> None:
    """Write `target` through `target`.partial, which may hold the records of an interrupted run."""
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    partial = target + '.partial'
    with partial_file(partial, fingerprint(dataset)) as environment:
        fill(environment, dataset, target)
        verify(environment, dataset, target)
        finish(environment, dataset)
    os.replace(partial, target)
    print(summary(target, dataset))


def fingerprint(dataset: Images) -> bytes:
    """Return a hash of the images, their labels, their order and their largest side."""
    content = dataset.labels.tobytes() if isinstance(dataset, Dataset) else describe_maps(dataset)
    digest = hashlib.sha256(content)
    for storage in dataset.storages:
        if isinstance(storage, ShrunkFiles):
            digest.update(b'max_side %d' % storage.max_side)
        for index in range(len(storage)):
            digest.update(os.fsencode(storage.describe(index)) + b'\0')
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


def fill(environment, dataset: Images, target: str) -> None:
    """Store the missing images. Transactions are in order, so the missing images are the last ones."""
    with environment.begin() as transaction:
        missing = _Missing(transaction, len(dataset))
        start = bisect.bisect_left(missing, True)
    if start:
        print(f'{target}: continues after {start} images')
    with tqdm(total=len(dataset), initial=start, desc=target, unit='image', disable=None) as bar:
        for begin in range(start, len(dataset), _CHUNK):
            chunk = range(begin, min(begin + _CHUNK, len(dataset)))
            put_all(environment, [record for index in chunk for record in records_of(dataset, index)])
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


def records_of(dataset: Images, index: int) -> list[tuple[bytes, bytes]]:
    """Return keys and values of an image and of its label map."""
    label = label_of(dataset, index)
    return [
        (key(index), pack_record(stored_file(storage, index), label))
        for key, storage in zip((record_key, map_key), dataset.storages)
    ]


def label_of(dataset: Images, index: int) -> int:
    """Return the class of an image; 0 if it has a label map."""
    return int(dataset.labels[index]) if isinstance(dataset, Dataset) else 0


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


def verify(environment, dataset: Images, target: str) -> None:
    """Read every record back and check it."""
    keys = (record_key, map_key)[: len(dataset.storages)]
    with environment.begin() as transaction:
        for index in tqdm(range(len(dataset)), desc=f'verifying {target}', unit='image', disable=None):
            for key in (key(index) for key in keys):
                try:
                    _, label = unpack_record(transaction.get(key) or b'')
                except ValueError as error:
                    raise _wrong_record(target, key, str(error)) from None
                if label != label_of(dataset, index):
                    raise _wrong_record(target, key, 'it has another label')


def _wrong_record(target: str, key: bytes, reason: str) -> UserError:
    return UserError(f"'{target}.partial', record {key.decode()}: {reason}; delete that file and try again.")


def finish(environment, dataset: Images) -> None:
    """Store what describes the images and the format key, without which a file is not readable."""
    if isinstance(dataset, Dataset):
        items = [(LABELS_KEY, dataset.labels.astype('<i4').tobytes()), (FORMAT_KEY, FORMAT)]
        if dataset.class_names is not None:
            items.append((CLASSES_KEY, json.dumps(dataset.class_names).encode()))
    else:
        count = str(len(dataset)).encode()
        items = [(COUNT_KEY, count), (MAPS_KEY, describe_maps(dataset)), (FORMAT_KEY, MAPS_FORMAT)]
    put_all(environment, items)
    environment.sync(True)


if __name__ == '__main__':
    run(main)
