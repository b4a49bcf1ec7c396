# SPDX-License-Identifier: Apache-2.0
"""Data sets of semantic segmentation: images with label maps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from datasets.classes import ClassTable
from datasets.dataset import BadImageError, EncodedStorage, Images, Storage
from datasets.images import UnreadableImage, loaded
from datasets.sample import LabelMap, Sample
from utils.errors import UserError

LABELS = 'labels'  # name of the target
VALUES = 1 << 16  # number of values of a 16-bit map
INVALID = -1
_PROBES = 4  # maps that are checked at the start
_FORMATS = ('PNG', 'BMP', 'TIFF', 'GIF')  # lossless
_SINGLE_CHANNEL = ('L', 'P', '1', 'I', 'I;16', 'I;16B', 'I;16L')


class LabelCoding(NamedTuple):
    """Meaning of the stored values of label maps, apart from the ignored value.

    Attributes:
        reduce_zero: 0 is ignored, and k > 0 is class k - 1, as in ADE20K.
        ids: label of each value from 0, None for an ignored value; None: the values are the labels.
    """

    reduce_zero: bool = False
    ids: Sequence[int | None] | None = None


PLAIN = LabelCoding()


class SegmentationDataset(Images):
    """Images with label maps.

    Args:
        storage: storage of the images.
        maps: storage of the label maps, in the order of the images.
        source: see `Images`.
        classes: names and colors of the classes.
        coding: what the values of the maps mean.
        ignored: label of pixels without a class.
        missing: indices of images whose map is known to be missing.

    Attributes:
        num_classes: number of classes.
        class_names: one per class.
    """

    def __init__(
        self,
        storage: Storage,
        maps: EncodedStorage,
        source: str,
        classes: ClassTable,
        coding: LabelCoding = PLAIN,
        ignored: int = 255,
        notes: Sequence[str] = (),
        missing: Sequence[int] = (),
    ):
        super().__init__(storage, source, notes)
        self.maps = maps
        self.classes = classes
        self.num_classes, self.class_names = len(classes.names), classes.names
        self.coding, self.ignored = coding, ignored
        labels = label_table(self.num_classes, ignored, coding)
        self._labels = labels.astype(label_type(self.num_classes, ignored))
        self._valid = labels != INVALID
        self._missing = list(missing)

    @property
    def storages(self) -> tuple[EncodedStorage, ...]:
        """See `Images`."""
        return self.storage, self.maps

    def sample(self, index: int, exif_rotate: bool = False) -> Sample:
        """Return image and label map. Raises UserError if their sizes differ."""
        picture, labels = self.picture(index, exif_rotate), self.label_map(index)
        if tuple(picture.size) != labels.pixels.shape[::-1]:
            rotated = ' after its EXIF rotation (DATA.EXIF_ROTATE)' if exif_rotate else ''
            raise UserError(
                f"image '{self.describe(index)}' has {_size(picture.size)} pixels{rotated}, but its label map "
                f"'{self.maps.describe(index)}' {_size(labels.pixels.shape[::-1])}; both must be equal."
            )
        return Sample(picture, {LABELS: labels})

    def label_map(self, index: int) -> LabelMap:
        """Return the label map of image `index`, with labels 0 to n - 1 and `ignored`.

        Raises:
            BadImageError: the map cannot be read.
            UserError: the map holds an invalid value.
        """
        try:
            values = read_values(self.maps.read(index))
        except (UnreadableImage, MemoryError) as error:
            reason = 'it needs more memory than there is' if isinstance(error, MemoryError) else error
            raise BadImageError(f"cannot read the label map '{self.maps.describe(index)}': {reason}.") from None
        valid = self._valid[values]
        if not valid.all():
            raise UserError(
                f"the label map '{self.maps.describe(index)}' has the value {int(values[~valid][0])}, which is none of the "
                f'{self.num_classes} classes and not the ignored value {self.ignored}; fix the map, the list of classes or '
                'DATA.REDUCE_ZERO_LABEL.'
            )
        return LabelMap(self._labels[values], self.ignored)

    def check_targets(self, index: int) -> None:
        """See `Images`."""
        with self.naming(index):
            self.sample(index)

    def check(self) -> None:
        """Check a few maps, so that missing maps and a wrong number of classes are errors at the start. Raises UserError.

        The constructor does not check, so that tools find all faults, and pack maps whatever their values mean.
        """
        if self._missing:
            index = self._missing[0]
            raise UserError(
                f"image '{self.describe(index)}' has no label map '{self.maps.describe(index)}'; {len(self._missing)} of "
                f'{len(self)} images have none: add the maps or remove the images.'
            )
        for index in np.unique(np.linspace(0, len(self) - 1, _PROBES).astype(int)).tolist():
            with contextlib.suppress(BadImageError):  # DATA.BAD_IMAGE may skip it
                self.label_map(index)

    def with_storages(self, change: Callable[[Storage], Storage]) -> SegmentationDataset:
        """See `Images`."""
        other = super().with_storages(change)
        other.maps = change(self.maps)
        return other


def label_type(num_classes: int, ignored: int) -> str:
    """Return the dtype of the label maps of a batch."""
    return 'uint8' if max(num_classes - 1, ignored) < 256 else 'int32'


def label_table(num_classes: int, ignored: int, coding: LabelCoding = PLAIN) -> np.ndarray:
    """Return the label of each stored value, [VALUES] int32; INVALID for invalid values."""
    table = np.full(VALUES, INVALID, 'int32')
    if coding.ids is not None:
        table[: len(coding.ids)] = [ignored if label is None else label for label in coding.ids]
    else:
        table[np.arange(num_classes) + coding.reduce_zero] = np.arange(num_classes)
        if coding.reduce_zero:
            table[0] = ignored
    table[ignored] = ignored
    return table


def read_values(data: bytes) -> np.ndarray:
    """Read the stored values of a label map, [H, W]; for a palette image its indices.

    Raises:
        UnreadableImage: the file is no image with one channel of 1, 8 or 16 bits.
    """
    with loaded(data, _FORMATS) as image:
        mode, values = image.mode, np.array(image)
    if mode not in _SINGLE_CHANNEL:
        raise UnreadableImage(f'a label map has one channel of whole numbers, or a palette, but this image is {mode}')
    values = values.astype('int64')
    if values.min() < 0 or values.max() >= VALUES:
        raise UnreadableImage('values of more than 16 bits')
    return values


def _size(size: Sequence[int]) -> str:
    return ' x '.join(map(str, size))
