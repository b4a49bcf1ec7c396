# SPDX-License-Identifier: Apache-2.0
"""The embedded default: scikit-learn's 1797 handwritten digits, 8 x 8 pixels, ten classes, nothing to download.

They are written once as a tree of PNG files, so that training on them runs through the same code as any other data:
`$LEANVIT_CACHE/digits/{train,val}/<digit>/<number>.png`, by default below ~/.cache/leanvit. The validation part is every
fifth picture of each digit.
"""

from __future__ import annotations

import os
import shutil
import tempfile

import numpy as np
from PIL import Image

from datasets.dataset import Dataset
from datasets.folder import class_folders, image_folder
from datasets.registry import register_dataset
from utils.errors import UserError

_HELD_OUT = 5  # every fifth picture of a class


@register_dataset('digits')
def build_digits(config, split: str) -> Dataset:
    """scikit-learn's digits; DATA_PATH is not used."""
    folder = os.path.join(digits_folder(), split)
    return image_folder(folder, class_folders(folder))


def digits_folder() -> str:
    """The folder with `train/` and `val/`, written at the first call. Several processes may call at the same time."""
    cache = os.environ.get('LEANVIT_CACHE') or os.path.join(os.path.expanduser('~'), '.cache', 'leanvit')
    folder = os.path.join(cache, 'digits')
    if os.path.isdir(folder):
        return folder
    try:
        os.makedirs(cache, exist_ok=True)
        unfinished = tempfile.mkdtemp(prefix='.digits-', dir=cache)
    except OSError as error:
        raise UserError(f"cannot write to the data cache '{cache}' ({error.strerror}); set LEANVIT_CACHE.") from None
    try:
        _write_digits(unfinished)
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, folder)
    except OSError as error:
        if not os.path.isdir(folder):  # otherwise another process was faster, with the same files
            raise UserError(f"cannot write the digits to '{folder}': {error.strerror}; set LEANVIT_CACHE.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_digits(folder: str) -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError('the digits data set needs scikit-learn: pip install scikit-learn.') from None
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    seen = [0] * 10
    for number, (picture, label) in enumerate(zip(pixels, digits.target)):
        seen[label] += 1
        split = 'train' if seen[label] % _HELD_OUT else 'val'
        parent = os.path.join(folder, split, str(label))
        os.makedirs(parent, exist_ok=True)
        Image.fromarray(picture).save(os.path.join(parent, f'{number:04d}.png'))
