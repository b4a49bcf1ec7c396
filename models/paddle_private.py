# SPDX-License-Identifier: Apache-2.0
"""Private API of Paddle: operators with which the host does not wait for a GPU, and attributes of layers.

Checked on Paddle 3.3.1. A later version may rename them: run tests/models/test_paddle_private.py on it first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import paddle
from paddle import Tensor, nn


def roi_align(x: Tensor, boxes: Tensor, counts: Sequence[int], output: tuple[int, int], scale: float) -> Tensor:
    """ROIAlign with adaptive sampling and half-pixel shift; neither pass lets the host wait for a GPU.

    `paddle.vision.ops.roi_align` takes the counts as a tensor, which both passes read. Here they are the level of detail of
    the boxes, which is on the host.

    Args:
        x: [B, C, H, W].
        boxes: [R, 4], sorted by image.
        counts: number of boxes of each image, B numbers.
        output: (rows, columns) of the result.
        scale: cells per unit of the boxes.
    """
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + int(count))
    boxes = boxes.clone()  # the caller's tensor gets no level of detail
    boxes.value().get_tensor().set_lod([ends])
    return paddle._C_ops.roi_align(x, boxes, None, *output, scale, -1, True)


def average_all(averages: Sequence[Tensor], values: Sequence[Tensor], momentum: float) -> None:
    """Set each average to momentum * average + (1 - momentum) * value; a launch on a GPU updates 110 of them.

    The operator is that of SGD with momentum. The averages are its velocities; its weights are zeros that stay zero.

    Args:
        averages, values: float32 tensors of the same shapes.
    """
    place = paddle.device.get_device()
    weights = [_zeros(tuple(average.shape), place) for average in averages]
    rate, no_master_weights, nesterov, no_decay, half = _zeros((1,), place), None, False, [], False
    paddle._C_ops.merged_momentum_(
        weights, list(values), list(averages), [rate], no_master_weights, momentum, nesterov, no_decay, no_decay, half,
        1.0 - momentum,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], place: str) -> Tensor:
    """Return zeros on the current device, `place`."""
    return paddle.zeros(shape)


def is_unchanged(layer: nn.Layer) -> bool:
    """Return whether a layer computes what its class does by default: no hook or other `forward` runs, and GELU is exact."""
    hooked = layer._forward_pre_hooks or layer._forward_post_hooks or 'forward' in vars(layer)
    return not hooked and not getattr(layer, '_approximate', False)


def is_patch_projection(conv: nn.Conv2D, channels: int, side: int) -> bool:
    """Return whether a convolution is a linear map of each patch: kernel and stride are `side`, and nothing is padded."""
    shape_fits = conv.weight.shape[1:] == [channels, side, side] and conv._stride == [side, side]
    whole = conv._padding_algorithm == 'EXPLICIT' and not any(conv._updated_padding) and conv._dilation == [1, 1]
    return shape_fits and whole and conv._padding_mode == 'zeros' and conv._data_format == 'NCHW'
