# SPDX-License-Identifier: Apache-2.0
"""Private operators of Paddle give what its public API gives."""

import contextlib

import numpy as np
import paddle
import pytest

from models import paddle_private


@pytest.mark.parametrize('counts', [[1, 0, 3], [4, 0, 0], [0, 0, 0]])
def test_roi_align(counts):
    """Outputs and gradients; the boxes of the caller are not changed."""
    rng = np.random.default_rng(0)
    x = paddle.to_tensor(rng.standard_normal((3, 2, 9, 8)).astype('float32'), stop_gradient=False)
    corners = rng.uniform(0, 20, (sum(counts), 2))
    boxes = paddle.to_tensor(
        np.concatenate([corners, corners + rng.uniform(1, 12, corners.shape)], 1).astype('float32')
    )
    numbers = paddle.to_tensor(counts, 'int32')
    results = []
    for pooled in (
        paddle_private.roi_align(x, boxes, counts, (3, 2), 0.25),
        paddle.vision.ops.roi_align(x, boxes, numbers, (3, 2), 0.25, sampling_ratio=-1, aligned=True),
    ):
        results.append([pooled])
        if sum(counts):
            (pooled * paddle.arange(pooled.size, dtype='float32').reshape(pooled.shape).sin()).sum().backward()
            results[-1].append(x.grad.clone())
            x.clear_gradient()
    for found, expected in zip(*results):
        np.testing.assert_array_equal(found, expected)
    assert results[0][0].shape == [sum(counts), 2, 3, 2] and boxes.value().get_tensor().lod() == []
    with pytest.raises(ValueError) if len(boxes) else contextlib.nullcontext():
        paddle_private.roi_align(x, boxes, [len(boxes), 1, 0], (3, 2), 0.25)
