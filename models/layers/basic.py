# SPDX-License-Identifier: Apache-2.0
"""Linear layer and LayerNorm, which use the operators in C++ on the CPU."""

from __future__ import annotations

from paddle import Tensor, nn

import ops


class Linear(nn.Linear):
    """[..., C] -> [..., D]; parameters and values as of `paddle.nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return ops.linear(x, self.weight, self.bias) if ops.usable(x) else super().forward(x)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension; parameters and values as of `paddle.nn.LayerNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if ops.usable(x):
            return ops.layer_norm(x, self.weight, self.bias, self._epsilon)
        return super().forward(x)
