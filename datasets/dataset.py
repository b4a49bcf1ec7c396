# SPDX-License-Identifier: Apache-2.0
"""A data set: a labelled list of items, and a storage that opens them."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from datasets.images import Jpeg, UnreadableImage, decode_image, open_image
from utils.errors import UserError


class Storage(Protocol):
    """Where the items of a data set lie. Used by several worker processes: handles are opened on first use, per process."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """The item as RGB. Raises UnreadableImage with the reason."""

    def describe(self, index: int) -> str:
        """What a person can look the item up by: its path, or file and key."""


class EncodedStorage(Storage):
    """A storage of image files, wherever these lie."""

    def read(self, index: int) -> bytes:
        """The image file as it is. Raises UnreadableImage."""
        raise NotImplementedError

    def open(self, index: int) -> Image.Image:
        return decode_image(self.read(index))


class BadImageError(UserError):
    """An image that cannot be read; names the image."""


class Dataset:
    """Labelled images.

    Attributes:
        labels: [N] int64.
        num_classes: number of classes, taken from the data.
        class_names: one name per class; None when the data do not name classes, in which case `num_classes` is only
            the largest label plus one, and the true number may be larger.
        source: the file or folder that the list of items comes from, for messages.
    """

    def __init__(self, storage: Storage, labels: Sequence[int], source: str, class_names: Sequence[str] | None = None):
        self.storage = storage
        self.labels = np.asarray(labels, dtype=np.int64)
        self.source = source
        self.class_names = None if class_names is None else list(class_names)
        if len(self.labels) == 0:
            raise UserError(f'{source} holds no image.')
        self.num_classes = int(self.labels.max()) + 1 if class_names is None else len(class_names)
        if len(storage) != len(self.labels):
            raise UserError(f'{source} has {len(storage)} images, but {len(self.labels)} labels.')
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise UserError(f'{source} has labels outside 0 to {self.num_classes - 1}.')

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        """Item `index` as an RGB picture. Raises BadImageError."""
        with self.naming(index):
            return self.storage.open(index)

    def picture(self, index: int) -> Image.Image | Jpeg:
        """Item `index` for a transform, which may be what decodes it: to be used within `naming`."""
        if isinstance(self.storage, EncodedStorage):
            return open_image(self.storage.read(index))
        return self.storage.open(index)

    @contextlib.contextmanager
    def naming(self, index: int) -> Iterator[None]:
        """Makes an UnreadableImage of its block a BadImageError, which says that it is item `index`."""
        try:
            yield
        except UnreadableImage as error:
            raise BadImageError(
                f"cannot read image '{self.describe(index)}' (number {index} of {self.source}): {error}."
            ) from None

    def stored_in(self, storage: Storage) -> Dataset:
        """The same items, opened by another storage."""
        other = copy.copy(self)
        other.storage = storage
        return other

    def describe(self, index: int) -> str:
        return self.storage.describe(index)


class FileStorage(EncodedStorage):
    """Image files below a folder."""

    def __init__(self, root: str, paths: Iterable[str]):
        self.root = root
        self._paths = PackedStrings(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def describe(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def read(self, index: int) -> bytes:
        try:
            with open(self.describe(index), 'rb') as file:
                return file.read()
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from None


class PackedStrings:
    """A read-only list of strings in two arrays.

    A million Python strings cost every worker process its own copy, since reading one touches its reference count and
    with it the page shared with the parent. Arrays stay shared.
    """

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b''.join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        begin = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[begin : self._ends[index]].tobytes())


def resolve_num_classes(config, dataset: Dataset) -> int:
    """Number of classes of the classifier: MODEL.NUM_CLASSES, or that of the data where it is None.

    Raises:
        UserError: when the data contradict MODEL.NUM_CLASSES. Data that do not name their classes (list files) may use
            fewer.
    """
    wanted = config.MODEL.NUM_CLASSES
    if wanted is None:
        return dataset.num_classes
    named = dataset.class_names is not None
    if dataset.num_classes > wanted or (named and dataset.num_classes != wanted):
        largest = int(dataset.labels.argmax())
        found = (
            f'{dataset.num_classes} classes'
            if named
            else f"label {dataset.labels[largest]} ('{dataset.describe(largest)}')"
        )
        raise UserError(
            f'MODEL.NUM_CLASSES is {wanted}, but {dataset.source} has {found}; '
            f'set it to {dataset.num_classes} (where it is not set, the training data decide).'
        )
    return wanted
