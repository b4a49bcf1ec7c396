# SPDX-License-Identifier: Apache-2.0
"""Image files held in memory, DATA.CACHE, as in Swin Transformer and MS-MLP.

    full    each training process holds all images
    part    process r of w holds the images i with i % w == r, and trains on those alone

Validation holds the share of its process in both cases, since that never changes. A cache belongs to one data set of one run
and is never written anywhere: training and validation cannot be confused, and nothing stale can be found.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from datasets.dataset import EncodedStorage, Images
from datasets.images import UnreadableImage
from utils.errors import UserError


def cached(dataset: Images, indices: np.ndarray, show_progress: bool) -> Images:
    """The same data set with the image files of `indices` in memory; data that are in memory anyway are left as they are.

    Raises:
        UserError: not enough memory.
    """
    if not isinstance(dataset.storage, EncodedStorage):
        return dataset

    def in_memory(storage: EncodedStorage) -> CachedStorage:
        hidden = None if show_progress else True
        with tqdm(indices.tolist(), f'caching {dataset.source}', unit='image', disable=hidden) as bar:
            return CachedStorage(storage, bar)

    try:
        return dataset.with_storages(in_memory)
    except MemoryError as error:
        raise UserError(
            f'{len(indices)} images of {dataset.source} do not fit into memory ({error}); set DATA.CACHE to '
            'part, which shares them out among the processes, or to no.'
        ) from None


class CachedStorage(EncodedStorage):
    """Another storage, with the image files of `indices` in memory."""

    def __init__(self, storage: EncodedStorage, indices: Iterable[int]):
        self.storage = storage
        self.files = PackedBytes(len(storage))
        for index in indices:
            try:
                self.files[index] = storage.read(index)
            except UnreadableImage:  # will be met again, and dealt with, when the image is wanted
                continue

    def __len__(self) -> int:
        return len(self.storage)

    def describe(self, index: int) -> str:
        return self.storage.describe(index)

    def read(self, index: int) -> bytes:
        return self.files[index] if index in self.files else self.storage.read(index)


class PackedBytes:
    """Byte strings by number, some of them absent, one behind the other in anonymous memory maps.

    Worker processes that are forked later share them: reading touches no reference count beside the bytes, which would copy
    their page. Python objects would end up copied to each worker.
    """

    MAP_SIZE = 1 << 28

    def __init__(self, count: int):
        self._maps: list[mmap.mmap] = []
        self._end = 0  # of what is used of the last map
        self._places = np.full((count, 3), -1, np.int64)  # map, begin, end

    def __contains__(self, index: int) -> bool:
        return self._places[index, 0] >= 0

    def __getitem__(self, index: int) -> bytes:
        number, begin, end = self._places[index].tolist()
        return self._maps[number][begin:end]

    def __setitem__(self, index: int, data: bytes) -> None:
        """Raises MemoryError, whose text says how much there is."""
        if not self._maps or self._end + len(data) > len(self._maps[-1]):
            self._maps.append(self._new_map(max(len(data), self.MAP_SIZE)))
            self._end = 0
        begin, self._end = self._end, self._end + len(data)
        self._maps[-1][begin : self._end] = data
        self._places[index] = len(self._maps) - 1, begin, self._end

    def _new_map(self, size: int) -> mmap.mmap:
        free = free_memory()
        if free is not None and free < size:  # the kernel would grant it, and kill the process that uses it
            used = sum(map(len, self._maps))
            raise MemoryError(f'{used / 1e9:.1f} GB are read, {free / 1e9:.1f} GB are free')
        return mmap.mmap(-1, size)


def free_memory() -> int | None:
    """Bytes that this machine can still give without swapping; None where that is not known."""
    try:
        with open('/proc/meminfo', encoding='ascii') as file:
            fields = dict(line.split(':') for line in file)
        return int(fields['MemAvailable'].split()[0]) * 1024
    except (OSError, KeyError):
        return None
