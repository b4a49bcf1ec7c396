# SPDX-License-Identifier: Apache-2.0
"""Write the images of docs/visualize.md: crops of scikit-learn's two sample photographs, each with a ball painted in.

    python docs/figures/balls.py balls

The class is the color of the ball: 400 training and 40 validation images of each of six colors.
"""

from __future__ import annotations

import os
import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIDE = 96  # pixels of an image
COUNTS = {'train': 400, 'val': 40}  # images of each color
COLORS = {
    'blue': (40, 90, 220),
    'cyan': (40, 200, 210),
    'green': (50, 190, 60),
    'magenta': (210, 40, 170),
    'white': (235, 235, 235),
    'yellow': (235, 205, 40),
}


def crop(photograph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random square of a photograph [H, W, 3], resized to SIDE pixels, float32."""
    size = int(rng.integers(120, 300))
    top, left = (int(rng.integers(0, side - size)) for side in photograph.shape[:2])
    picture = Image.fromarray(photograph[top : top + size, left : left + size])
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), 'float32')


def paint_ball(pixels: np.ndarray, color: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Add a ball, lit from the upper left, to pixels [SIDE, SIDE, 3]."""
    radius = rng.uniform(13, 20)
    x, y = rng.uniform(radius, SIDE - radius, 2)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    right, down = (columns - x) / radius, (rows - y) / radius
    depth = np.sqrt(np.clip(1 - right**2 - down**2, 0, 1))
    light = np.clip(0.6 * depth - 0.5 * right - 0.6 * down, 0, 1)
    shaded = np.asarray(color) * (0.35 + 0.65 * light)[..., None] + 120 * light[..., None] ** 12
    inside = np.clip(radius * (1 - np.hypot(right, down)) + 0.5, 0, 1)[..., None]  # anti-aliased edge
    return inside * shaded + (1 - inside) * pixels


def main(folder: str) -> None:
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for split, count in COUNTS.items():
        for name, color in COLORS.items():
            os.makedirs(os.path.join(folder, split, name), exist_ok=True)
            for number in range(count):
                pixels = paint_ball(crop(photographs[number % 2], rng), color, rng)
                image = Image.fromarray(np.clip(pixels, 0, 255).astype('uint8'))
                image.save(os.path.join(folder, split, name, f'{number:03}.png'))
    print(folder)


if __name__ == '__main__':
    main(*sys.argv[1:])
