# SPDX-License-Identifier: Apache-2.0
"""Initialization of the patch embedding from weights for another number of image channels, as in timm.

For gray images, the sum of the weights over the channels gives the result for an RGB image of three equal channels. For more
channels, the weights of the file are repeated in turn, and scaled so that equal channels give equal results.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from paddle import Tensor

from models.weights.rules import WeightRules
from utils.formats import bfloat16


def adapt_channels(
    rules: WeightRules, targets: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Adapt the convolutions of the image, `rules.input_weights`, to the channels of the model.

    Args:
        targets: state dict of the model.
        arrays: name in the model -> array.

    Returns:
        The arrays, and a line for the log for each that changed.
    """
    result, lines = dict(arrays), []
    for name, array in arrays.items():
        if not name.endswith(rules.input_weights) or name not in targets or not _differs(array, targets[name]):
            continue
        theirs, ours = array.shape[1], targets[name].shape[1]
        result[name] = adapted_channels(array, ours)
        how = 'summed' if ours == 1 else f'repeated in turn, times {theirs}/{ours}'
        lines.append(f'{name} adapted from {theirs} to {ours} image channels (DATA.IMAGE_CHANNELS): {how}')
    return result, lines


def _differs(array: np.ndarray, target: Tensor) -> bool:
    """Return True if an array can be adapted: only the number of channels differs, and the model has one channel or more."""
    wanted = target.shape
    same = array.ndim == len(wanted) == 4 and [*array.shape[:1], *array.shape[2:]] == [*wanted[:1], *wanted[2:]]
    floats = array.dtype.kind == 'f' or array.dtype == np.uint16
    return same and floats and 0 < array.shape[1] != wanted[1] and (wanted[1] == 1 or wanted[1] > array.shape[1])


def adapted_channels(weight: np.ndarray, channels: int) -> np.ndarray:
    """[C, m, h, w] -> [C, channels, h, w] float32: the sum over the m channels for one channel, else repeated times m / channels."""
    weight = bfloat16.to_float32(weight) if weight.dtype == np.uint16 else weight.astype('float32')
    if channels == 1:
        return weight.sum(1, keepdims=True)
    theirs = weight.shape[1]
    return weight[:, np.arange(channels) % theirs] * np.float32(theirs / channels)
