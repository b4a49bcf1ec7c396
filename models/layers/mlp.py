# SPDX-License-Identifier: Apache-2.0
"""MLP of Transformer blocks."""

from __future__ import annotations

from paddle import Tensor, nn

import ops
from models.layers.basic import Linear, drops, operator_replaces
from models.paddle_private import is_unchanged
from utils.errors import UserError


def hidden_channels(dim: int, mlp_ratio: float) -> int:
    """Return int(mlp_ratio * dim), truncated as in the published code. Raises UserError for 0."""
    hidden = int(mlp_ratio * dim)
    if hidden < 1:
        raise UserError(f'MLP_RATIO {mlp_ratio:g} leaves no hidden channels of {dim}; raise it to 1 / {dim} or more.')
    return hidden


def run_mlp(x: Tensor, fc1: nn.Layer, act: nn.Layer, fc2: nn.Layer) -> Tensor:
    """Compute fc2(act(fc1(x))), by one operator if it computes these layers. [..., C] -> [..., D]."""
    if operator_replaces(x, (fc1, act, fc2), (Linear, nn.GELU, Linear)):
        return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return fc2(act(fc1(x)))


class Mlp(nn.Layer):
    """Linear, exact GELU, dropout, Linear, dropout.

    Args:
        dim: channels of input and output.
        hidden_dim: hidden channels.
        drop_rate: rate of both dropouts.
        hidden_dropout: False: only the second dropout (BEiT).
    """

    def __init__(self, dim: int, hidden_dim: int, drop_rate: float = 0.0, hidden_dropout: bool = True):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop_rate)
        self.hidden_drop = self.drop if hidden_dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        kind = type(self.hidden_drop)
        if kind in (nn.Dropout, nn.Identity) and is_unchanged(self.hidden_drop) and not drops(self.hidden_drop):
            return self.drop(run_mlp(x, self.fc1, self.act, self.fc2))
        return self.drop(self.fc2(self.hidden_drop(self.act(self.fc1(x)))))
