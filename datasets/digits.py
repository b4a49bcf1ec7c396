# SPDX-License-Identifier: Apache-2.0
"""The embedded default: scikit-learn's 1797 handwritten digits, 8 x 8 pixels, ten classes, without a download.

They are written once as PNG files, so that they use the same code as other data sets:
`$LEANVIT_CACHE/digits/{train,val}/<digit>/<number>.png`, by default below ~/.cache/leanvit. Every fifth image of each digit
belongs to the validation split.
"""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from datasets.dataset import Dataset
from datasets.embedded import load_digits, written_once
from datasets.folder import class_folders, image_folder
from datasets.registry import register_dataset

_HELD_OUT = 5  # every fifth image of a class


@register_dataset('digits')
def build_digits(config, split: str) -> Dataset:
    """scikit-learn's digits; ignores DATA_PATH."""
    folder = os.path.join(digits_folder(), split)
    return image_folder(folder, class_folders(folder))


def digits_folder() -> str:
    """Return the folder with `train/` and `val/`, which the first call writes."""
    return written_once('digits', _write_digits)


def _write_digits(folder: str) -> None:
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    seen = [0] * 10
    for number, (picture, label) in enumerate(zip(pixels, digits.target)):
        seen[label] += 1
        split = 'train' if seen[label] % _HELD_OUT else 'val'
        parent = os.path.join(folder, split, str(label))
        os.makedirs(parent, exist_ok=True)
        Image.fromarray(picture).save(os.path.join(parent, f'{number:04d}.png'))
