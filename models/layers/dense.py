# SPDX-License-Identifier: Apache-2.0
"""Linear and LayerNorm, with faster gradients where they are trained on a CPU.

Paddle 3.3's CPU kernels that sum over rows, for the gradient of a bias and for all of LayerNorm's, take several times
as long as the same sums written as products with a vector of ones. The numbers agree to float32 rounding. Everywhere
else, on GPU, in evaluation, in exported models, and for small inputs, these are Paddle's own layers.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer

SMALL = 2**16  # numbers in an input below which calling Python in the backward pass costs more than it saves


def _worthwhile(layer: nn.Layer, x: Tensor) -> bool:
    return (
        layer.training
        and paddle.in_dynamic_mode()
        and paddle.is_grad_enabled()
        and x.place.is_cpu_place()
        and x.size >= SMALL
        and not any(parameter.stop_gradient for parameter in layer.parameters(include_sublayers=False))
    )


class Linear(nn.Linear):
    """nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.bias is not None and _worthwhile(self, x):
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if _worthwhile(self, x):
            return _LayerNorm.apply(x, self.weight, self.bias, self._epsilon)
        return super().forward(x)


class _Linear(PyLayer):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wants_x = not x.stop_gradient
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensor()
        x_rows, dy_rows = x.flatten(0, -2), dy.flatten(0, -2)
        dx = paddle.matmul(dy, weight, transpose_y=True) if ctx.wants_x else None
        return dx, paddle.matmul(x_rows, dy_rows, transpose_x=True), _sum_rows(dy_rows)


class _LayerNorm(PyLayer):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        ctx.wants_x = not x.stop_gradient
        return F.layer_norm(x, [x.shape[-1]], weight, bias, epsilon)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensor()
        rows, grad = x.flatten(0, -2), dy.flatten(0, -2)
        mean = paddle.full([rows.shape[1], 1], 1 / rows.shape[1], rows.dtype)
        centred = rows - paddle.matmul(rows, mean)
        inverse_std = paddle.rsqrt(paddle.matmul(centred * centred, mean) + ctx.epsilon)
        normalised = centred * inverse_std
        product = grad * normalised
        dx = None
        if ctx.wants_x:
            scaled = weight.unsqueeze(-1) * mean
            dx = grad * weight - paddle.matmul(grad, scaled) - normalised * paddle.matmul(product, scaled)
            dx = (dx * inverse_std).reshape(x.shape)
        return dx, _sum_rows(product), _sum_rows(grad)


def _sum_rows(x: Tensor) -> Tensor:
    """[M, C] -> [C], as a product with ones."""
    return paddle.matmul(paddle.ones([1, x.shape[0]], x.dtype), x).flatten()
