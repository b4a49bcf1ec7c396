# SPDX-License-Identifier: Apache-2.0
"""Attention removal: "MLP Can Be A Good Transformer Learner", https://arxiv.org/abs/2404.05657.

A block with attention weight λ computes

    y = (2 - λ) x + λ Attention(LN1(x)),    out = y + MLP(LN2(y)),

At λ = 1 this is a standard block. At λ = 0 it computes y = 2x without attention, so the attention layer can be removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn

from utils.errors import UserError

BUFFER = 'attn_lambda'
REMOVED_PARTS = ('norm1.', 'attn.', 'gamma_1')  # of a block: six tensors, seven with LayerScale


@dataclass(frozen=True)
class RemovalSpec:
    """Lists of the blocks whose attention is removed.

    Attributes:
        prune_layers: blocks whose λ decays in training, from 1.
        done_layers: blocks whose λ is 0; their attention weights are kept but not trained. A block that is also in
            `prune_layers` decays.
        removed_layers: blocks built without attention.
    """

    prune_layers: Sequence[int] = ()
    done_layers: Sequence[int] = ()
    removed_layers: Sequence[int] = ()


class AttentionRemoval:
    """The attention weight λ of each block of a model.

    A model with decaying blocks has a buffer `attn_lambda` [depth] with λ of every block, so that loading a state dict
    restores λ. The blocks hold λ as a Python number, and skip attention where λ is 0.

    Args:
        spec: the blocks whose attention is removed.
        depth: number of blocks.

    Attributes:
        prune_layers, done_layers, removed_layers: of the spec, sorted.
        kept_layers: all other blocks.
    """

    def __init__(self, spec: RemovalSpec, depth: int):
        for layer in (*spec.prune_layers, *spec.done_layers, *spec.removed_layers):
            if not isinstance(layer, int) or not 0 <= layer < depth:
                raise UserError(
                    f'attention is to be removed from block {layer}, but there are blocks 0 to {depth - 1}; '
                    'see MODEL.LAMBDA.'
                )
        self.prune_layers = tuple(sorted(set(spec.prune_layers)))
        self.done_layers = tuple(sorted(set(spec.done_layers) - set(spec.prune_layers)))
        self.removed_layers = tuple(sorted(set(spec.removed_layers)))
        both = set(self.removed_layers) & {*self.prune_layers, *self.done_layers}
        if both:
            raise UserError(f'block {min(both)} is built without attention, so its λ cannot decay.')
        affected = {*self.prune_layers, *self.done_layers, *self.removed_layers}
        self.depth = depth
        self.kept_layers = [layer for layer in range(depth) if layer not in affected]

    def attach(self, model: nn.Layer) -> None:
        """Set λ in the model's new blocks, freeze the attention of `done_layers`, and register the buffer."""
        for layer in self.done_layers:
            model.blocks[layer].set_attn_weight(0.0)
            for name, parameter in model.blocks[layer].named_parameters():
                if name.startswith(REMOVED_PARTS):
                    parameter.stop_gradient = True
        if self.prune_layers or self.done_layers:
            weights = [block.attn_weight for block in model.blocks]
            model.register_buffer(BUFFER, paddle.to_tensor(weights, 'float32'))
            self._pruned = paddle.to_tensor([layer in self.prune_layers for layer in range(self.depth)])

    def set_lambda(self, model: nn.Layer, value: float) -> None:
        """Set λ of `prune_layers` for the following passes."""
        if not self.prune_layers or value == model.blocks[self.prune_layers[0]].attn_weight:
            return
        for layer in self.prune_layers:
            model.blocks[layer].set_attn_weight(value)
        # Computed on the device: copying from the host would wait for the queue of a GPU.
        buffer = model.attn_lambda
        weights = paddle.where(self._pruned, paddle.full(buffer.shape, value, 'float32'), buffer.astype('float32'))
        paddle.assign(weights.astype(buffer.dtype), buffer)

    def restore_lambda(self, model: nn.Layer) -> None:
        """Set λ of `prune_layers` from the buffer, after a state dict was loaded."""
        if self.prune_layers:
            weights = model.attn_lambda.tolist()
            for layer in self.prune_layers:
                model.blocks[layer].set_attn_weight(weights[layer])

    def unused_weights(self, arrays: Mapping[str, np.ndarray], source: str) -> dict[str, str]:
        """Return name -> reason of arrays that the model does not use: removed attention, λ without decaying blocks.

        Raises:
            UserError: λ in the file contradicts the model.
        """
        unused = {}
        for layer in self.removed_layers:
            parts = tuple(f'blocks.{layer}.{part}' for part in REMOVED_PARTS)
            unused.update({name: f'block {layer} has no attention' for name in arrays if name.startswith(parts)})
        if BUFFER in arrays and arrays[BUFFER].shape == (self.depth,) and arrays[BUFFER].dtype.kind == 'f':
            self._check_lambda(arrays[BUFFER], source)
            if not (self.prune_layers or self.done_layers):
                unused[BUFFER] = 'λ of no block decays'
        return unused

    def _check_lambda(self, weights: np.ndarray, source: str) -> None:
        for layer, weight in enumerate(weights.tolist()):
            ours = int(layer in self.kept_layers)
            if layer not in self.prune_layers and weight != ours:
                raise UserError(
                    f'{source}: the attention of block {layer} has the weight {weight:.4g}, but in the model '
                    f'{ours}; set MODEL.LAMBDA.PRUNE_LAYERS and DONE_LAYERS to those of the training'
                    + (', and finish it before removing the attention.' if 0 < weight < 1 else '.')
                )
