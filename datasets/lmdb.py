# SPDX-License-Identifier: Apache-2.0
"""Images in one LMDB file per split, for storage that is slow with a million small files.

The files are `DATA_PATH/train.lmdb` and `DATA_PATH/val.lmdb`. Their keys decide between three formats:

LeanViT's format, written by tools/make_lmdb.py; numbers are little-endian:
    __format__      b'leanvit-lmdb-1'
    __labels__      a label per image, int32
    __classes__     class names as a JSON list; absent if classes have no names
    0, 1, ...       (decimal) label int32, CRC-32 of the image uint32, the image file

LeanViT's format with label maps, of the same tool:
    __format__      b'leanvit-lmdb-maps-1'
    __count__       number of images, decimal
    __label_maps__  what the values of the maps mean, see datasets/packed_maps.py
    0, 1, ...       as above, with label 0
    map/0, ...      the same for the label map files

The format of pyarrow's serialize(), as in EViT (https://github.com/youweiliang/evit) and other codes:
    __len__         number of images
    0, 1, ...       (image file, label)
It stores labels with the images. They are collected once and saved beside the file as `train.lmdb.labels.npy`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from datasets.arrow import deserialize
from datasets.classes import ClassTable
from datasets.dataset import Dataset, EncodedStorage, Images
from datasets.folder import data_path
from datasets.images import MAX_FILE, UnreadableImage
from datasets.packed_maps import packed_dataset, read_description
from datasets.registry import register_dataset
from utils.errors import UserError
from utils.files import atomic_write, read_regular
from utils.formats.array_files import check_header
from utils.text import NAME, printable

FORMAT_KEY, FORMAT = b'__format__', b'leanvit-lmdb-1'
LABELS_KEY, CLASSES_KEY = b'__labels__', b'__classes__'
MAPS_FORMAT, COUNT_KEY, MAPS_KEY = b'leanvit-lmdb-maps-1', b'__count__', b'__label_maps__'
_HEAD = struct.Struct('<iI')
MAX_CLASSES = 64 << 20  # bytes of all class names; a million names
_HEADER = 4096  # bytes of the head of a .npy file, at most


@register_dataset('lmdb')
def build_lmdb(config, split: str) -> Images:
    """LMDB file `DATA_PATH/<split>.lmdb` in any of the formats."""
    path = os.path.join(data_path(config), f'{split}.lmdb')
    try:
        marker = read_value(path, FORMAT_KEY)
        if marker == FORMAT:
            return _own(path)
        if marker == MAPS_FORMAT:
            return _with_maps(config, path)
        if marker is None and read_value(path, b'__len__') is not None:
            return _upstream(path)
    except (UnreadableImage, ValueError) as error:
        raise UserError(f"'{path}' is damaged: {error}.") from None
    finally:
        close_file(path)  # each worker opens its own
    kind = (
        'is not complete'
        if marker is None
        else f'has the unknown format {printable(marker.decode(errors="replace"), NAME)}'
    )
    raise UserError(f"'{path}' {kind}; `python tools/make_lmdb.py` writes it again.")


def _own(path: str) -> Dataset:
    labels = np.frombuffer(read_value(path, LABELS_KEY) or b'', '<i4')
    if len(labels) > _entries(path):
        raise ValueError(f'it has {len(labels)} labels, but {_entries(path)} records')
    storage = LmdbStorage(path, len(labels), unpack_record)
    return Dataset(storage, labels, f"'{path}'", _class_names(read_value(path, CLASSES_KEY)))


def _class_names(stored: bytes | None) -> Any:
    if stored is None:
        return None
    if len(stored) > MAX_CLASSES:
        raise ValueError('its class names are too long')
    try:
        return json.loads(stored)
    except RecursionError:
        raise ValueError('its class names are nested') from None


def _with_maps(config, path: str) -> Images:
    count = int(read_value(path, COUNT_KEY) or b'0')
    if not 0 <= count < _entries(path):
        raise ValueError(f'it has {_entries(path)} records for {count} images')
    images, maps = (LmdbStorage(path, count, unpack_record, key) for key in (record_key, map_key))
    return packed_dataset(config, images, maps, path, read_value(path, MAPS_KEY) or b'')


def packed_classes(root: str) -> ClassTable | None:
    """Return the classes of an LMDB file in `root`; None if no file has label maps."""
    for path in (os.path.join(root, f'{split}.lmdb') for split in ('train', 'val')):
        with contextlib.suppress(UnreadableImage):
            description = read_value(path, MAPS_KEY) if os.path.isfile(path) else None
            close_file(path)
            if description is not None:
                return read_description(description, path)[0]
    return None


def _upstream(path: str) -> Dataset:
    length, records = deserialize(read_value(path, b'__len__')), _entries(path)
    if not isinstance(length, int) or not 0 <= length < records:
        raise ValueError(f'its length is {printable(repr(length), NAME)}, but it has {records} records')
    storage = LmdbStorage(path, length, _unpack_upstream)
    return Dataset(storage, _upstream_labels(storage), f"'{path}'")


def _upstream_labels(storage: LmdbStorage) -> np.ndarray:
    kept = storage.path + '.labels.npy'
    with contextlib.suppress(OSError, ValueError, EOFError, KeyError):
        if os.path.getmtime(kept) >= os.path.getmtime(storage.path):
            data = io.BytesIO(read_regular(kept, _HEADER + len(storage) * np.dtype(np.int64).itemsize))
            check_header(data, len(data.getbuffer()))
            data.seek(0)
            labels = np.load(data)
            if labels.shape == (len(storage),) and labels.dtype.kind == 'i':
                return labels
    numbers = tqdm(range(len(storage)), desc=f'labels of {storage.path}', disable=None)
    labels = np.array([storage.record(number)[1] for number in numbers], np.int64)
    with contextlib.suppress(UserError), atomic_write(kept) as file:  # optional: the folder may be read-only
        np.save(file, labels)
    return labels


# ---------------------------------------------------------------------------------------------------- records
def pack_record(image: bytes, label: int) -> bytes:
    """Return the record of an image file in LeanViT's format."""
    return _HEAD.pack(label, zlib.crc32(image)) + image


