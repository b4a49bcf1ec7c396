# SPDX-License-Identifier: Apache-2.0
"""Token merging (ToMe, https://arxiv.org/abs/2210.09461): merge similar tokens and track the token size.

Implemented from the description in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor

from models.layers.tokens import TokenReducer, TokenState, take_tokens
from utils.errors import UserError


@dataclass(frozen=True)
class Matching:
    """Result of bipartite soft matching.

    Every `stride`-th token is a destination. All other tokens are candidates. A candidate is either merged into its most
    similar destination or kept. Output order: kept candidates, then destinations. With `swapped`, the first
    destination (distillation token) comes second, after the first candidate (class token).

    Attributes:
        unmerged: positions of the kept candidates, [B, u] int64.
        sources: positions of the merged candidates, [B, r] int64, most similar first.
        destinations: index of the destination of each source, [B, r] int64.
        stride: distance between destinations.
        swapped: see above.
    """

    unmerged: Tensor
    sources: Tensor
    destinations: Tensor
    stride: int = 2
    swapped: bool = False

    def merge(self, x: Tensor, mode: str = 'sum') -> Tensor:
        """[B, N, C] -> [B, u + N // stride, C]: reduce each destination and its sources by sum, mean or amax."""
        destinations = _strided(x, self.stride, self.stride - 1)
        sources = take_tokens(x, self.sources)
        if mode == 'amax':
            index = self.destinations.unsqueeze(-1).expand_as(sources)
            merged = paddle.put_along_axis(destinations, index, sources, axis=1, reduce='amax')
        else:
            merged = self._add(destinations, sources)
            if mode == 'mean':
                merged = merged / self._add(
                    paddle.ones_like(destinations[:, :, :1]), paddle.ones_like(sources[:, :, :1])
                )
        if self.unmerged.shape[1] == 0:
            return merged
        stay = take_tokens(x, self.unmerged)
        if self.swapped:
            return paddle.concat([stay[:, :1], merged[:, :1], stay[:, 1:], merged[:, 1:]], axis=1)
        return paddle.concat([stay, merged], axis=1)

    def unmerge(self, y: Tensor) -> Tensor:
        """[B, u + N // stride, C] -> [B, N, C] in the original order; each source gets a copy of its destination.

        After `match_groups`, N is the largest multiple of the stride.
        """
        staying = self.unmerged.shape[1]
        stay, merged = y[:, :staying], y[:, staying:]
        if self.swapped:
            stay = paddle.concat([y[:, :1], y[:, 2 : staying + 1]], axis=1)
            merged = paddle.concat([y[:, 1:2], y[:, staying + 1 :]], axis=1)
        tokens = paddle.concat([stay, take_tokens(merged, self.destinations), merged], axis=1)
        ends = paddle.arange(merged.shape[1], dtype='int64') * self.stride + (self.stride - 1)
        ends = ends.unsqueeze(0) + paddle.zeros_like(self.destinations[:, :1])
        positions = paddle.concat([self.unmerged, self.sources, ends], axis=1)
        return take_tokens(tokens, paddle.argsort(positions, axis=-1))

    def merge_weighted(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Merge tokens by their mean, weighted by token size.

        Args:
            x: tokens [B, N, C].
            size: token sizes, [B, N, 1]; None: 1.

        Returns:
            Tokens [B, N', C] and their sizes [B, N', 1].
        """
        if size is None:
            size = paddle.ones([1, x.shape[1], 1], x.dtype).expand([x.shape[0], -1, -1])
        else:
            x = x * size
        sums = self.merge(paddle.concat([x, size], axis=-1))  # one merge for both
        merged, merged_size = sums.split([x.shape[2], 1], axis=-1)
        return merged / merged_size, merged_size

    def merge_source(self, source: Tensor) -> Tensor:
        """Merge `TokenState.source`, [B, N, N0] -> [B, N', N0]."""
        return self.merge(source, mode='amax')

    def _add(self, destinations: Tensor, sources: Tensor) -> Tensor:
        """Add each source to its destination. Unlike a matrix product, this rounds only the sum."""
        rows = destinations.shape[1]
        start = paddle.arange(destinations.shape[0], dtype='int64').unsqueeze(-1) * rows
        index, flat, added = (self.destinations + start).flatten(), destinations.flatten(0, 1), sources.flatten(0, 1)
        if paddle.in_dynamic_mode():
            flat = paddle.index_add(flat, index, 0, added)
        else:  # the same sums by an operator that paddle2onnx supports
            flat = paddle.scatter_nd_add(flat, index.unsqueeze(-1), added)
        return flat.reshape([-1, rows, destinations.shape[2]])


def num_merged(tokens: int, r: int, protected: int) -> int:
    """Return the number of tokens to merge: r, but at most half of the unprotected tokens."""
    return max(min(r, (tokens - protected) // 2), 0)


@paddle.no_grad()
def match(metric: Tensor, r: int, class_token: bool = True, distill_token: bool = False) -> Matching | None:
    """Run bipartite soft matching (section 3): candidates are the tokens 0, 2, 4, ..., destinations 1, 3, 5, ...

    Ties are broken by position. No gradient flows through the matching.

    Args:
        metric: features for the cosine similarity, [B, N, D].
        r: number of candidates to merge; see `num_merged`.
        class_token: never merge token 0, and keep the order of the kept candidates; False: order them by falling
            similarity.
        distill_token: never merge into token 1.

    Returns:
        None if there is nothing to merge.
    """
    r = num_merged(metric.shape[1], r, class_token + distill_token)
    first = int(distill_token)
    if r == 0 or metric.shape[1] // 2 <= first:
        return None
    metric = _normalize(metric)
    scores = paddle.matmul(_strided(metric, 2, 0), _strided(metric, 2, 1 + 2 * first), transpose_y=True)
    best, choice = scores.max(-1), scores.argmax(-1) + first
    order = paddle.argsort(best[:, int(class_token) :], axis=-1, descending=True, stable=True)
    sources, stay = order[:, :r], order[:, r:]
    if class_token:  # it was left out of the order
        sources = sources + 1
        stay = paddle.concat([paddle.zeros_like(order[:, :1]), stay.sort(-1) + 1], axis=1)
    return Matching(2 * stay, 2 * sources, paddle.take_along_axis(choice, sources, axis=1), swapped=distill_token)


@paddle.no_grad()
def match_groups(metric: Tensor, k: int) -> Matching:
    """Match all tokens to destinations, the last token of each group of k; drop the last N mod k tokens.

    Args:
        metric: [B, N, D] with N >= k.
        k: length of a group, at least 2.
    """
    rows = metric.shape[1] // k
    metric = _normalize(metric)
    positions = paddle.arange(rows * k, dtype='int64').reshape([rows, k])[:, :-1].flatten()
    candidates = paddle.index_select(metric, positions, axis=1)
    choice = paddle.matmul(candidates, _strided(metric, k, k - 1), transpose_y=True).argmax(-1)
    sources = positions.unsqueeze(0) + paddle.zeros_like(choice)
    return Matching(sources[:, :0], sources, choice, stride=k)


def _normalize(metric: Tensor) -> Tensor:
    """Normalize rows to length 1, at least in float32; zero rows stay zero."""
    metric = metric if metric.dtype == paddle.float64 else metric.astype('float32')
    # Ten times faster than `norm` on CPUs. Inference programs compute `square` in place, which overwrites `metric`.
    norm = (metric * metric).sum(-1, keepdim=True).sqrt()
    return metric / norm.clip(min=1e-30)


def _strided(x: Tensor, step: int, first: int) -> Tensor:
    """Return x[:, first::step] of [B, N, C]; a gather is twenty times faster than this slice on CPUs."""
    return paddle.gather(x, paddle.arange(first, x.shape[1], step, dtype='int64'), axis=1)


def merge_schedule(r: int | Sequence[float], depth: int) -> list[int]:
    """Return the number of tokens to merge in each block.

    Args:
        r: one number for all blocks; a list, padded with 0; or a tuple (r, inflect): linear from r (1 - inflect) to
            r (1 + inflect), so that -1 decreases from 2 r to 0, and 1 increases from 0 to 2 r.
        depth: number of blocks.
    """
    if isinstance(r, tuple):
        r, inflect = r
        low = int(r * (1.0 - inflect))
        step = (2 * r - 2 * low) / max(depth - 1, 1)
        values = [int(low + step * i) for i in range(depth)]
    else:
        values = [r] * depth if isinstance(r, int) else [*r, *[0] * (depth - len(r))]
    wrong = [value for value in values if not isinstance(value, int) or value < 0]
    if wrong:
        raise UserError(
            f'ToMe cannot merge {wrong[0]} tokens in a block (MODEL.TOME gives {values}): use whole numbers from 0.'
        )
    return values


@dataclass(frozen=True)
class ToMeSpec:
    """ToMe in blocks with attention.

    Attributes:
        r: number of tokens to merge, see `merge_schedule`. The merging blocks use the first numbers of the schedule for
            all blocks. All 0: no block merges.
        start: first block that merges, counted from 0 among the blocks with attention.
        prop_attn: proportional attention.
    """

    r: int | Sequence[float] = 0
    start: int = 0
    prop_attn: bool = True

    def build(self, depth: int, layers: Sequence[int]) -> dict[int, ToMeReducer]:
        """Return the reducers by block; `layers` are the blocks with attention."""
        schedule = merge_schedule(self.r, depth)
        if not any(schedule):
            return {}
        return {layer: ToMeReducer(r, self.prop_attn) for layer, r in zip(layers[self.start :], schedule)}


class ToMeReducer(TokenReducer):
    """Merge the r pairs of tokens with the most similar keys.

    Args:
        r: number of tokens to merge; 0: none, but attention stays proportional.
        prop_attn: proportional attention: add log(token size) to the attention logits (equation 1).
    """

    needs = ('keys',)

    def __init__(self, r: int, prop_attn: bool = True):
        super().__init__()
        self.r = r
        self.prop_attn = prop_attn

    def key_bias(self, state: TokenState) -> Tensor | None:
        """See `TokenReducer`; None until tokens are merged."""
        if not self.prop_attn or state.size is None:
            return None
        # log(size), written so that inference programs of Paddle 3.3 do not compute it in place
        return (state.size - 1.0).log1p().squeeze(-1).unsqueeze([1, 2])

    def acts(self, state: TokenState) -> bool:
        """See `TokenReducer`."""
        return num_merged(state.num_prefix + state.num_body, self.r, state.num_prefix) > 0

    def forward(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """See `TokenReducer`."""
        # In half precision, rounding would make different tokens equal.
        with paddle.amp.auto_cast(enable=False):
            matching = match(state.keys, self.r, state.num_prefix >= 1, state.num_prefix >= 2)
            x, size = matching.merge_weighted(x, state.size)
        source, attention = state.source, state.class_attention
        return x, state._replace(
            num_body=x.shape[1] - state.num_prefix,
            size=size,
            source=None if source is None else matching.merge_source(source),
            class_attention=None if attention is None else matching.merge(attention.unsqueeze(-1)).squeeze(-1),
            keys=None,
            grid=None,
        )

    def extra_repr(self) -> str:
        return f'r={self.r}, prop_attn={self.prop_attn}'
