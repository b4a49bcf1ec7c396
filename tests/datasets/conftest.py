# SPDX-License-Identifier: Apache-2.0
"""Small data on disk, and configurations that read them."""

import os

import numpy as np
import pytest
from PIL import Image

from config import get_config


@pytest.fixture
def write_image():
    """`write_image(path, number=0, size=(w, h))` writes a picture that differs for each number."""

    def write(path, number: int = 0, size: tuple[int, int] = (24, 20)) -> None:
        os.makedirs(os.path.dirname(str(path)), exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(str(path))

    return write


@pytest.fixture
def list_data(tmp_path, write_image):
    """`list_data(n, broken=())`: list files of n pictures, label = number % 3; those in `broken` are not images."""

    def make(count: int, broken: tuple[int, ...] = ()):
        lines = []
        for number in range(count):
            path = tmp_path / 'images' / f'picture {number}.png'
            if number in broken:
                path.parent.mkdir(exist_ok=True)
                path.write_text('no image')
            else:
                write_image(path, number)
            lines.append(f'images/picture {number}.png {number % 3}\n')
        for split in ('train', 'val'):
            (tmp_path / f'{split}_list.txt').write_text(''.join(lines))
        return tmp_path

    return make


@pytest.fixture
def make_config():
    """`make_config(path, KEY=value, ...)`: 16-pixel images in batches of 4, '__' for the dots of keys."""

    def make(path, **keys):
        opts = {
            'DATA.DATASET': 'list',
            'DATA.DATA_PATH': str(path),
            'DATA.IMAGE_SIZE': 16,
            'DATA.CROP': 'resized',
            'DATA.BATCH_SIZE': 4,
            'DATA.NUM_WORKERS': 0,
            **{key.replace('__', '.'): value for key, value in keys.items()},
        }
        return get_config(None, [item for pair in opts.items() for item in pair])

    return make
