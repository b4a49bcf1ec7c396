# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing (https://arxiv.org/abs/1604.06174): less memory for more time."""

from __future__ import annotations

from paddle import nn
from paddle.distributed.fleet.utils import recompute


def run_block(block: nn.Layer, *inputs, checkpoint: bool):
    """`block(*inputs)`. With `checkpoint`, training keeps only the inputs and recomputes the block in the backward pass."""
    if checkpoint and block.training:
        return recompute(block, *inputs, use_reentrant=False)
    return block(*inputs)
