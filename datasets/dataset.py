# SPDX-License-Identifier: Apache-2.0
"""Data sets: a list of labels, and a storage that opens the images."""

from __future__ import annotations

import contextlib
import copy
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from datasets.bands import PLAIN, Bands, decode_bands, with_alpha
from datasets.images import MAX_FILE, Jpeg, UnreadableImage, decode_image, open_image
from datasets.sample import Sample
from utils.errors import UserError
from utils.files import read_regular

_PLAUSIBLE = 1000  # classes; if a list has more and most have no image, a label is probably wrong
_LISTED, _SHOWN = 1000, 5  # maximum of classes without an image, in a list and in a sentence


class Storage(Protocol):
    """Storage of the items of a data set. Each worker process opens its own file handles on first use."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Return an item as an RGB image. Raises UnreadableImage with the reason."""

    def describe(self, index: int) -> str:
        """Return the path of an item, or file and key, for messages."""


class EncodedStorage(Storage):
    """A storage of encoded image files."""

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file. Raises UnreadableImage."""
        raise NotImplementedError

    def open(self, index: int) -> Image.Image:
        return decode_image(self.read(index))

    def picture(self, index: int, exif_rotate: bool = False) -> Image.Image | Jpeg:
        """Return an item for a transform, see `open_image`."""
        return open_image(self.read(index), exif_rotate)


class BadImageError(UserError):
    """An image cannot be read; the text names the image."""


class Images:
    """Images without targets. Subclasses add targets, as `columns` or in `sample`.

    Attributes:
        source: file or folder of the list of images, for messages.
        notes: sentences about the data, logged once.
        columns: targets that are known without reading an image: name -> [N, ...].
        channels: DATA.IMAGE_CHANNELS, see `with_channels`.
    """

    columns: Mapping[str, np.ndarray] = MappingProxyType({})
    channels: int = 3

    def __init__(self, storage: Storage, source: str, notes: Sequence[str] = ()):
        self.storage = storage
        self.source = source
        self.notes = list(notes)
        if len(storage) == 0:
            raise UserError(f'{source} holds no image.')

    def __len__(self) -> int:
        return len(self.storage)

    @property
    def storages(self) -> tuple[Storage, ...]:
        """All storages; the first one holds the images."""
        return (self.storage,)

    def load(self, index: int) -> Image.Image:
        """Return image `index` as an RGB image, see `Bands.convert`. Raises BadImageError."""
        with self.naming(index):
            return self.storage.open(index) if self.channels in PLAIN else self.picture(index).convert('RGB')

    def sample(self, index: int, exif_rotate: bool = False) -> Sample:
        """Return image `index` with the targets that are not in `columns`, for a transform. Call it within `naming`.

        Args:
            exif_rotate: see `decode_image`.
        """
        return Sample(self.picture(index, exif_rotate))

    def check_targets(self, index: int) -> None:
        """Check the targets of a readable image. Raises UserError."""

    def picture(self, index: int, exif_rotate: bool = False) -> Image.Image | Jpeg | Bands:
        """Return image `index` for a transform, which may decode it. Call it within `naming`."""
        if self.channels not in PLAIN:
            if isinstance(self.storage, EncodedStorage):
                return decode_bands(self.storage.read(index), self.channels, exif_rotate)
            return with_alpha(self.storage.open(index), self.channels)
        if isinstance(self.storage, EncodedStorage):
            return self.storage.picture(index, exif_rotate)
        return self.storage.open(index)

    @contextlib.contextmanager
    def naming(self, index: int) -> Iterator[None]:
        """Turn an UnreadableImage or MemoryError of the block into a BadImageError that names image `index`."""
        try:
            yield
        except (UnreadableImage, MemoryError) as error:
            reason = 'it needs more memory than there is' if isinstance(error, MemoryError) else error
            raise BadImageError(
                f"cannot read image '{self.describe(index)}' (number {index} of {self.source}): {reason}."
            ) from None

    def with_storages(self, change: Callable[[Storage], Storage]) -> Images:
        """Return a copy of the data set with `change(storage)` in place of each storage."""
        other = copy.copy(self)
        other.storage = change(self.storage)
        return other

    def with_channels(self, channels: int) -> Images:
        """Return a copy of the data set whose pictures have `channels` channels; 1 and 3 are read as RGB."""
        if channels == self.channels:
            return self
        other = copy.copy(self)
        other.channels = channels
        return other

    def describe(self, index: int) -> str:
        """Return the path of an image, or file and key."""
        return self.storage.describe(index)


class Dataset(Images):
    """Images with one class each.

    Attributes:
        labels: [N] int64.
        num_classes: number of classes in the data.
        class_names: one name per class, or None. Without names `num_classes` is the largest label plus one, and the true
            number may be larger.

    Args:
        locate: maps an index to the file and line of the label; None: the image defines its label.
    """

    def __init__(
        self,
        storage: Storage,
        labels: Sequence[int],
        source: str,
        class_names: Sequence[str] | None = None,
        notes: Sequence[str] = (),
        locate: Callable[[int], str] | None = None,
    ):
        super().__init__(storage, source, notes)
        self.labels = _whole_numbers(labels, source)
        self.class_names = None if class_names is None else _names(class_names, source)
        self._locate = locate
        if len(storage) != len(self.labels):
            raise UserError(f'{source} has {len(storage)} images, but {len(self.labels)} labels.')
        self.num_classes = int(self.labels.max()) + 1 if class_names is None else len(class_names)
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if len(outside):
            raise UserError(
                f'{source} has labels outside 0 to {max(self.num_classes - 1, 0)}: {self.labels[outside[0]]} of '
                f'{self.locate(outside[0])}.'
            )

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Return the labels under the name 'label'."""
        return {'label': self.labels}

    def locate(self, index: int) -> str:
        """Return the source of a label: file and line, or the image itself."""
        return self._locate(index) if self._locate else f"'{self.describe(index)}'"


