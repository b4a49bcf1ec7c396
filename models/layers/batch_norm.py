# SPDX-License-Identifier: Apache-2.0
"""Synchronized batch normalization on GPUs and CPUs; Paddle's SyncBatchNorm has no CPU kernel."""

from __future__ import annotations

import math

import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.nn import initializer

from utils.errors import UserError


class SyncBatchNorm(nn.Layer):
    """Normalize each channel of [B, C] or [B, C, H, W] over the images of all processes, in float32 for any input.

    Training uses the biased variance of the global batch. Evaluation uses running statistics, updated by running <-
    (1 - momentum) * running + momentum * batch with the unbiased variance (as in PyTorch; Paddle's layer uses the biased
    one). Processes may have different batch sizes. Gradients flow through the statistics of all processes.

    Args:
        channels: C.
        affine: scale and shift by learned `weight` and `bias`.
        momentum: weight of a batch in the running statistics.
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
        """[B, C] or [B, C, H, W] -> the same shape.

        Raises:
            UserError: a training batch of maps has one value per channel, so that its variance is 0.
        """
        if x.ndim > 2 and not self.training:
            return F.batch_norm(x, self._mean, self._variance, self.weight, self.bias, epsilon=self.epsilon)
        dtype = x.dtype
        x = x.astype(self._mean.dtype)
        mean, variance = self._batch_statistics(x) if self.training else (self._mean, self._variance)
        x = (x - _broadcast(mean, x)) * _broadcast(paddle.rsqrt(variance + self.epsilon), x)
        if self.weight is not None:
            x = x * _broadcast(self.weight, x) + _broadcast(self.bias, x)
        return x.astype(dtype)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance [C] over all processes, and update the running statistics."""
        others = [axis for axis in range(x.ndim) if axis != 1]
        values = math.prod(x.shape[axis] for axis in others)
        if x.ndim > 2 and values == 1 and not _is_distributed():
            raise UserError(
                'batch normalization has one value per channel, so that its variance is 0: set DATA.BATCH_SIZE to 2 or '
                'more, or use more processes.'
            )
        sums = _all_reduce(paddle.concat([x.sum(others), paddle.full([1], values, x.dtype)]))
        mean, count = sums[:-1] / sums[-1:], sums[-1:].detach()
        variance = _all_reduce(paddle.square(x - _broadcast(mean, x)).sum(others)) / count
        with paddle.no_grad():
            unbiased = variance * (count / paddle.clip(count - 1, min=1.0))
            keep = 1 - self.momentum
            self._update_running_statistics(
                keep * self._mean + self.momentum * mean, keep * self._variance + self.momentum * unbiased
            )
        return mean, variance

    def _update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Set the running statistics where they are finite: a step with NaN or infinite values is skipped."""
        for running, new in ((self._mean, mean), (self._variance, variance)):
            paddle.assign(paddle.where(paddle.isfinite(new), new, running), running)


class _AllReduceSum(paddle.autograd.PyLayer):
    """Differentiable all-reduce (sum). Every rank uses the sum, so the gradients of all ranks are summed too."""

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


def _is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _all_reduce(x: Tensor) -> Tensor:
    return _AllReduceSum.apply(x) if _is_distributed() else x


def _broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Reshape [C] so that it broadcasts over x [B, C, ...]."""
    return values if x.ndim == 2 else values.reshape([-1, *[1] * (x.ndim - 2)])
