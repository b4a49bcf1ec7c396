# SPDX-License-Identifier: Apache-2.0
"""Pictures of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from PIL import Image

GAP = 4  # pixels around each picture
BACKGROUND = 255  # white


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
