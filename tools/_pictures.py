# SPDX-License-Identifier: Apache-2.0
"""Shared code of the tools that draw single images."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np
import paddle
from yacs.config import CfgNode

from datasets import Batch
from datasets.batch import to_device
from datasets.dataset import FileStorage, Images
from datasets.images import UnreadableImage
from datasets.transforms import build_transform
from utils.errors import UserError
from utils.text import one_line


def readable(paths: Sequence[str], config: CfgNode) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the index of each readable image and its pixels after the transform of evaluation, [H, W, C] uint8.

    Prints why an image cannot be read.

    Raises:
        UserError: after the last image, if none could be read.
    """
    files = Images(FileStorage('', paths), source='the list of images').with_channels(config.DATA.IMAGE_CHANNELS)
    transform, found = build_transform(config, training=False), 0
    for index, path in enumerate(paths):
        try:
            picture = files.picture(index, config.DATA.EXIF_ROTATE)
            pixels = transform.image(picture, np.random.default_rng(0))
        except UnreadableImage as error:
            print(f'{one_line(path)}: {error}', file=sys.stderr)
            continue
        found += 1
        yield index, pixels
    if not found:
        raise UserError(f"none of the {len(paths)} images can be read; '{paths[0]}' is the first.")


def single_batch(image: np.ndarray, config: CfgNode) -> paddle.Tensor:
    """Convert pixels [H, W, C] uint8 to normalized model input [1, C, H, W]."""
    batch = Batch(image[np.newaxis], targets={}, indices=np.zeros(1, 'int64'))
    return to_device(batch, config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD).images