def unpack_record(record: bytes) -> tuple[bytes, int]:
    """Return image file and label. Raises ValueError if the checksum does not match."""
    if len(record) < _HEAD.size:
        raise ValueError('the record is cut off')
    label, checksum = _HEAD.unpack_from(record)
    image = record[_HEAD.size :]
    if zlib.crc32(image) != checksum:
        raise ValueError('the record does not match its checksum')
    return image, label


def _unpack_upstream(record: bytes) -> tuple[bytes, int]:
    value = deserialize(record)
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], bytes) and isinstance(value[1], int)):
        raise ValueError('the record is not an (image, label) pair')
    return value[0], value[1]


def record_key(index: int) -> bytes:
    """Return the key of an image."""
    return str(index).encode()


def map_key(index: int) -> bytes:
    """Return the key of a label map."""
    return b'map/' + record_key(index)


# ---------------------------------------------------------------------------------------------------- reading
class LmdbStorage(EncodedStorage):
    """Image files in an LMDB file.

    Args:
        unpack: converts a record to (image file, label) or raises ValueError.
        key: of a record, by its index.
    """

    def __init__(
        self,
        path: str,
        length: int,
        unpack: Callable[[bytes], tuple[bytes, int]],
        key: Callable[[int], bytes] = record_key,
    ):
        self.path = path
        self._key = key
        self._length = length
        self._unpack = unpack

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> bytes:
        return self.record(index)[0]

    def record(self, index: int) -> tuple[bytes, int]:
        """Return image file and label of an item. Raises UnreadableImage."""
        key = self._key(index)
        record = read_value(self.path, key)
        if record is None:
            raise UnreadableImage(f'there is no record {key.decode()}')
        try:
            return self._unpack(record)
        except ValueError as error:
            raise UnreadableImage(f'record {key.decode()}: {error}') from None

    def describe(self, index: int) -> str:
        return f'{self.path}, key {self._key(index).decode()}'


@dataclasses.dataclass
class _Opened:
    """An open file.

    Attributes:
        process: that opened it.
        environment: lmdb.Environment, a memory map.
        handle: of the file, to check its size.
        size: bytes that the memory map needs.
    """

    process: int
    environment: Any
    handle: int
    size: int


# Open files of this process by real path, since LMDB may open each only once.
_OPEN: dict[str, _Opened] = {}


def read_value(path: str, key: bytes) -> bytes | None:
    """Return the value of a key, None if it is missing; open the file if this process has not.

    Raises:
        UnreadableImage: the file is damaged.
        UserError: the file cannot be opened, or was cut off since.
    """
    opened = _OPEN.get(os.path.realpath(path))
    if opened is None or opened.process != os.getpid():
        close_file(path)  # an environment must not be used after a fork; closing it does not affect the parent
        environment, size = _open(path)
        opened = _Opened(os.getpid(), environment, os.open(path, os.O_RDONLY | os.O_CLOEXEC), size)
        _OPEN[os.path.realpath(path)] = opened
    _check_size(path, os.fstat(opened.handle).st_size, opened.size)  # reading the memory map would end this process
    try:
        with opened.environment.begin(buffers=True) as transaction:
            return _copied(transaction.get(key))
    except lmdb_module().Error as error:
        raise UnreadableImage(str(error)) from None


def _check_size(path: str, size: int, needed: int) -> None:
    if size < needed:
        raise UserError(f"'{path}' is cut off: it has {size} bytes of {needed}; copy or write it again.")


def _copied(value: memoryview | None) -> bytes | None:
    """A value of the file, whose length a damaged file may state as anything."""
    if value is not None and len(value) > MAX_FILE:
        raise UnreadableImage(f'a value of {len(value)} bytes, more than the {MAX_FILE} that are read')
    return None if value is None else bytes(value)


def _entries(path: str) -> int:
    """Number of values in a file that is open."""
    return _OPEN[os.path.realpath(path)].environment.stat()['entries']


def close_file(path: str) -> None:
    """Close a file in this process; the next `read_value` opens it again."""
    opened = _OPEN.pop(os.path.realpath(path), None)
    if opened is not None:
        opened.environment.close()
        os.close(opened.handle)


def open_readonly(path: str):
    """Open an lmdb.Environment without lock and read-ahead.

    Raises:
        UserError: the file is missing, no LMDB file, or truncated (LMDB itself would crash on it).
    """
    return _open(path)[0]


def _open(path: str) -> tuple[Any, int]:
    """Return the environment of `open_readonly`, and the number of bytes that it needs."""
    lmdb = lmdb_module()
    if not os.path.isfile(path):
        raise UserError(f"'{path}' does not exist; `python tools/make_lmdb.py` writes it.")
    try:
        environment = lmdb.open(
            os.fsencode(path), subdir=False, readonly=True, lock=False, readahead=False, create=False
        )
    except lmdb.Error as error:
        raise UserError(f"'{path}' is not an LMDB file: {error}.") from None
    needed = (environment.info()['last_pgno'] + 1) * environment.stat()['psize']
    try:
        _check_size(path, os.path.getsize(path), needed)
    except UserError:
        environment.close()
        raise
    return environment, needed


def lmdb_module():
    """Import the lmdb package, which only these data need."""
    try:
        import lmdb
    except ImportError:
        raise UserError('LMDB data need the lmdb package: pip install lmdb.') from None
    return lmdb
