# SPDX-License-Identifier: Apache-2.0
"""Reader of values in LMDB files (version 0.9, little-endian, 64 bits) that checks all it reads.

The LMDB library follows the offsets in a file without checks, through a memory map: damaged files end the process. This
reader reads whole pages with `pread`. Layout, as in lmdb.h and mdb.c of https://www.openldap.org/software/repo.html:

    meta page       0 and 1; the one with the higher transaction is valid: page size, last page, root of the tree
    branch page     sorted nodes: a key, and the page with all keys from this one on; the first key counts as the lowest
    leaf page       sorted nodes: a key, and its value or the number of its first overflow page
    overflow pages  a page header and a value, in consecutive pages

Processes and threads may share one `LmdbFile`.
"""

from __future__ import annotations

import os
import struct
import weakref
from typing import NamedTuple

from datasets.images import MAX_FILE
from utils.files import open_regular

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER = struct.Struct('<QHHHH')  # page number, padding, flags, end of the node table, begin of the nodes
_META = struct.Struct('<IIQQ')  # magic, version, address, size of the map
_TREE = struct.Struct('<IHHQQQQQ')  # page size, flags, depth, branch pages, leaf pages, overflow pages, entries, root
_LAST = struct.Struct('<QQ')  # last page, transaction
_NODE = struct.Struct('<HHHH')  # two halves of a number, flags, length of the key
_META_SIZE = _HEADER.size + _META.size + 2 * _TREE.size + _LAST.size
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04  # flags of a page
_BIG, _OTHERS = 0x01, 0x06  # flags of a node: its value is in overflow pages; it is a tree of its own
_NO_PAGE = (1 << 64) - 1
_SIZES = tuple(1 << bits for bits in range(9, 17))  # of a page
_MAX_DEPTH = 32  # as in LMDB
_CACHED = 1024  # branch pages; a file of a million images has about 100


class CutOffError(ValueError):
    """The file is shorter than its description: `size` bytes of `needed`."""

    def __init__(self, size: int, needed: int):
        super().__init__(f'it has {size} bytes of {needed}')
        self.size, self.needed = size, needed


class _Meta(NamedTuple):
    transaction: int
    page_size: int
    flags: int
    depth: int
    entries: int
    root: int
    last: int


class LmdbFile:
    """An open file.

    Attributes:
        entries: number of values.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no such file, or CutOffError.
    """

    def __init__(self, path: str):
        with open_regular(path) as file:
            self._handle = os.dup(file.fileno())
        self.close = weakref.finalize(self, os.close, self._handle)
        first = self._meta(0)
        self._root = max(first, self._meta(first.page_size))
        if self._root.page_size != first.page_size or self._root.flags:
            raise ValueError('its tree is of another kind')
        self.entries = self._root.entries
        self._branches: dict[int, bytes] = {}
        self._check_size()

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key, None if it is missing. Raises ValueError if the file is damaged, or CutOffError."""
        self._check_size()
        number = self._root.root
        if number == _NO_PAGE:
            return None
        for _ in range(min(self._root.depth, _MAX_DEPTH)):
            page = self._branches.get(number) or self._page(number)
            nodes = _nodes(page, number)
            if _HEADER.unpack_from(page)[2] & _LEAF:
                return self._value(page, nodes, key)
            self._keep(number, page)
            low, high = 0, len(nodes)  # the last node with a key of at most `key`
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if _key(page, nodes[middle]) <= key else (low, middle)
            lower, upper, highest, _ = _NODE.unpack_from(page, nodes[low])
            number = lower | upper << 16 | highest << 32
        raise ValueError('its tree has no end')

    def _value(self, page: bytes, nodes: tuple[int, ...], key: bytes) -> bytes | None:
        """Return the value of a key of a leaf page."""
        low, high = 0, len(nodes)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if _key(page, nodes[middle]) < key else (low, middle)
        if low == len(nodes) or _key(page, nodes[low]) != key:
            return None
        lower, upper, flags, length = _NODE.unpack_from(page, nodes[low])
        size, begin = lower | upper << 16, nodes[low] + _NODE.size + length
        if flags & _OTHERS or size > MAX_FILE:
            raise ValueError(f'a value of {size} bytes, more than the {MAX_FILE} that are read')
        if not flags & _BIG:
            if begin + size > len(page):
                raise ValueError('a value beyond its page')
            return page[begin : begin + size]
        if begin + 8 > len(page):
            raise ValueError('a value beyond its page')
        number = int.from_bytes(page[begin : begin + 8], 'little')
        data = self._page(number, -(-(size + _HEADER.size) // self._root.page_size))
        if not _HEADER.unpack_from(data)[2] & _OVERFLOW:
            raise ValueError(f'page {number} holds no value')
        return data[_HEADER.size : _HEADER.size + size]

    def _page(self, number: int, count: int = 1) -> bytes:
        """Read `count` consecutive pages."""
        size = self._root.page_size
        if not 1 < number <= number + count - 1 <= self._root.last:
            raise ValueError(f'page {number} is not in it')
        data = os.pread(self._handle, count * size, number * size)
        if len(data) < count * size:
            raise CutOffError(os.fstat(self._handle).st_size, self._needed)
        if _HEADER.unpack_from(data)[0] != number:
            raise ValueError(f'page {number} has another number')
        return data

    def _keep(self, number: int, page: bytes) -> None:
        if len(self._branches) < _CACHED:
            self._branches[number] = page

    def _meta(self, place: int) -> _Meta:
        data = os.pread(self._handle, _META_SIZE, place)
        if len(data) < _META_SIZE:
            raise ValueError('it is too short')
        magic, version, *_ = _META.unpack_from(data, _HEADER.size)
        if (magic, version) != (_MAGIC, _VERSION):
            raise ValueError('its first bytes are others')
        trees = _HEADER.size + _META.size
        page_size = _TREE.unpack_from(data, trees)[0]
        _, flags, depth, *_, entries, root = _TREE.unpack_from(data, trees + _TREE.size)
        last, transaction = _LAST.unpack_from(data, trees + 2 * _TREE.size)
        if page_size not in _SIZES or depth > _MAX_DEPTH:
            raise ValueError('its first page is damaged')
        return _Meta(transaction, page_size, flags, depth, entries, root, last)

    @property
    def _needed(self) -> int:
        return (self._root.last + 1) * self._root.page_size

    def _check_size(self) -> None:
        size = os.fstat(self._handle).st_size
        if size < self._needed:
            raise CutOffError(size, self._needed)


def _nodes(page: bytes, number: int) -> tuple[int, ...]:
    """Return the places of the nodes of a branch or leaf page."""
    _, _, flags, end, _ = _HEADER.unpack_from(page)
    count = (end - _HEADER.size) // 2
    if flags & (_BRANCH | _LEAF) not in (_BRANCH, _LEAF) or not count > 0 or end > len(page):
        raise ValueError(f'page {number} is damaged')
    nodes = struct.unpack_from(f'<{count}H', page, _HEADER.size)
    if max(nodes) > len(page) - _NODE.size:
        raise ValueError(f'page {number} is damaged')
    return nodes


def _key(page: bytes, node: int) -> bytes:
    begin = node + _NODE.size
    return page[begin : begin + _NODE.unpack_from(page, node)[3]]
