# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation over the batches of all processes, on GPUs as on CPUs (Paddle's SyncBatchNorm has no CPU kernel)."""

from __future__ import annotations

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.nn import initializer


class SyncBatchNorm(nn.Layer):
    """Normalises each channel of [B, C] over the images of all processes, in float32 whatever the input is.

    Training uses the biased variance of the whole batch, and evaluation running statistics: running <- (1 - momentum) *
    running + momentum * batch, in which the variance is unbiased (PyTorch; Paddle's own layer keeps the biased one). The
    processes may have batches of different sizes; gradients flow through the statistics of all of them.

    Args:
        channels: C.
        affine: scale and shift the result by learned `weight` and `bias`.
        momentum: share of a batch in the running statistics.
        epsilon: added to the variance.
    """

    def __init__(self, channels: int, affine: bool = True, momentum: float = 0.1, epsilon: float = 1e-5):
        super().__init__()
        self.momentum, self.epsilon = momentum, epsilon
        self.weight = self.bias = None
        if affine:
            self.weight = self.create_parameter([channels], default_initializer=initializer.Constant(1.0))
            self.bias = self.create_parameter([channels], is_bias=True)
        self.register_buffer('_mean', paddle.zeros([channels]))
        self.register_buffer('_variance', paddle.ones([channels]))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] -> [B, C]."""
        dtype = x.dtype
        x = x.astype(self._mean.dtype)
        mean, variance = self._of_the_batch(x) if self.training else (self._mean, self._variance)
        x = (x - mean) * paddle.rsqrt(variance + self.epsilon)
        if self.weight is not None:
            x = x * self.weight + self.bias
        return x.astype(dtype)

    def _of_the_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C] of all processes, which the running statistics take in."""
        sums = _over_processes(paddle.concat([x.sum(0), paddle.full([1], x.shape[0], x.dtype)]))
        mean, count = sums[:-1] / sums[-1:], sums[-1:].detach()
        variance = _over_processes(paddle.square(x - mean).sum(0)) / count
        with paddle.no_grad():
            unbiased = variance * (count / paddle.clip(count - 1, min=1.0))
            for running, batch in ((self._mean, mean), (self._variance, unbiased)):
                batch = paddle.where(paddle.isfinite(batch), batch, running)  # a step that is dropped leaves no trace
                running.scale_(1 - self.momentum)
                running.add_(batch * self.momentum)
        return mean, variance


class _Sum(paddle.autograd.PyLayer):
    """Adds a tensor over the processes. Each of them uses the sum, so its gradient is the sum of all their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _over_processes(x: Tensor) -> Tensor:
    return _Sum.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x
