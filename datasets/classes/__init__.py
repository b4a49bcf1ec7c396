# SPDX-License-Identifier: Apache-2.0
"""Names and colors of the classes of label maps. Each line of a file holds a name and optionally TAB and #rrggbb."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import numpy as np

from datasets.folder import read_lines
from utils.errors import UserError

MAX_CLASSES = 65535  # limit of 16-bit maps
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
    """Return the classes of a public data set: ade20k, voc2012 or cityscapes."""
    return read_classes(os.path.join(os.path.dirname(__file__), f'{name}.txt'))


def read_classes(path: str) -> ClassTable:
    """Read the names of classes, and their colors if the file has them.

    Raises:
        UserError: the file is missing, a name occurs twice, or the text after the TAB is no color.
    """
    names, colors, seen = [], [], set()
    for number, line in read_lines(path, 'write the name of a class in each line, in the order of the labels'):
        name, _, color = (field.strip() for field in line.partition('\t'))
        if len(names) == MAX_CLASSES:
            raise UserError(f'{path} names more than {MAX_CLASSES} classes.')
        if not name or name in seen:
            raise UserError(f"{path}:{number}: the class '{name}' must have a name that no other line has.")
        if color and not _COLOR.fullmatch(color):
            raise UserError(f"{path}:{number}: '{color[:40]}' is no color; write #rrggbb, or nothing, after the TAB.")
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
    """Return classes that are named by their numbers."""
    return ClassTable([str(index) for index in range(count)], default_palette(count))


def default_palette(count: int) -> np.ndarray:
    """Return Pascal VOC's palette [count, 3] uint8.

    Bits 3k, 3k + 1 and 3k + 2 of a label are bit 7 - k of its red, green and blue.
    """
    labels, palette = np.arange(count), np.zeros((count, 3), 'uint8')
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype('uint8')
    return palette
