# SPDX-License-Identifier: Apache-2.0
"""Reads what pyarrow's retired `serialize()` wrote, as found in the LMDB files of several training codes.

A value is 16 bytes that count attachments (there are none) and an Arrow IPC stream
(https://arrow.apache.org/docs/format/Columnar.html) with one record batch of one column. Python objects become dense unions,
one child per type. Only what bytes, integers and lists of them need is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_PREFIX = 16

# Message.fbs and Schema.fbs of the Arrow format: kinds of messages and of types, and the first version without a validity
# bitmap for unions (V5).
_SCHEMA, _RECORD_BATCH = 1, 3
_NULL, _INT, _BINARY, _LIST, _UNION = 1, 2, 4, 12, 14
_VERSION_5 = 4


def deserialize(data: bytes | memoryview):
    """The object that `pyarrow.serialize` wrote, tuples as lists.

    Raises:
        ValueError: something else, or damaged.
    """
    try:
        (value,) = _read_stream(memoryview(data)[_PREFIX:])
    except (struct.error, IndexError, KeyError, StopIteration, RecursionError) as error:
        raise ValueError(f'not a value serialized by pyarrow ({error})') from None
    return value


def _read_stream(data: memoryview) -> list:
    """Values of the column."""
    column = None
    place = 0
    while True:
        (size,) = struct.unpack_from('<i', data, place)
        place += 4
        if size == -1:  # a marker since Arrow 0.15, the size comes behind it
            (size,) = struct.unpack_from('<i', data, place)
            place += 4
        if size <= 0:
            raise ValueError('not a value serialized by pyarrow (no record)')
        metadata = data[place : place + size]
        message = _Table(metadata, *struct.unpack_from('<I', metadata))
        place += size
        kind, header, body_size = message.number(1, 'B'), message.table(2), message.number(3, 'q')
        if body_size < 0:  # it would lead back
            raise ValueError('not a value serialized by pyarrow (a body of negative size)')
        if kind == _SCHEMA:
            (column,) = header.tables(1)
        elif kind == _RECORD_BATCH and column is not None:
            body = data[place : place + body_size]
            return _RecordBatch(header, body, message.number(0, 'h')).values(column)
        place += body_size


class _RecordBatch:
    """The buffers of a batch, taken in the order in which the fields of its schema, depth first, need them."""

    def __init__(self, header: _Table, body: memoryview, version: int):
        self._lengths = iter(header.structs(1, '<qq'))
        self._places = iter(header.structs(2, '<qq'))
        self._body = body
        self._left = len(body)  # values that may still come: each takes a byte, or is one of a union that has
        self._union_has_validity = version < _VERSION_5

    def _buffer(self) -> memoryview:
        offset, size = next(self._places)
        return self._body[offset : offset + size]

    def _array(self, code: str, count: int) -> tuple:
        return struct.unpack_from(f'<{count}{code}', self._buffer())

    def values(self, field: _Table) -> list:
        """Python values of a field: None, int, bytes, or lists of them."""
        length, _ = next(self._lengths)
        self._left -= length
        if length < 0 or self._left < 0:
            raise ValueError(f'not a value serialized by pyarrow ({length} values in {len(self._body)} bytes)')
        kind = field.number(2, 'B')
        if kind == _NULL:
            return [None] * length
        if kind == _UNION:
            return self._union(field, length)
        self._buffer()  # validity: absent values are a union's business
        if kind == _INT:
            code = {8: 'b', 16: 'h', 32: 'i', 64: 'q'}[field.table(3).number(0, 'i')]
            return list(self._array(code, length))
        if kind not in (_BINARY, _LIST):
            raise ValueError(f'not a value serialized by pyarrow (Arrow type {kind})')
        ends = self._array('i', length + 1) if length else (0,)
        if list(ends) != sorted(ends):
            raise ValueError('not a value serialized by pyarrow (offsets out of order)')
        if kind == _BINARY:
            content = self._buffer()
            return [bytes(content[begin:end]) for begin, end in zip(ends, ends[1:])]
        (child,) = field.tables(5)
        items = self.values(child)
        return [items[begin:end] for begin, end in zip(ends, ends[1:])]

    def _union(self, field: _Table, length: int) -> list:
        if self._union_has_validity:
            self._buffer()
        kinds, offsets = self._array('b', length), self._array('i', length)
        numbers = field.table(3).structs(1, '<i')
        children = {number: self.values(child) for (number,), child in zip(numbers, field.tables(5))}
        return [children[kind][offset] for kind, offset in zip(kinds, offsets)]


class _Table:
    """A table of a flatbuffer (https://flatbuffers.dev/internals): fields are found through a vector of offsets."""

    def __init__(self, data: memoryview, place: int):
        self._data = data
        self._place = place

    def _field(self, number: int) -> int | None:
        (back,) = struct.unpack_from('<i', self._data, self._place)
        fields = self._place - back
        (size,) = struct.unpack_from('<H', self._data, fields)
        if 4 + 2 * number >= size:
            return None
        (offset,) = struct.unpack_from('<H', self._data, fields + 4 + 2 * number)
        return self._place + offset if offset else None

    def number(self, field: int, code: str) -> int:
        place = self._field(field)
        return 0 if place is None else struct.unpack_from('<' + code, self._data, place)[0]

    def table(self, field: int) -> _Table:
        place = self._field(field)
        if place is None:
            raise IndexError(f'field {field} is absent')
        return self._follow(place)

    def tables(self, field: int) -> list[_Table]:
        return [self._follow(place) for place in self._items(field, 4)]

    def structs(self, field: int, layout: str) -> list[tuple]:
        return [struct.unpack_from(layout, self._data, place) for place in self._items(field, struct.calcsize(layout))]

    def _follow(self, place: int) -> _Table:
        return _Table(self._data, place + struct.unpack_from('<I', self._data, place)[0])

    def _items(self, field: int, size: int) -> Iterator[int]:
        """Places of the items of a vector."""
        place = self._field(field)
        if place is None:
            return
        place += struct.unpack_from('<I', self._data, place)[0]
        (count,) = struct.unpack_from('<I', self._data, place)
        yield from range(place + 4, place + 4 + count * size, size)
