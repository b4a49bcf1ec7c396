# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth (https://arxiv.org/abs/1603.09382)."""

from __future__ import annotations

import paddle
from paddle import nn


class DropPath(nn.Layer):
    """Drop a residual branch for whole samples and scale the kept ones by 1 / (1 - rate); identity in evaluation."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[B, ...] -> [B, ...]."""
        if not self.training or self.rate == 0:
            return x
        keep = 1.0 - self.rate
        shape = [x.shape[0]] + [1] * (x.ndim - 1)
        # In float32: float16 has too few values in [0, 1) for the exact rate.
        mask = paddle.floor(paddle.rand(shape, 'float32') + keep) / keep
        return x * mask.astype(x.dtype)

    def extra_repr(self) -> str:
        return f'rate={self.rate}'


def drop_path_rates(rate: float, depth: int, ramp: bool = True) -> list[float]:
    """Return the rate of each block: constant, or with `ramp` linear from 0 (first block) to `rate` (last block)."""
    if not ramp:
        return [rate] * depth
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
