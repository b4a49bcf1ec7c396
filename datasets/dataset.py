# SPDX-License-Identifier: Apache-2.0
"""A data set: a labelled list of items, and a storage that opens them."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from datasets.images import MAX_FILE, Jpeg, UnreadableImage, decode_image, open_image
from datasets.sample import Sample
from utils.errors import UserError
from utils.files import read_regular

_PLAUSIBLE = 1000  # classes; if a list has more and most have no image, a label is wrong
_LISTED, _SHOWN = 1000, 5  # classes without an image, in a list and in a sentence


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


class Images:
    """Images without targets. Subclasses add targets, as `columns` or in `sample`.

    Attributes:
        source: the file or folder that the list of images comes from, for messages.
        notes: sentences on the data that a user should read once.
        columns: targets that are known without reading an image: name -> [N, ...].
    """

    columns: Mapping[str, np.ndarray] = MappingProxyType({})

    def __init__(self, storage: Storage, source: str, notes: Sequence[str] = ()):
        self.storage = storage
        self.source = source
        self.notes = list(notes)
        if len(storage) == 0:
            raise UserError(f'{source} holds no image.')

    def __len__(self) -> int:
        return len(self.storage)

    def load(self, index: int) -> Image.Image:
        """Image `index` as an RGB picture. Raises BadImageError."""
        with self.naming(index):
            return self.storage.open(index)

    def sample(self, index: int, exif_rotate: bool = False) -> Sample:
        """Image `index` with the targets that are not in `columns`, for a transform; to be used within `naming`.

        Args:
            exif_rotate: see `decode_image`.
        """
        return Sample(self.picture(index, exif_rotate))

    def check_targets(self, index: int) -> None:
        """Read the targets of image `index`, which can be read itself. Raises UserError with what is wrong."""

    def picture(self, index: int, exif_rotate: bool = False) -> Image.Image | Jpeg:
        """Image `index` for a transform, which may be what decodes it: to be used within `naming`."""
        if isinstance(self.storage, EncodedStorage):
            return open_image(self.storage.read(index), exif_rotate)
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
        """The same images and targets, with what `change` makes of each storage."""
        other = copy.copy(self)
        other.storage = change(self.storage)
        return other

    def describe(self, index: int) -> str:
        """Path, or file and key, of an image."""
        return self.storage.describe(index)


class Dataset(Images):
    """Images with one class each.

    Attributes:
        labels: [N] int64.
        num_classes: number of classes, taken from the data.
        class_names: one name per class; None when the data do not name classes, in which case `num_classes` is only
            the largest label plus one, and the true number may be larger.

    Args:
        locate: file and line that say the label of an image, by index; None: the image itself does.
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
        """The classes under the name 'label'."""
        return {'label': self.labels}

    def locate(self, index: int) -> str:
        """What says the label of an image: file and line, or the image itself."""
        return self._locate(index) if self._locate else f"'{self.describe(index)}'"


def _names(names: Any, source: str) -> list[str]:
    """Class names. Raises UserError for anything that is not a list of texts."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{source} has class names that are not a list of texts.')
    return list(names)


def _whole_numbers(labels: Sequence[int], source: str) -> np.ndarray:
    """Labels [N] int64. Raises UserError for anything that is not a list of whole numbers of 64 bits."""
    try:
        array = np.asarray(labels)
    except (ValueError, TypeError, OverflowError):  # such as lists of different lengths
        array = np.empty(1, object)
    whole = array.ndim == 1 and array.dtype.kind in 'iu'
    if array.size and not (whole and array.max() <= np.iinfo(np.int64).max):
        raise UserError(f'{source} has labels that are not whole numbers of at most 64 bits.')
    return array.reshape(-1).astype(np.int64)


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
            return read_regular(self.describe(index), MAX_FILE)
        except (OSError, ValueError, MemoryError) as error:  # ValueError: a name with a zero byte
            raise UnreadableImage(getattr(error, 'strerror', None) or str(error) or type(error).__name__) from None


class PackedStrings:
    """A read-only list of strings in two arrays.

    A million Python strings cost every worker process its own copy, since reading one touches its reference count and
    with it the page shared with the parent. Arrays stay shared.
    """

    def __init__(self, strings: Iterable[str]):
        encoded = [_encoded(string) for string in strings]
        self._ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b''.join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        begin = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[begin : self._ends[index]].tobytes())


def _encoded(name: str) -> bytes:
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:  # half a character, which JSON can hold
        raise UserError(f'{name!r} cannot be the name of a file; fix it where it is listed.') from None


def resolve_num_classes(config, dataset: Dataset) -> int:
    """Number of classes of the classifier: MODEL.NUM_CLASSES, or that of the data where it is None.

    Raises:
        UserError: when the data contradict MODEL.NUM_CLASSES. Data that do not name their classes (list files) may use
            fewer.
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
            f'set it to {dataset.num_classes} (where it is not set, the training data decide).'
        )
    return wanted


def _largest_label(dataset: Dataset) -> str:
    largest = int(dataset.labels.argmax())
    return f"label {dataset.labels[largest]} ('{dataset.describe(largest)}')"


def _check_plausible(dataset: Dataset) -> None:
    """A single label that is far too large must not make millions of classes."""
    count, used = dataset.num_classes, len(np.unique(dataset.labels))
    if count > _PLAUSIBLE and 2 * used < count:
        largest = int(dataset.labels.argmax())
        raise UserError(
            f'{dataset.locate(largest)}: label {dataset.labels[largest]} makes {count} classes, of which only {used} have an '
            'image; fix the label, or set MODEL.NUM_CLASSES (-num_classes) to the number of classes.'
        )


def empty_classes(dataset: Dataset, num_classes: int) -> tuple[int, list[int]]:
    """Number of classes without an image, and the first of them."""
    used = np.unique(dataset.labels)
    candidates = np.arange(min(num_classes, len(used) + _LISTED))
    return num_classes - len(used), np.setdiff1d(candidates, used)[:_LISTED].tolist()


def describe_empty(dataset: Dataset, num_classes: int) -> str:
    """One sentence on the classes without an image, empty where there are none."""
    count, first = empty_classes(dataset, num_classes)
    if not count:
        return ''
    hint = ' Do labels start from 1? They must start from 0.' if first == [0] and dataset.class_names is None else ''
    more = ['and so on'] if count > _SHOWN else []
    return f'{count} of {num_classes} classes have no image in {dataset.source}: {", ".join([*map(str, first[:_SHOWN]), *more])}.{hint}'
