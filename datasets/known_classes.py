# SPDX-License-Identifier: Apache-2.0
"""Names and colors of the classes of DATA.DATASET, without its images."""

from __future__ import annotations

import os

from datasets import lmdb, zip
from datasets.classes import ClassTable, builtin_classes, default_palette, read_classes
from datasets.scenes import NAMES
from datasets.segmentation_layouts import BUILTIN, CLASSES
from utils.environment import expand_user

_PACKED = {'zip': zip.packed_classes, 'lmdb': lmdb.packed_classes}


def known_classes(config) -> ClassTable | None:
    """Return the classes of DATA.DATASET: built in, of a zip or LMDB file, or of DATA_PATH/classes.txt; None if unknown."""
    name, root = config.DATA.DATASET.removesuffix('aug'), expand_user(config.DATA.DATA_PATH)
    if name in BUILTIN:
        return builtin_classes(name)
    if name == 'digit_scenes':
        return ClassTable(list(NAMES), default_palette(len(NAMES)))
    if name in _PACKED:
        return _PACKED[name](root)
    path = os.path.join(root, CLASSES)
    return read_classes(path) if os.path.isfile(path) else None
