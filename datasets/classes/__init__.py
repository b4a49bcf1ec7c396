# SPDX-License-Identifier: Apache-2.0
"""Names and colors of the classes of label maps: a line per class, its name, and behind a TAB its color as #rrggbb."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import numpy as np

from datasets.folder import read_lines
from utils.errors import UserError

MAX_CLASSES = 65535  # what 16-bit maps can hold
_COLOR = re.compile('#[0-9a-fA-F]{6}')


class ClassTable(NamedTuple):
    """Classes in the order of their labels.

    Attributes:
        names: one per class.
        palette: [n, 3] uint8, RGB.
    """

    names: list[str]
    palette: np.ndarray


def builtin_classes(name: str) -> ClassTable:
    """The classes of a public data set: ade20k, voc2012 or cityscapes."""
    return read_classes(os.path.join(os.path.dirname(__file__), f'{name}.txt'))


def read_classes(path: str) -> ClassTable:
    """Read the names, and the colors where the file has them.

    Raises:
        UserError: a missing file, a name given twice, or something else than a color behind the TAB.
    """
    names, colors, seen = [], [], set()
    for number, line in read_lines(path, 'write the name of a class in each line, in the order of the labels'):
        name, _, color = (field.strip() for field in line.partition('\t'))
        if len(names) == MAX_CLASSES:
            raise UserError(f'{path} names more than {MAX_CLASSES} classes.')
        if not name or name in seen:
            raise UserError(f"{path}:{number}: the class '{name}' must have a name that no other line has.")
        if color and not _COLOR.fullmatch(color):
            raise UserError(f"{path}:{number}: '{color[:40]}' is no color; write #rrggbb, or nothing, behind the TAB.")
        seen.add(name)
        names.append(name)
        colors.append(color)
    if not 0 < len(names) <= MAX_CLASSES:
        raise UserError(f'{path} names {len(names)} classes, but must name 1 to {MAX_CLASSES}.')
    palette = default_palette(len(names))
    for index, color in enumerate(colors):
        if color:
            palette[index] = list(bytes.fromhex(color[1:]))
    return ClassTable(names, palette)


def numbered_classes(count: int) -> ClassTable:
    """Classes without names."""
    return ClassTable([str(index) for index in range(count)], default_palette(count))


def default_palette(count: int) -> np.ndarray:
    """The palette of Pascal VOC, [count, 3] uint8: bits of the label, three at a time, from the highest bit of a color down."""
    labels, palette = np.arange(count), np.zeros((count, 3), 'uint8')
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype('uint8')
    return palette
