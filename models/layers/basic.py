# SPDX-License-Identifier: Apache-2.0
"""Linear layer and LayerNorm, which use the operators in C++ on the CPU."""

from __future__ import annotations

from paddle import Tensor, nn

import ops
from models.paddle_private import is_unchanged


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


_PLAIN = (Linear, LayerNorm, nn.GELU, nn.Conv2D, nn.Dropout, nn.Identity)


def operator_replaces(x: Tensor, *layers: nn.Layer) -> bool:
    """Return whether one operator may compute several layers.

    Args:
        x: input of the first layer.
    """
    return are_plain(*layers) and ops.usable(
        x, *(getattr(layer, name, None) for layer in layers for name in ('weight', 'bias'))
    )


def drops(layer: nn.Layer) -> bool:
    """Return whether a layer is a dropout that drops; Monte Carlo dropout also does so in the evaluation of a model."""
    return isinstance(layer, nn.Dropout) and layer.training and layer.p > 0


def are_plain(*layers: nn.Layer) -> bool:
    """Return whether weights and rates alone define what layers compute: none has a hook or another class, such as LoRA's."""
    return all(type(layer) in _PLAIN and is_unchanged(layer) for layer in layers)
