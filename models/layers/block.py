# SPDX-License-Identifier: Apache-2.0
"""The block of the Vision Transformer (https://arxiv.org/abs/2010.11929), with all that plugs into it."""

from __future__ import annotations

from paddle import Tensor, nn
from paddle.nn import initializer

from models.layers.attention import Attention
from models.layers.drop_path import DropPath
from models.layers.mlp import Mlp
from models.layers.token_reduction import EViTReducer, Observed, TokenState
from models.layers.tome import ToMeReducer

NORM_EPS = 1e-6


class Block(nn.Layer):
    """Pre-norm Transformer block: mix the tokens, reduce their number, then a perceptron on each.

    Args:
        dim: channels C.
        num_heads: heads of the attention.
        mlp_ratio: hidden channels of the perceptron / C.
        qkv_bias: biases of query, key and value.
        drop_rate: dropout of the projections.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of both branches.
        attention: False: the block is built without one and doubles its input instead.
        reducer: called between the two branches; None: all tokens stay.
        key_bias: see `Attention`.
        bias_grid: likewise.
        layer_scale: initial factor of each channel of both branches (CaiT); None: there are no such factors.

    Attributes:
        merger: called after the reducer; None: no tokens are merged.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attention: bool = True,
        reducer: EViTReducer | None = None,
        key_bias: bool = True,
        bias_grid: tuple[int, int] | None = None,
        layer_scale: float | None = None,
    ):
        super().__init__()
        if attention:
            self.norm1 = nn.LayerNorm(dim, epsilon=NORM_EPS)
            self.attn = Attention(dim, num_heads, qkv_bias, attn_drop_rate, drop_rate, key_bias, bias_grid)
        self.norm2 = nn.LayerNorm(dim, epsilon=NORM_EPS)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), drop_rate)
        self.drop_path = DropPath(drop_path_rate)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            if attention:
                self.gamma_1 = self.create_parameter([dim], default_initializer=initializer.Constant(layer_scale))
            self.gamma_2 = self.create_parameter([dim], default_initializer=initializer.Constant(layer_scale))
        self.reducer = reducer
        self.merger: ToMeReducer | None = None
        self.weigh_attention(1.0)

    def weigh_attention(self, weight: float, identity: float | None = None) -> None:
        """The following passes compute identity * x + weight * attention(x), identity being 2 - weight (arXiv 2404.05657).

        With weight 0 the attention is not computed, and no tokens are reduced.
        """
        self.attn_weight = weight
        self.identity_weight = 2.0 - weight if identity is None else identity

    def forward(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """[B, N, C] -> [B, N', C] and the state that the next block starts from."""
        if self.attn_weight:
            x, state = self._attend(x, state)
        else:
            x = self.identity_weight * x
        x = x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma_2))
        return x, state._replace(counts=(*state.counts, state.num_body), keys=None)

    def _attend(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        reduces = self.reducer is not None and self.reducer.acts(state)
        merges = self.merger is not None
        observed = len(state.counts) in state.observe
        key_bias = self.merger.key_bias(state) if merges else None
        seen = self.norm1(x)
        mixed, maps = self.attn(
            seen, need_maps=reduces or observed, need_keys=merges, key_bias=key_bias, bias=state.bias
        )
        if observed:
            state = state._replace(observed=(*state.observed, Observed(seen, maps.logits)))
        mixed = self.drop_path(_scaled(mixed, self.gamma_1))
        x = x + mixed if self.attn_weight == 1 else self.identity_weight * x + self.attn_weight * mixed
        if reduces:
            x, state = self.reducer(x, maps, state._replace(keys=maps.keys))
        elif merges:
            state = state._replace(keys=maps.keys)
        if merges and self.merger.acts(state):
            x, state = self.merger(x, state)
        return x, state


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else branch * gamma
