# SPDX-License-Identifier: Apache-2.0
"""Intermediate results of a forward pass, for analysis, distillation, visualization and dense heads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from paddle import Tensor


class BlockIntermediates(NamedTuple):
    """Intermediate results of one block, or of one stage of a pyramid; None: not requested, or not computed.

    Attributes:
        tokens: output, [B, N', C]. N' is smaller than N where the block reduces the tokens.
        maps: output as feature maps [B, C, rows, columns], without class and distillation token.
        block_input: input of the block, (tokens [B, N, C], `TokenState`), as `run_blocks` takes it.
        inputs: normalized input of the mixer, or of the MLP where the block computes no attention, [B, N, C].
        attn_logits: attention logits before the softmax, [B, H, N, N].
        attn: attention weights after softmax and dropout, [B, H, N, N].
        attn_out: output of the mixer, before LayerScale and stochastic depth, [B, N, C].
        mlp_out: output of the MLP, before LayerScale and stochastic depth, [B, N', C].
        source: 1 where an output token contains an input token of the model, else 0, [B, N', N0]; None until tokens are
            dropped, fused or merged.
        reduced: whether this block reduced the tokens; recorded with `source`.
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
    """Result of `forward_intermediates`.

    Attributes:
        features: result of `forward_features`.
        blocks: number of a block, or of a stage -> its requested intermediates.
        state: `TokenState` after the last block; None where there is none.
    """

    features: Tensor
    blocks: dict[int, BlockIntermediates]
    state: Any = None


class Recorder:
    """Keep the requested results of a block, and no reference to any other.

    A block creates a recorder for each pass, so that gradient checkpointing, which runs a block twice, records once.
    """

    def __init__(self, want: Collection[str]):
        self.want = want
        self.values: dict[str, Any] = {}

    def wants(self, *names: str) -> bool:
        """Return whether one of the names is requested."""
        return any(name in self.want for name in names)

    def keep(self, name: str, value):
        """Record `value` if its name is requested, and return it."""
        if name in self.want:
            self.values[name] = value
        return value

    def result(self) -> BlockIntermediates:
        """Return the recorded results."""
        return BlockIntermediates(**self.values)


def requested(
    want: Collection[str], indices: Sequence[int] | None, depth: int, offered: Collection[str] | None = None
) -> dict[int, frozenset[str]]:
    """Return block number -> names to record there.

    Args:
        want: names of `BlockIntermediates`.
        indices: numbers of blocks from 0; None: all.
        depth: number of blocks.
        offered: names that the model can return; None: all.

    Raises:
        ValueError: an unknown name or block.
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
    """[B, num_prefix + rows * columns, C] -> [B, C, rows, columns], without class and distillation token.

    Raises:
        ValueError: tokens were dropped, fused or merged (`grid` is None).
    """
    if grid is None:
        raise ValueError('tokens that were dropped, fused or merged form no feature map.')
    return tokens[:, num_prefix:].transpose([0, 2, 1]).reshape([0, tokens.shape[2], *grid])
