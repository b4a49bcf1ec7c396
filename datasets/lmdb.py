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
from datasets.images import UnreadableImage
from datasets.lmdb_file import CutOffError, LmdbFile
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
        close_file(path)
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


# Open files of this process by real path. Worker processes inherit them.
_OPEN: dict[str, LmdbFile] = {}


def read_value(path: str, key: bytes) -> bytes | None:
    """Return the value of a key, None if it is missing; open the file if this process has not.

    Raises:
        UnreadableImage: the file is damaged.
        UserError: the file cannot be opened, or was cut off since.
    """
    real = os.path.realpath(path)
    file = _OPEN.get(real)
    if file is None:
        file = _OPEN[real] = open_file(path)
    try:
        return file.get(key)
    except CutOffError as error:
        raise _cut_off(path, error) from None
    except ValueError as error:
        raise UnreadableImage(str(error)) from None
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from None


def open_file(path: str) -> LmdbFile:
    """Open an LMDB file. Raises UserError if it is missing, cut off, or another file."""
    try:
        return LmdbFile(path)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist; `python tools/make_lmdb.py` writes it.") from None
    except CutOffError as error:
        raise _cut_off(path, error) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f"'{path}' is not an LMDB file: {reason}.") from None


def _cut_off(path: str, error: CutOffError) -> UserError:
    return UserError(f"'{path}' is cut off: it has {error.size} bytes of {error.needed}; copy or write it again.")


def _entries(path: str) -> int:
    """Number of values in a file that is open."""
    return _OPEN[os.path.realpath(path)].entries


def close_file(path: str) -> None:
    """Close a file in this process; the next `read_value` opens it again."""
    file = _OPEN.pop(os.path.realpath(path), None)
    if file is not None:
        file.close()


def lmdb_module():
    """Import the lmdb package, which writes these files; reading needs no package."""
    try:
        import lmdb
    except ImportError:
        raise UserError('writing LMDB files needs the lmdb package: pip install lmdb.') from None
    return lmdb
