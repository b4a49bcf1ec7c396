# SPDX-License-Identifier: Apache-2.0
"""Checksums at the end of the .pdparams files of this suite. Pickle readers, `paddle.load` too, stop before them.

Layout: the pickle, a JSON object {"file": CRC-32 of the pickle, "arrays": {name: CRC-32}}, its length as uint32, `MAGIC`.
A file without them is accepted: earlier versions and Paddle write none.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

MAGIC = b'LeanViT-CRC-32-1'
_OPENING = b'{"file": '  # of the JSON object
_LENGTH = struct.Struct('<I')
_LISTED = 3  # names in a message
MAX_TRAILER = 8 << 20  # bytes of the JSON object; 60 for each of the thousands of arrays of a checkpoint
MAX_PATH = 1000  # characters of the keys that lead to an array; arrays below have no checksum of their own


class SummedFile:
    """Write to a file and compute the CRC-32 of what is written."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.checksum = 0

    def write(self, data: Any) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self._file.write(data)


def trailer(content: Any, checksum: int) -> bytes:
    """Return what follows the pickle of `content`, whose CRC-32 is `checksum`."""
    arrays = {name: _checksum(array) for name, array in _arrays(content)}
    text = json.dumps({'file': checksum, 'arrays': arrays}).encode()
    return text + _LENGTH.pack(len(text)) + MAGIC


def verify(stream: mmap.mmap, content: Any) -> None:
    """Compare a file with its checksums, if it has some.

    Args:
        stream: the file, read up to the end of the pickle.
        content: what the pickle holds.

    Raises:
        ValueError: a difference; the text names the arrays.
    """
    end, size, tail = stream.tell(), len(stream), _LENGTH.size + len(MAGIC)
    start, last = stream[end : end + len(_OPENING)], stream[max(end, size - tail) : size]
    if not last.endswith(MAGIC):
        if start and (start == _OPENING or _OPENING.startswith(start)):
            raise ValueError('its checksums are cut short')
        return
    length = size - end - tail
    if not 0 <= length <= MAX_TRAILER or _LENGTH.unpack_from(last)[0] != length:
        raise ValueError('its checksums are damaged')
    stored = json.loads(stream[end : end + length])
    with memoryview(stream) as view, view[:end] as pickled:
        if zlib.crc32(pickled) == stored['file']:
            return
    checksums: dict[int, int] = {}  # an array may have many names
    sums, found = stored['arrays'], {}
    for name, array in _arrays(content):
        if name in sums:  # shared containers can give an array a million names
            if id(array) not in checksums:
                checksums[id(array)] = _checksum(array)
            found[name] = checksums[id(array)]
    wrong = [name for name, checksum in sums.items() if found.get(name) != checksum]
    more = f' and of {len(wrong) - _LISTED} more arrays' if len(wrong) > _LISTED else ''
    what = f'of {", ".join(wrong[:_LISTED])}{more}' if wrong else 'beside the arrays'
    raise ValueError(f'bits {what} are flipped, as the checksum shows')


def _arrays(value: Any, name: str = '') -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays in nested containers, with the path of their keys: 'optimizer/moment1/head.weight'."""
    if len(name) > MAX_PATH:
        return
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _arrays(entry, f'{name}/{key}' if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from _arrays(entry, f'{name}/{index}')


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
