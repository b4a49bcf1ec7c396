# SPDX-License-Identifier: Apache-2.0
"""Reader of pyarrow's removed `serialize()` format, which LMDB files of several training codes use.

A value has 16 bytes for the number of attachments (zero), then an Arrow IPC stream
(https://arrow.apache.org/docs/format/Columnar.html) with one record batch of one column. Python objects are dense unions
with one child per type. Only bytes, integers and lists of them are supported.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_PREFIX = 16

# Constants of Message.fbs and Schema.fbs of the Arrow format: message types, data types, and the first version without a
# validity bitmap for unions (V5).
_SCHEMA, _RECORD_BATCH = 1, 3
_NULL, _INT, _BINARY, _LIST, _UNION = 1, 2, 4, 12, 14
_VERSION_5 = 4


def deserialize(data: bytes | memoryview):
    """Return the object that `pyarrow.serialize` wrote; tuples become lists.

    Raises:
        ValueError: the data have another format or are damaged.
    """
    try:
        (value,) = _read_stream(memoryview(data)[_PREFIX:])
    except (struct.error, IndexError, KeyError, StopIteration, RecursionError) as error:
        raise ValueError(f'not a value serialized by pyarrow ({error})') from None
    return value


def _read_stream(data: memoryview) -> list:
    """Return the values of the column."""
    column = None
    position = 0
    while True:
        (size,) = struct.unpack_from('<i', data, position)
        position += 4
        if size == -1:  # a marker since Arrow 0.15, before the size
            (size,) = struct.unpack_from('<i', data, position)
            position += 4
        if size <= 0:
            raise ValueError('not a value serialized by pyarrow (no record)')
        metadata = data[position : position + size]
        message = _Table(metadata, *struct.unpack_from('<I', metadata))
        position += size
        kind, header, body_size = message.number(1, 'B'), message.table(2), message.number(3, 'q')
        if body_size < 0:  # it would lead back
            raise ValueError('not a value serialized by pyarrow (a body of negative size)')
        if kind == _SCHEMA:
            (column,) = header.tables(1)
        elif kind == _RECORD_BATCH and column is not None:
            body = data[position : position + body_size]
            return _RecordBatch(header, body, message.number(0, 'h')).values(column)
        position += body_size


class _RecordBatch:
    """Buffers of a record batch, consumed in depth-first order of the fields of its schema."""

    def __init__(self, header: _Table, body: memoryview, version: int):
        self._lengths = iter(header.structs(1, '<qq'))
        self._positions = iter(header.structs(2, '<qq'))
        self._body = body
        self._left = len(body)  # values that may still come: each takes a byte, or is one of a union that has
        self._union_has_validity = version < _VERSION_5

    def _buffer(self) -> memoryview:
        offset, size = next(self._positions)
        return self._body[offset : offset + size]

    def _array(self, code: str, count: int) -> tuple:
        return struct.unpack_from(f'<{count}{code}', self._buffer())

    def values(self, field: _Table) -> list:
        """Return the Python values of a field: None, int, bytes, or lists of them."""
        length, _ = next(self._lengths)
        self._left -= length
        if length < 0 or self._left < 0:
            raise ValueError(f'not a value serialized by pyarrow ({length} values in {len(self._body)} bytes)')
        kind = field.number(2, 'B')
        if kind == _NULL:
            return [None] * length
        if kind == _UNION:
            return self._union(field, length)
        self._buffer()  # validity bitmap: unused, since unions mark missing values
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
    """A flatbuffer table (https://flatbuffers.dev/internals), whose vtable holds the offsets of its fields."""

    def __init__(self, data: memoryview, position: int):
        self._data = data
        self._position = position

    def _field(self, number: int) -> int | None:
        (back,) = struct.unpack_from('<i', self._data, self._position)
        fields = self._position - back
        (size,) = struct.unpack_from('<H', self._data, fields)
        if 4 + 2 * number >= size:
            return None
        (offset,) = struct.unpack_from('<H', self._data, fields + 4 + 2 * number)
        return self._position + offset if offset else None

    def number(self, field: int, code: str) -> int:
        position = self._field(field)
        return 0 if position is None else struct.unpack_from('<' + code, self._data, position)[0]

    def table(self, field: int) -> _Table:
        position = self._field(field)
        if position is None:
            raise IndexError(f'field {field} is absent')
        return self._follow(position)

    def tables(self, field: int) -> list[_Table]:
        return [self._follow(position) for position in self._items(field, 4)]

    def structs(self, field: int, layout: str) -> list[tuple]:
        return [
            struct.unpack_from(layout, self._data, position) for position in self._items(field, struct.calcsize(layout))
        ]

    def _follow(self, position: int) -> _Table:
        return _Table(self._data, position + struct.unpack_from('<I', self._data, position)[0])

    def _items(self, field: int, size: int) -> Iterator[int]:
        """Yield the positions of the items of a vector."""
        position = self._field(field)
        if position is None:
            return
        position += struct.unpack_from('<I', self._data, position)[0]
        (count,) = struct.unpack_from('<I', self._data, position)
        yield from range(position + 4, position + 4 + count * size, size)
