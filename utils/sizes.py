# SPDX-License-Identifier: Apache-2.0
"""Image sizes: the side of a square, or (height, width). DATA.IMAGE_SIZE and the arguments `img_size` take both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

from utils.cli import unquoted
from utils.schema import Key, literal

Side = Union[int, Sequence[int]]  # side of a square, or (height, width), pixels


def size_pair(size: Side) -> tuple[int, int]:
    """Return (height, width); an integer is the side of a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def size_value(size: Side) -> int | tuple[int, int]:
    """Return a square as its side, as in configurations and files, and any other size as (height, width)."""
    height, width = size_pair(size)
    return height if height == width else (height, width)


def size_text(size: Side) -> str:
    """Return '224' for a square, '224x160' for height 224 and width 160."""
    value = size_value(size)
    return str(value) if isinstance(value, int) else 'x'.join(map(str, value))


def size_argument(size: Side) -> str:
    """Return a size as -image_size takes it: '224', or '224,160' for height 224 and width 160."""
    return size_text(size).replace('x', ',')


def image_size(config) -> tuple[int, int]:
    """Return (height, width) of DATA.IMAGE_SIZE."""
    return size_pair(config.DATA.IMAGE_SIZE)


def image_shape(config) -> list[int]:
    """Return [C, H, W] of the model's input by DATA.IMAGE_CHANNELS and DATA.IMAGE_SIZE."""
    return [config.DATA.IMAGE_CHANNELS, *image_size(config)]


class SizeKey(Key):
    """A key whose value is the side of a square, or (height, width). A pair of equal numbers becomes one number.

    Args:
        default: side of a square.
        allowed: bounds of both sides, see `Key`.
    """

    def __init__(self, default: int, allowed: str):
        super().__init__(default, allowed)
        self._pair = Key((default, default), allowed, length=(2,))

    def coerce(self, value) -> int | tuple[int, ...]:
        """See `Key`."""
        value = literal(value) if isinstance(value, str) else value
        if not isinstance(value, (list, tuple)):
            return super().coerce(value)
        pair = self._pair.coerce(value)
        return size_value(pair) if len(pair) == 2 else pair

    def accepts(self, value) -> bool:
        """See `Key`."""
        return super().accepts(value) if isinstance(value, int) else self._pair.accepts(value)

    def expected(self) -> str:
        """See `Key`."""
        return f'{super().expected()}, or (height, width)'


def image_size_flag(text: str) -> int | tuple[int, int]:
    """Parse the value of -image_size: `224`, or `224,160` for height 224 and width 160."""
    value = literal(unquoted(text))
    numbers = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value,)
    if not all(type(number) is int for number in numbers):
        raise ValueError
    return size_value(value)


image_size_flag.__name__ = 'image size'  # what argparse calls it
