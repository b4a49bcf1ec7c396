# SPDX-License-Identifier: Apache-2.0
"""Linear layer and LayerNorm, which use the operators in C++ on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import Tensor, nn

import ops
from models.paddle_private import is_unchanged

_CPU = paddle.CPUPlace()


class Linear(nn.Linear):
    """[..., C] -> [..., D]; parameters and values as of `paddle.nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if ops.usable(x, self.weight, self.bias):
            return ops.linear(x, self.weight, self.bias)
        return nn.Linear.forward(self, x)  # `super()` of a subclass recurses without end in exported programs


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension; parameters and values as of `paddle.nn.LayerNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if len(self._normalized_shape) == 1 and ops.usable(x, self.weight, self.bias):
            return ops.layer_norm(x, self.weight, self.bias, self._epsilon)
        return nn.LayerNorm.forward(self, x)


def operator_replaces(x: Tensor, layers: Sequence[nn.Layer], classes: Sequence[type]) -> bool:
    """Return whether one operator may compute several layers, see `are_plain`.

    Args:
        x: input of the first layer.
    """
    parameters = (getattr(layer, name, None) for layer in layers for name in ('weight', 'bias'))
    return are_plain(layers, classes) and ops.usable(x, *parameters)


def are_plain(layers: Sequence[nn.Layer], classes: Sequence[type]) -> bool:
    """Return whether layers compute what these classes do: no hook, no subclass such as LoRA's, no other activation."""
    return all(type(layer) is kind and is_unchanged(layer) for layer, kind in zip(layers, classes))


def drops(layer: nn.Layer) -> bool:
    """Return whether a layer is a dropout that drops; Monte Carlo dropout also does so in the evaluation of a model."""
    return isinstance(layer, nn.Dropout) and layer.training and layer.p > 0


def is_on_cpu(x: Tensor) -> bool:
    """Return whether a tensor is on the CPU. Paddle's to_static without `full_graph` fails on `is_cpu_place`."""
    return x.place == _CPU
