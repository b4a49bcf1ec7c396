# SPDX-License-Identifier: Apache-2.0
"""Fewer tokens from block to block. A reducer sits between the attention and the perceptron of a block.

`EViTReducer` is here, `ToMeReducer` in tome.py. EViT: "Not All Patches are What You Need", https://arxiv.org/abs/2202.07800, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import paddle
from paddle import Tensor

from models.layers.attention import AttentionMaps
from utils.errors import UserError


class Observed(NamedTuple):
    """What the attention of a block saw and thought.

    Attributes:
        hidden: its normalised input, [B, N, C].
        logits: its scores before the softmax, [B, H, N, N].
    """

    hidden: Tensor
    logits: Tensor


class TokenState(NamedTuple):
    """What a forward pass knows about its tokens; each block returns the next state.

    Attributes:
        num_prefix: class and distillation tokens, which stay.
        num_body: tokens after them.
        keep_rates: for each block the rate this pass asks for; None: the block's own.
        tokens: for each block the number of body tokens this pass asks for; None: as the rate says.
        counts: body tokens after each block so far.
        indices: for each block that reduced, the positions it kept, [B, k] int64, best first, counted from the first
            body token of its input.
        scores: for each block that reduced, the attention of the class token to the body tokens, [B, num_body].
        size: how many tokens each token stands for, [B, N, 1]; None: one, nothing was merged yet (ToMe).
        source: which of the first tokens are in each token, [B, N, N0] of 0 and 1; None: not asked for.
        keys: of the block at work, a mean over the heads, [B, N, D]; None: no one asks for them.
        bias: added to the logits of each attention, [H, N, N]; None: nothing.
        observe: numbers of the blocks to record.
        observed: what was recorded, in the order of the blocks.
    """

    num_prefix: int
    num_body: int
    keep_rates: Sequence[float | None]
    tokens: Sequence[int | None]
    counts: tuple[int, ...] = ()
    indices: tuple[Tensor, ...] = ()
    scores: tuple[Tensor, ...] = ()
    size: Tensor | None = None
    source: Tensor | None = None
    keys: Tensor | None = None
    bias: Tensor | None = None
    observe: Collection[int] = ()
    observed: tuple[Observed, ...] = ()


class EViTReducer:
    """Keeps the tokens that the class token attends to most; the rest is dropped or fused into one token.

    Args:
        block: number of the block, from 0.
        keep_rate: share of the body tokens to keep, in (0, 1]; 1: this block reduces only when a pass names `tokens`.
        fuse: append the sum of the other tokens, weighted by their attention. It counts as one token (`TokenState.size`).
    """

    def __init__(self, block: int, keep_rate: float = 1.0, fuse: bool = False):
        self.block = block
        self.keep_rate = keep_rate
        self.fuse = fuse

    def num_kept(self, state: TokenState) -> int:
        """How many body tokens the block keeps, in Python numbers: a tensor would round the product differently."""
        asked = state.tokens[self.block]
        if asked is not None:
            if not 1 <= asked <= state.num_body:
                raise UserError(f'block {self.block} cannot keep {asked} of {state.num_body} tokens.')
            return asked
        rate = state.keep_rates[self.block]
        rate = self.keep_rate if rate is None else rate
        return math.ceil(rate * state.num_body) if self.keep_rate < 1 and rate < 1 else state.num_body

    def acts(self, state: TokenState) -> bool:
        """Whether the block reduces in this pass, and needs the attention maps for it."""
        return self.num_kept(state) < state.num_body

    def __call__(self, x: Tensor, maps: AttentionMaps, state: TokenState) -> tuple[Tensor, TokenState]:
        """[B, num_prefix + num_body, C] -> [B, num_prefix + k (+ 1 fused), C]: prefix, kept by attention, fused."""
        k = self.num_kept(state)
        scores = maps.weights[:, :, 0, state.num_prefix :].mean(1)
        # Stable, so that equal scores keep the order of the image.
        order = paddle.argsort(scores.detach(), axis=-1, descending=True, stable=True)
        kept, rest = order[:, :k], order[:, k:]
        # The raw weights, not normalised; the gradient reaches the attention through them.
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
        )


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, k] of x [B, N, C] -> [B, k, C]. On flat rows: several times faster than `take_along_axis`."""
    start = paddle.arange(x.shape[0], dtype=index.dtype).unsqueeze(-1) * x.shape[1]
    rows = paddle.gather(x.flatten(0, 1), (index + start).flatten())
    return rows.reshape([-1, index.shape[1], x.shape[2]])