def _names(names: Any, source: str) -> list[str]:
    """Class names. Raises UserError for anything that is not a list of texts."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{source} has class names that are not a list of texts.')
    return list(names)


def _whole_numbers(labels: Sequence[int], source: str) -> np.ndarray:
    """Return labels as [N] int64. Raises UserError if they are no list of 64-bit integers."""
    try:
        # Many references to one long text would become an array of many times their size.
        values = np.asarray(labels) if _are_numbers(labels) else np.empty(1, object)
    except (ValueError, TypeError, OverflowError):  # such as lists of different lengths
        values = np.empty(1, object)
    whole = values.ndim == 1 and values.dtype.kind in 'iu'
    if values.size and not (whole and values.max() <= np.iinfo(np.int64).max):
        raise UserError(f'{source} has labels that are not whole numbers of at most 64 bits.')
    return values.reshape(-1).astype(np.int64, copy=False)


def _are_numbers(labels: Sequence[Any]) -> bool:
    return isinstance(labels, np.ndarray) or all(issubclass(kind, (int, np.integer)) for kind in set(map(type, labels)))


class FileStorage(EncodedStorage):
    """Image files below a folder."""

    def __init__(self, root: str, paths: Iterable[str]):
        self.root = root
        self._paths = packed(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def describe(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def read(self, index: int) -> bytes:
        try:
            return read_regular(self.describe(index), MAX_FILE)
        except (OSError, ValueError, MemoryError) as error:  # ValueError: zero byte in the name
            raise UnreadableImage(getattr(error, 'strerror', None) or str(error) or type(error).__name__) from None


class PackedStrings:
    """A read-only list of strings in two arrays.

    Python strings would be copied to each worker process, since reading one changes its reference count and with it the
    shared memory page. Arrays stay shared.
    """

    def __init__(self, strings: Iterable[str]):
        content, ends = bytearray(), array('q')
        for string in strings:
            content += _encoded(string)
            ends.append(len(content))
        self._ends = np.frombuffer(ends or np.empty(0, np.int64), dtype=np.int64)
        self._bytes = np.frombuffer(content, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        begin = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[begin : self._ends[index]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def starting_with(self, character: str) -> list[int]:
        """Return the indices of the strings that start with an ASCII character."""
        begins = np.concatenate([np.zeros(1, np.int64), self._ends[:-1]])[: len(self)]
        filled = np.flatnonzero(begins < self._ends)
        return filled[self._bytes[begins[filled]] == ord(character)].tolist()


def packed(strings: Iterable[str]) -> PackedStrings:
    """Return `PackedStrings`, without a copy if the strings are packed already."""
    return strings if isinstance(strings, PackedStrings) else PackedStrings(strings)


def _encoded(name: str) -> bytes:
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:  # an unpaired surrogate, which JSON allows
        raise UserError(f'{name!r} cannot be the name of a file; fix it where it is listed.') from None


def resolve_num_classes(config, dataset: Dataset) -> int:
    """Return MODEL.NUM_CLASSES, or the number of classes in the data if it is None.

    Raises:
        UserError: the data contradict MODEL.NUM_CLASSES. Data without class names (list files) may use fewer classes.
    """
    wanted = config.MODEL.NUM_CLASSES
    if wanted is None:
        if dataset.class_names is None:
            _check_plausible(dataset)
        return dataset.num_classes
    named = dataset.class_names is not None
    if dataset.num_classes > wanted or (named and dataset.num_classes != wanted):
        found = f'{dataset.num_classes} classes' if named else _largest_label(dataset)
        raise UserError(
            f'MODEL.NUM_CLASSES is {wanted}, but {dataset.source} has {found}; '
            f'set it to {dataset.num_classes} (if it is not set, the training data decide).'
        )
    return wanted


def _largest_label(dataset: Dataset) -> str:
    largest = int(dataset.labels.argmax())
    return f"label {dataset.labels[largest]} ('{dataset.describe(largest)}')"


def _check_plausible(dataset: Dataset) -> None:
    """Raise UserError if a wrong, very large label would create many empty classes."""
    count, used = dataset.num_classes, len(np.unique(dataset.labels))
    if count > _PLAUSIBLE and 2 * used < count:
        largest = int(dataset.labels.argmax())
        raise UserError(
            f'{dataset.locate(largest)}: label {dataset.labels[largest]} makes {count} classes, of which only {used} have an '
            'image; fix the label, or set MODEL.NUM_CLASSES (-num_classes) to the number of classes.'
        )


def empty_classes(dataset: Dataset, num_classes: int) -> tuple[int, list[int]]:
    """Return the number of classes without an image, and the first of them."""
    used = np.unique(dataset.labels)
    candidates = np.arange(min(num_classes, len(used) + _LISTED))
    return num_classes - len(used), np.setdiff1d(candidates, used)[:_LISTED].tolist()


def describe_empty(dataset: Dataset, num_classes: int) -> str:
    """Describe the classes without an image in one sentence; '' if there are none."""
    count, first = empty_classes(dataset, num_classes)
    if not count:
        return ''
    hint = ' Do labels start from 1? They must start from 0.' if first == [0] and dataset.class_names is None else ''
    more = ['and so on'] if count > _SHOWN else []
    return f'{count} of {num_classes} classes have no image in {dataset.source}: {", ".join([*map(str, first[:_SHOWN]), *more])}.{hint}'
