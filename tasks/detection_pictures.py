# SPDX-License-Identifier: Apache-2.0
"""Pictures of detected objects: boxes, masks, labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasets.classes import default_palette

ALPHA = 0.5  # weight of the color of a mask
_LEAST_FONT = 9  # pixels
_PAPER = (255, 255, 255)
_DARK = 128  # mean of a color below which text on it is white


class Drawn(NamedTuple):
    """Objects to draw; the first is drawn last, on top.

    Attributes:
        boxes: (left, top, right, bottom) in pixels of the picture, [k, 4].
        labels: text of each, such as class and score.
        colors: [k, 3] uint8.
        masks: of each, [H, W] bool of the size of the picture; none: they are not drawn.
    """

    boxes: np.ndarray
    labels: Sequence[str]
    colors: np.ndarray
    masks: Sequence[np.ndarray] = ()


def colors_of(count: int) -> np.ndarray:
    """Return a color per class, [count, 3] uint8, without black, the first color of the palette."""
    return default_palette(count + 1)[1:]


def drawn(image: Image.Image, objects: Drawn) -> Image.Image:
    """Draw objects on a copy of an RGB picture."""
    image = _with_masks(image, objects)
    width = max(1, round(min(image.size) / 250))
    font = ImageFont.load_default(max(_LEAST_FONT, min(image.size) // 40))
    draw = ImageDraw.Draw(image)
    for box, label, color in reversed(list(zip(objects.boxes.tolist(), objects.labels, objects.colors.tolist()))):
        color = tuple(color)
        left, top, right, bottom = box
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=color, width=width)
        place = draw.textbbox((left, top), label, font=font)
        draw.rectangle(place, fill=color)
        draw.text((left, top), label, font=font, fill=_PAPER if sum(color) < 3 * _DARK else (0, 0, 0))
    return image


def _with_masks(image: Image.Image, objects: Drawn) -> Image.Image:
    if not objects.masks:
        return image.copy()
    pixels = np.array(image)
    for mask, color in reversed(list(zip(objects.masks, objects.colors))):
        pixels[mask] = np.round((1 - ALPHA) * pixels[mask] + ALPHA * color).astype('uint8')
    return Image.fromarray(pixels)
