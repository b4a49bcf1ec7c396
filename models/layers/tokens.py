# SPDX-License-Identifier: Apache-2.0
"""Token state of a forward pass through a Vision Transformer, and token reducers."""

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
register_reducer = REDUCERS.register  # function: config.MODEL -> `ReducerSpec`, or None if disabled


class TokenState(NamedTuple):
    """State of the tokens in a forward pass; each block returns the next state.

    Attributes:
        num_prefix: number of class and distillation tokens, which are never reduced.
        num_body: number of tokens after them.
        keep_rates: EViT keep rate of each block in this pass; None: the block's own.
        tokens: EViT, number of body tokens that each block keeps; None: by the keep rate.
        counts: number of body tokens after each block so far.
        indices: for each reduction that drops tokens, the kept positions in the body before it, from 0, [B, k] int64.
        scores: attention of the class token to the body, mean over the heads, at each reduction, [B, num_body].
        size: token size (ToMe): number of input tokens merged into each token, [B, N, 1]; None: 1.
        source: 1 where a token contains an input token of the model, else 0, [B, N, N0]; None: not traced.
        grid: (rows, columns) of the patches if the body has all of them in order; else None.
        bias: added to the attention logits of every block, [H, N, N]; None: no bias.
        keys: mean over the heads of the keys of the current block, [B, N, D]; None: no reducer needs them.
        class_attention: attention of the class token to all tokens in the current block, mean over the heads, [B, N];
            None: no reducer needs it.
        want: number of a block -> names of the `BlockIntermediates` to record there.
        recorded: recorded intermediates, in the order of the blocks.
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
        """Return whether tokens were dropped, fused or merged so far."""
        return bool(self.indices) or self.size is not None


class ReducerSpec(Protocol):
    """Configuration of a token reducer."""

    def build(self, depth: int, layers: Sequence[int]) -> Mapping[int, TokenReducer]:
        """Return the reducers by block; `layers` are the blocks with a mixer."""


class TokenReducer(nn.Layer):
    """Reduce the number of tokens between the mixer and the MLP of a block. A block runs its reducers in order.

    Attributes:
        needs: names of the required `AttentionMaps`, read from `TokenState`: 'keys', 'weights' (`class_attention`).
        reduces: False: the reducer is inactive unless an argument of the forward pass enables it.
    """

    needs: Collection[str] = ()
    reduces: bool = True

    def acts(self, state: TokenState) -> bool:
        """Return whether tokens are reduced in this pass."""
        raise NotImplementedError

    def needs_class_attention(self, state: TokenState) -> bool:
        """Return whether this pass needs the attention weights of the class token."""
        return False

    def key_bias(self, state: TokenState) -> Tensor | None:
        """Return the bias of the attention logits per key, [B, 1, 1, N]; None: no bias."""
        return None

    def forward(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """[B, N, C] -> [B, N', C] and the state of the remaining tokens."""
        raise NotImplementedError


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens `index` [B, k] of x [B, N, C] -> [B, k, C]. Several times faster than `take_along_axis`."""
    start = paddle.arange(x.shape[0], dtype=index.dtype).unsqueeze(-1) * x.shape[1]
    rows = paddle.gather(x.flatten(0, 1), (index + start).flatten())
    return rows.reshape([-1, index.shape[1], x.shape[2]])


def keep_tokens(x: Tensor, state: TokenState, index: Tensor) -> tuple[Tensor, TokenState]:
    """Keep the body tokens at positions `index` [B, k], from 0, of x [B, N, C] and of the state; drop all others."""
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
    """Return one value per block; a single value is repeated. Raises UserError for a wrong number of values."""
    values = [value] * depth if value is None or isinstance(value, (int, float)) else list(value)
    if len(values) != depth:
        raise UserError(f'{name} has {len(values)} values for {depth} blocks.')
    return values


def check_keep_rates(rates: Sequence[float | None]) -> None:
    """Raise UserError for a keep rate outside (0, 1]."""
    wrong = [rate for rate in rates if rate is not None and not 0 < rate <= 1]
    if wrong:
        raise UserError(f'keep_rate is {wrong[0]}, but must be in (0, 1].')
