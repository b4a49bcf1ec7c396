# SPDX-License-Identifier: Apache-2.0
"""Description of the label maps in zip and LMDB files, which makes them independent of the packed folders.

It is JSON: `classes`, a [name, '#rrggbb'] per class, and `reduce_zero` and `ids` of `LabelCoding`.
"""

from __future__ import annotations

import json

import numpy as np

from datasets.classes import MAX_CLASSES, ClassTable
from datasets.dataset import EncodedStorage
from datasets.segmentation import VALUES, LabelCoding, SegmentationDataset
from datasets.segmentation_layouts import paired
from utils.errors import UserError
from utils.text import NAME, printable

MAX_DESCRIPTION = 16 << 20  # bytes; 65535 classes take 3 MB


def describe_maps(dataset: SegmentationDataset) -> bytes:
    """Return the description of the maps of a data set."""
    colors = (f'#{bytes(color).hex()}' for color in dataset.classes.palette)
    return json.dumps({'classes': list(zip(dataset.class_names, colors)), **dataset.coding._asdict()}).encode()


def read_description(data: bytes, path: str) -> tuple[ClassTable, LabelCoding]:
    """Return classes and coding of the file `path`. Raises UserError."""
    try:
        found = json.loads(data) if len(data) <= MAX_DESCRIPTION else None
        names, colors = zip(*found['classes'])
        palette = np.array([list(bytes.fromhex(color[1:])) for color in colors], 'uint8').reshape(len(names), 3)
        table, coding = ClassTable(list(names), palette), LabelCoding(found['reduce_zero'], found['ids'])
        if not (
            0 < len(names) <= MAX_CLASSES
            and all(isinstance(name, str) for name in names)
            and _is_coding(coding, len(names))
        ):
            raise ValueError('an entry of another kind')
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"'{path}' is damaged: the description of its label maps cannot be read ({printable(repr(error), NAME)}); write "
            'it again.'
        ) from None
    return table, coding


def _is_coding(coding: LabelCoding, count: int) -> bool:
    """Return True if each stored value has one of `count` labels, or None."""
    ids = [] if coding.ids is None else coding.ids
    numbers = isinstance(ids, list) and len(ids) <= VALUES and all(i is None or type(i) is int for i in ids)
    return numbers and isinstance(coding.reduce_zero, bool) and all(i is None or 0 <= i < count for i in ids)


def packed_dataset(
    config, images: EncodedStorage, maps: EncodedStorage, path: str, description: bytes
) -> SegmentationDataset:
    """Build a data set of the images and label maps of the file `path`. Raises UserError."""
    return paired(config, images, maps, f"'{path}'", *read_description(description, path))
