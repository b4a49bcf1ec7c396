# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing (https://arxiv.org/abs/1604.06174)."""

from __future__ import annotations

from paddle import nn
from paddle.distributed.fleet.utils import recompute

import ops


def run_block(block: nn.Layer, *inputs, checkpoint: bool):
    """Run a block. With `checkpoint`, training stores only its inputs and recomputes the block in the backward pass."""
    if checkpoint and block.training:
        return recompute(ops.keep_type(block), *inputs, use_reentrant=False)
    return block(*inputs)
