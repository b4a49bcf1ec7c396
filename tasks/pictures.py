# SPDX-License-Identifier: Apache-2.0
"""Pictures of images: pixels of model inputs, grids, and sheets of training images with captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle
from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels around each picture
BACKGROUND = 255  # white
MASKED = 190  # gray of masked patches
INK = (0, 0, 0)
_LEAST_SIDE = 112  # pixels; smaller pictures of a sheet are enlarged by a whole factor
_CUT = '…'


class Shown(NamedTuple):
    """A training image as the loss gets it.

    Attributes:
        pictures: [H, W, 3] uint8, side by side: views, or an image with its masked patches or label map.
        caption: class or other target.
    """

    pictures: Sequence[np.ndarray]
    caption: str


def pixels(x: paddle.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Denormalize: [B, C, H, W] -> [B, H, W, C] uint8."""
    channels = x.shape[1]
    x = x.astype('float32').transpose([0, 2, 3, 1]).numpy() * np.asarray(std[:channels]) + np.asarray(mean[:channels])
    return np.clip(np.round(255 * x), 0, 255).astype('uint8')


def as_image(shown: np.ndarray) -> Image.Image:
    """Return pixels [H, W, C] uint8 as a picture: of one or two channels the first, in gray, else the first three as RGB."""
    return Image.fromarray(np.ascontiguousarray(shown[..., 0] if shown.shape[-1] < 3 else shown[..., :3]))


def image_grid(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Arrange pictures [H, W, C] in rows and columns; pictures of a row have the same size."""
    widths = [max(row[0].shape[1] for row in rows)] * len(rows[0])
    heights = [row[0].shape[0] for row in rows]
    sheet = Image.new(
        'RGB', (sum(widths) + GAP * (len(widths) + 1), sum(heights) + GAP * (len(rows) + 1)), (BACKGROUND,) * 3
    )
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(as_image(picture), (GAP * (j + 1) + sum(widths[:j]), GAP * (i + 1) + sum(heights[:i])))
    return sheet


# ---------------------------------------------------------------------------------------------------- sheets
def rgb(x: paddle.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Denormalize: [B, C, H, W] -> [B, H, W, 3] uint8. One or two channels: the first in gray; more: the first three."""
    shown = pixels(x, mean, std)
    return shown[..., :3] if shown.shape[-1] > 2 else shown[..., :1].repeat(3, axis=-1)


def contact_sheet(examples: Sequence[Shown], columns: int) -> Image.Image:
    """Draw training images with their captions, `columns` of them in a row; all have pictures of the same sizes."""
    tiles = [_tile(example) for example in examples]
    return image_grid([tiles[start : start + columns] for start in range(0, len(tiles), columns)])


def enlargement(size: Sequence[int]) -> int:
    """Return the factor by which a sheet enlarges a picture of `size` (height, width), so that captions can be read."""
    return max(1, -(-_LEAST_SIDE // min(size)))


def enlarged(picture: np.ndarray) -> np.ndarray:
    """Enlarge a small picture [H, W, 3] by `enlargement`."""
    factor = enlargement(picture.shape[:2])
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _tile(example: Shown) -> np.ndarray:
    """Draw an example: its enlarged pictures side by side, the caption below."""
    pictures = [enlarged(picture) for picture in example.pictures]
    gap, margin = (np.full((pictures[0].shape[0], width, 3), BACKGROUND, 'uint8') for width in (GAP // 2, 2 * GAP))
    parts = [part for picture in pictures for part in (picture, gap)]
    row = np.concatenate([*parts[:-1], margin], axis=1)
    size = max(11, min(pictures[0].shape[:2]) // 14)  # pixels
    strip = Image.new('RGB', (row.shape[1], round(1.6 * size)), (BACKGROUND,) * 3)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(strip).text((1, 0), _fitted(example.caption, font, strip.width - 2), INK, font)
    return np.concatenate([row, np.asarray(strip)])


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the longest start of a text that is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + _CUT) > width:
        text = text[:-1]
    return text + _CUT
