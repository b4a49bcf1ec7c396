# SPDX-License-Identifier: Apache-2.0
"""EViT: "Not All Patches are What You Need", https://arxiv.org/abs/2202.07800, section 3.

The tokens with the lowest attention from the class token are dropped, or fused into one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor

from models.layers.tokens import TokenReducer, TokenState, check_keep_rates, per_block, take_tokens
from utils.errors import UserError


@dataclass(frozen=True)
class EViTSpec:
    """EViT in all blocks with attention.

    Attributes:
        keep_rate: share of the body tokens that each block keeps: one number, or one per block.
        fuse: fuse the other tokens into one instead of dropping them.
    """

    keep_rate: float | Sequence[float] = 1.0
    fuse: bool = False

    def build(self, depth: int, layers: Sequence[int]) -> dict[int, EViTReducer]:
        """Return the reducer of each block in `layers`, the blocks with attention."""
        rates = per_block('keep_rate', self.keep_rate, depth)
        check_keep_rates(rates)
        return {layer: EViTReducer(layer, rates[layer], self.fuse) for layer in layers}


class EViTReducer(TokenReducer):
    """Keep the tokens with the highest class attention; drop the others or fuse them into one token.

    Args:
        block: number of the block, from 0.
        keep_rate: share of the body tokens to keep, in (0, 1]; 1: this block reduces only when a pass names `tokens`.
        fuse: append the attention-weighted sum of the other tokens, with `TokenState.size` 1.
    """

    needs = ('weights',)

    def __init__(self, block: int, keep_rate: float = 1.0, fuse: bool = False):
        super().__init__()
        self.block = block
        self.keep_rate = keep_rate
        self.fuse = fuse

    @property
    def reduces(self) -> bool:
        """See `TokenReducer`."""
        return self.keep_rate < 1

    def num_kept(self, state: TokenState) -> int:
        """Return the number of body tokens to keep, computed in Python: a tensor rounds the product differently."""
        asked = state.tokens[self.block] if state.tokens else None
        if asked is not None:
            if not 1 <= asked <= state.num_body:
                raise UserError(f'block {self.block} cannot keep {asked} of {state.num_body} tokens.')
            return asked
        rate = state.keep_rates[self.block] if state.keep_rates else None
        rate = self.keep_rate if rate is None else rate
        return math.ceil(rate * state.num_body) if self.keep_rate < 1 and rate < 1 else state.num_body

    def acts(self, state: TokenState) -> bool:
        """See `TokenReducer`."""
        return self.num_kept(state) < state.num_body

    def needs_class_attention(self, state: TokenState) -> bool:
        """See `TokenReducer`."""
        return self.acts(state)

    def forward(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """[B, num_prefix + num_body, C] -> [B, num_prefix + k (+ 1 fused), C]: prefix, kept by attention, fused."""
        k = self.num_kept(state)
        scores = state.class_attention[:, state.num_prefix :]
        # Stable: tokens with equal scores keep their order.
        order = paddle.argsort(scores.detach(), axis=-1, descending=True, stable=True)
        kept, rest = order[:, :k], order[:, k:]
        # Attention weights without normalization, as upstream; gradients flow through them.
        weights = take_tokens(scores.unsqueeze(-1), rest) if self.fuse else None

        def reduce(tokens: Tensor | None, fused: Callable[[Tensor], Tensor]) -> Tensor | None:
            if tokens is None:
                return None
            prefix, body = tokens[:, : state.num_prefix], tokens[:, state.num_prefix :]
            parts = [prefix, take_tokens(body, kept)]
            if self.fuse:
                parts.append(fused(take_tokens(body, rest)).astype(tokens.dtype))
            return paddle.concat(parts, axis=1)

        def weighted_sum(tokens: Tensor) -> Tensor:
            return (tokens * weights).sum(1, keepdim=True)

        return reduce(x, weighted_sum), state._replace(
            num_body=k + int(self.fuse),
            indices=(*state.indices, kept),
            scores=(*state.scores, scores),
            size=reduce(state.size, lambda sizes: paddle.ones([1, 1, 1]).expand([sizes.shape[0], -1, -1])),
            source=reduce(state.source, lambda sources: sources.max(1, keepdim=True)),
            keys=reduce(state.keys, weighted_sum),
            class_attention=None,
            grid=None,
        )

    def extra_repr(self) -> str:
        return f'block={self.block}, keep_rate={self.keep_rate}, fuse={self.fuse}'
