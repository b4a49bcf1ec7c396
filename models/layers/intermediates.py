# SPDX-License-Identifier: Apache-2.0
"""Intermediate results of a forward pass, for analysis, distillation, pictures and dense heads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from paddle import Tensor


class BlockIntermediates(NamedTuple):
    """Intermediate results of one block, or of one stage of a pyramid; None: not asked for, or there is none.

    Attributes:
        tokens: output, [B, N', C]. N' is smaller than N where the block reduces the tokens.
        maps: output as feature maps [B, C, rows, columns], without class and distillation token.
        block_input: what the block takes, (tokens [B, N, C], `TokenState`): `run_blocks` continues from there.
        inputs: normalized input of the mixer, or of the MLP where the block computes no attention, [B, N, C].
        attn_logits: attention logits before the softmax, [B, H, N, N].
        attn: attention weights after softmax and dropout, [B, H, N, N].
        attn_out: output of the mixer, before LayerScale and stochastic depth, [B, N, C].
        mlp_out: output of the MLP, before LayerScale and stochastic depth, [B, N', C].
        source: which of the first tokens are in each token of the output, [B, N', N0] of 0 and 1; None while no token
            was dropped, fused or merged.
        reduced: with `source`: whether this block reduced the tokens.
    """

    tokens: Tensor | None = None
    maps: Tensor | None = None
    block_input: tuple | None = None
    inputs: Tensor | None = None
    attn_logits: Tensor | None = None
    attn: Tensor | None = None
    attn_out: Tensor | None = None
    mlp_out: Tensor | None = None
    source: Tensor | None = None
    reduced: bool | None = None


class Intermediates(NamedTuple):
    """What `forward_intermediates` returns.

    Attributes:
        features: what `forward_features` returns.
        blocks: number of a block, or of a stage -> what was asked for of it.
        state: `TokenState` after the last block; None where there is none.
    """

    features: Tensor
    blocks: dict[int, BlockIntermediates]
    state: Any = None


class Recorder:
    """Keeps those results of a block that are asked for, and no reference to any other.

    A block makes a new one for each pass, so that gradient checkpointing, which runs a block twice, records once.
    """

    def __init__(self, want: Collection[str]):
        self.want = want
        self.values: dict[str, Any] = {}

    def wants(self, *names: str) -> bool:
        """Whether one of the names is asked for."""
        return any(name in self.want for name in names)

    def keep(self, name: str, value):
        """Records `value` where it is asked for, and returns it."""
        if name in self.want:
            self.values[name] = value
        return value

    def result(self) -> BlockIntermediates:
        """What was recorded."""
        return BlockIntermediates(**self.values)


def requested(
    want: Collection[str], indices: Sequence[int] | None, depth: int, offered: Collection[str] | None = None
) -> dict[int, frozenset[str]]:
    """Number of a block -> names to record there.

    Args:
        want: names of `BlockIntermediates`.
        indices: numbers of blocks from 0; None: all.
        depth: number of blocks.
        offered: names that the model offers; None: all.

    Raises:
        ValueError: an unknown name, or a block that the model lacks.
    """
    offered = BlockIntermediates._fields if offered is None else offered  # to_static knows no global defaults
    unknown = sorted(set(want) - set(offered))
    if unknown:
        raise ValueError(f"there are no intermediates '{unknown[0]}'; choose from {', '.join(offered)}.")
    numbers = range(depth) if indices is None else indices
    outside = [number for number in numbers if not 0 <= number < depth]
    if outside:
        raise ValueError(f'there is no block {outside[0]}; indices must be 0 to {depth - 1}.')
    return dict.fromkeys(numbers, frozenset(want))


def tokens_to_maps(tokens: Tensor, grid: tuple[int, int] | None, num_prefix: int = 0) -> Tensor:
    """[B, num_prefix + rows * columns, C] -> [B, C, rows, columns]; class and distillation token are left out.

    Raises:
        ValueError: tokens were dropped, fused or merged (`grid` is None), so that they form no map.
    """
    if grid is None:
        raise ValueError('tokens that were dropped, fused or merged form no feature map.')
    return tokens[:, num_prefix:].transpose([0, 2, 1]).reshape([0, tokens.shape[2], *grid])
