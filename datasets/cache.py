# SPDX-License-Identifier: Apache-2.0
"""Cache of image files in memory (DATA.CACHE), as in Swin Transformer and MS-MLP. Small images are decoded only once.

    full    each rank caches all training images
    part    rank r of w caches the images i with i % w == r, and trains on those alone

In both cases each rank caches its own validation images. A cache belongs to one data set of one run and is never written to
disk, so it can be neither stale nor mixed up.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.dataset import EncodedStorage, Images
from datasets.images import Jpeg, UnreadableImage, open_image, stored_size
from utils.errors import UserError

SMALL = 32  # side in pixels up to which decoded pixels are kept (3 KiB)


def cache_images(dataset: Images, indices: np.ndarray, show_progress: bool) -> Images:
    """Return the data set with the image files of `indices` in memory; data sets without image files are returned unchanged.

    Raises:
        UserError: there is not enough memory.
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
            'part, which splits them among the processes, or to no.'
        ) from None


class CachedStorage(EncodedStorage):
    """A storage with the image files of `indices` in memory, and the decoded pixels of small images."""

    def __init__(self, storage: EncodedStorage, indices: Iterable[int]):
        self.storage = storage
        self.files = PackedBytes(len(storage))
        self._pixels = PackedBytes(len(storage))
        self._sizes = np.zeros((len(storage), 2), np.uint8)  # (width, height) of the decoded images
        for index in indices:
            # `read` and `picture` raise the error again when the image is needed.
            with contextlib.suppress(UnreadableImage):
                self.files[index] = storage.read(index)
                self._decode(index)

    def _decode(self, index: int) -> None:
        """Keep the pixels of a small image. A `Jpeg` stays encoded: a transform may decode it at a smaller size."""
        data = self.files[index]
        size = stored_size(data)  # larger images are not decoded here
        if size is not None and max(size) <= SMALL and not isinstance(image := open_image(data), Jpeg):
            self._pixels[index], self._sizes[index] = image.tobytes(), image.size

    def __len__(self) -> int:
        return len(self.storage)

    def describe(self, index: int) -> str:
        return self.storage.describe(index)

    def read(self, index: int) -> bytes:
        return self.files[index] if index in self.files else self.storage.read(index)

    def picture(self, index: int, exif_rotate: bool = False) -> Image.Image | Jpeg:
        if exif_rotate or index not in self._pixels:
            return super().picture(index, exif_rotate)
        return Image.frombytes('RGB', tuple(self._sizes[index].tolist()), self._pixels[index])


class PackedBytes:
    """Byte strings by index in anonymous memory maps; some may be missing.

    Worker processes that are forked later share the maps. Python objects would be copied to each worker, since reading one
    changes its reference count and with it the memory page.
    """

    MAP_SIZE = 1 << 28

    def __init__(self, count: int):
        self._maps: list[mmap.mmap] = []
        self._end = 0  # end of the used part of the last map
        self._positions = np.full((count, 3), -1, np.int64)  # map, begin, end

    def __contains__(self, index: int) -> bool:
        return self._positions[index, 0] >= 0

    def __getitem__(self, index: int) -> bytes:
        number, begin, end = self._positions[index].tolist()
        return self._maps[number][begin:end]

    def __setitem__(self, index: int, data: bytes) -> None:
        """Store a byte string. Raises MemoryError, whose text gives the sizes."""
        if not self._maps or self._end + len(data) > len(self._maps[-1]):
            self._maps.append(self._new_map(max(len(data), self.MAP_SIZE)))
            self._end = 0
        begin, self._end = self._end, self._end + len(data)
        self._maps[-1][begin : self._end] = data
        self._positions[index] = len(self._maps) - 1, begin, self._end

    def _new_map(self, size: int) -> mmap.mmap:
        free = free_memory()
        if free is not None and free < size:  # the kernel would grant the map, then kill the process on use
            used = sum(map(len, self._maps))
            raise MemoryError(f'{used / 1e9:.1f} GB are read, {free / 1e9:.1f} GB are free')
        return mmap.mmap(-1, size)


def free_memory() -> int | None:
    """Return the bytes that are available without swapping; None if unknown."""
    try:
        with open('/proc/meminfo', encoding='ascii') as file:
            fields = dict(line.split(':') for line in file)
        return int(fields['MemAvailable'].split()[0]) * 1024
    except (OSError, KeyError):
        return None
