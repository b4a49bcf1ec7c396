# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing (https://arxiv.org/abs/1604.06174): memory for time."""

from __future__ import annotations

from paddle import nn
from paddle.distributed.fleet.utils import recompute


def run_block(block: nn.Layer, *inputs, again: bool):
    """`block(*inputs)`; with `again`, training keeps the inputs only and computes the block again in the backward pass."""
    if again and block.training:
        return recompute(block, *inputs, use_reentrant=False)
    return block(*inputs)
