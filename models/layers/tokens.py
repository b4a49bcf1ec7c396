# SPDX-License-Identifier: Apache-2.0
"""Tokens on their way through the blocks of a Vision Transformer: the state of a pass, and what reduces their number."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import paddle
from paddle import Tensor, nn

from models.layers.intermediates import BlockIntermediates
from utils.errors import UserError
from utils.registry import Registry

REDUCERS = Registry('token reducer')
register_reducer = REDUCERS.register  # of a function: MODEL of a configuration -> `ReducerSpec`, None where it is off


class TokenState(NamedTuple):
    """What a forward pass knows about its tokens; each block returns the next state.

    Attributes:
        num_prefix: class and distillation tokens, which stay.
        num_body: tokens after them.
        keep_rates: EViT keep rate of each block in this pass; None: the block's own.
        tokens: EViT, number of body tokens that each block keeps; None: the keep rate decides.
        counts: number of body tokens after each block so far.
        indices: positions of the tokens kept by each reduction that drops some, counted from 0 in the body before it, [B, k]
            int64.
        scores: attention of the class token to the body, mean over the heads, at each reduction, [B, num_body].
        size: number of the first tokens that each token stands for, [B, N, 1]; None: one, nothing was merged yet (ToMe).
        source: which of the first tokens are in each token, [B, N, N0] of 0 and 1; None: not traced.
        grid: (rows, columns) of the patches while the body is all of them in order; None: it is not.
        bias: added to the attention logits of every block, [H, N, N]; None: nothing.
        keys: mean over the heads of the keys of the current block, [B, N, D]; None: no reducer needs them.
        class_attention: attention of the class token to all tokens in the current block, mean over the heads, [B, N];
            None: no reducer needs it.
        want: number of a block -> names of the `BlockIntermediates` to record there.
        recorded: what was recorded, in the order of the blocks.
    """

    num_prefix: int
    num_body: int
    keep_rates: Sequence[float | None] = ()
    tokens: Sequence[int | None] = ()
    counts: tuple[int, ...] = ()
    indices: tuple[Tensor, ...] = ()
    scores: tuple[Tensor, ...] = ()
    size: Tensor | None = None
    source: Tensor | None = None
    grid: tuple[int, int] | None = None
    bias: Tensor | None = None
    keys: Tensor | None = None
    class_attention: Tensor | None = None
    want: Mapping[int, Collection[str]] = MappingProxyType({})
    recorded: tuple[BlockIntermediates, ...] = ()

    @property
    def is_reduced(self) -> bool:
        """Whether tokens were dropped, fused or merged so far."""
        return bool(self.indices) or self.size is not None


class ReducerSpec(Protocol):
    """Plain description of a token reducer."""

    def build(self, depth: int, layers: Sequence[int]) -> Mapping[int, TokenReducer]:
        """The reducer of each block that has one, of `layers`, the blocks with a mixer."""


class TokenReducer(nn.Layer):
    """Reduces the number of tokens between the mixer and the MLP of a block. A block runs its reducers in order.

    Attributes:
        needs: names of the `AttentionMaps` that it reads from `TokenState`: 'keys', or 'weights' for `class_attention`.
        reduces: False: the reducer does nothing unless a pass asks for it.
    """

    needs: Collection[str] = ()
    reduces: bool = True

    def acts(self, state: TokenState) -> bool:
        """Whether tokens are reduced in this pass."""
        raise NotImplementedError

    def needs_class_attention(self, state: TokenState) -> bool:
        """Whether this pass needs the attention weights, which a fused attention kernel does not return."""
        return False

    def key_bias(self, state: TokenState) -> Tensor | None:
        """Bias of the attention logits for each key, [B, 1, 1, N]; None: nothing."""
        return None

    def forward(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """[B, N, C] -> [B, N', C] and the state of the remaining tokens."""
        raise NotImplementedError


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, k] of x [B, N, C] -> [B, k, C]. On flat rows: several times faster than `take_along_axis`."""
    start = paddle.arange(x.shape[0], dtype=index.dtype).unsqueeze(-1) * x.shape[1]
    rows = paddle.gather(x.flatten(0, 1), (index + start).flatten())
    return rows.reshape([-1, index.shape[1], x.shape[2]])


def keep_tokens(x: Tensor, state: TokenState, index: Tensor) -> tuple[Tensor, TokenState]:
    """Drop all body tokens but those at the positions `index` [B, k], from 0, of x [B, N, C] and of the state."""
    prefix = paddle.arange(state.num_prefix, dtype=index.dtype).expand([x.shape[0], -1])
    rows = paddle.concat([prefix, index + state.num_prefix], axis=1)

    def kept(tokens: Tensor | None) -> Tensor | None:
        return None if tokens is None else take_tokens(tokens, rows)

    attention = state.class_attention
    return kept(x), state._replace(
        num_body=index.shape[1],
        indices=(*state.indices, index),
        size=kept(state.size),
        source=kept(state.source),
        keys=kept(state.keys),
        class_attention=None if attention is None else kept(attention.unsqueeze(-1)).squeeze(-1),
        grid=None,
    )


def per_block(name: str, value, depth: int) -> list:
    """One value per block; a single value is repeated. Raises UserError for another number of values."""
    values = [value] * depth if value is None or isinstance(value, (int, float)) else list(value)
    if len(values) != depth:
        raise UserError(f'{name} has {len(values)} values for {depth} blocks.')
    return values


def check_keep_rates(rates: Sequence[float | None]) -> None:
    """Raises UserError for a keep rate outside (0, 1]."""
    wrong = [rate for rate in rates if rate is not None and not 0 < rate <= 1]
    if wrong:
        raise UserError(f'keep_rate is {wrong[0]}, but must lie in (0, 1].')
