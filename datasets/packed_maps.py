# SPDX-License-Identifier: Apache-2.0
"""Description of the label maps in zip and LMDB files, which makes them independent of the packed folders.

It is JSON: `classes`, a [name, '#rrggbb'] per class, and `reduce_zero` and `ids` of `LabelCoding`.
"""

from __future__ import annotations

import json

import numpy as np

from datasets.classes import ClassTable
from datasets.dataset import EncodedStorage
from datasets.segmentation import LabelCoding, SegmentationDataset
from datasets.segmentation_layouts import paired
from utils.errors import UserError


def describe_maps(dataset: SegmentationDataset) -> bytes:
    """Return the description of the maps of a data set."""
    colors = (f'#{bytes(color).hex()}' for color in dataset.classes.palette)
    return json.dumps({'classes': list(zip(dataset.class_names, colors)), **dataset.coding._asdict()}).encode()


def read_description(data: bytes, path: str) -> tuple[ClassTable, LabelCoding]:
    """Return classes and coding of the file `path`. Raises UserError."""
    try:
        found = json.loads(data)
        names, colors = zip(*found['classes'])
        palette = np.array([list(bytes.fromhex(color[1:])) for color in colors], 'uint8').reshape(len(names), 3)
        return ClassTable(list(names), palette), LabelCoding(found['reduce_zero'], found['ids'])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{path}' is damaged: the description of its label maps cannot be read ({error!r}); write it again."
        ) from None


def packed_dataset(
    config, images: EncodedStorage, maps: EncodedStorage, path: str, description: bytes
) -> SegmentationDataset:
    """Build a data set of the images and label maps of the file `path`. Raises UserError."""
    return paired(config, images, maps, f"'{path}'", *read_description(description, path))
