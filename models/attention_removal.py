# SPDX-License-Identifier: Apache-2.0
"""Attention that fades out of chosen blocks: "MLP Can Be A Good Transformer Learner", https://arxiv.org/abs/2404.05657.

A block whose attention has the weight λ computes

    y = (2 - λ) x + λ Attention(LN1(x)),    out = y + MLP(LN2(y)),

so that at λ = 1 it is an ordinary block, and at λ = 0 its attention is the identity, y = 2x, and can be left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import paddle

from models.base import Classifier
from utils.errors import UserError

BUFFER = 'attn_lambda'
REMOVED_PARTS = ('norm1.', 'attn.', 'gamma_1')  # of a block; six tensors, and one more with layer scale


class RemovableAttention(Classifier):
    """A classifier some of whose blocks fade or lack their attention.

    A fading model keeps λ of every block in the buffer `attn_lambda` [depth], which travels with its weights: loading
    them restores λ. The blocks themselves compute with plain numbers, and skip their attention where λ is 0.
    """

    def plan_removal(
        self, prune_layers: Sequence[int], done_layers: Sequence[int], removed_layers: Sequence[int]
    ) -> None:
        """Says which blocks have what kind of attention; to be called before the blocks are built.

        Args:
            prune_layers: λ is what `set_attn_lambda` says; 1 at first.
            done_layers: λ is 0, but the weights are kept, untrained. A block of `prune_layers` too belongs to those.
            removed_layers: built without attention: λ is 0 for good.
        """
        for layers in (prune_layers, done_layers, removed_layers):
            for layer in layers:
                if not isinstance(layer, int) or not 0 <= layer < self.depth:
                    raise UserError(
                        f'attention is to be removed from block {layer}, but there are blocks 0 to {self.depth - 1}; '
                        'see MODEL.LAMBDA.'
                    )
        self.prune_layers = tuple(sorted(set(prune_layers)))
        self.done_layers = tuple(sorted(set(done_layers) - set(prune_layers)))
        self.removed_layers = tuple(sorted(set(removed_layers)))
        both = set(self.removed_layers) & {*self.prune_layers, *self.done_layers}
        if both:
            raise UserError(f'block {min(both)} is built without attention, and has none that could fade.')

    def attention_layers(self) -> list[int]:
        """Blocks whose attention is there to stay."""
        leaving = {*self.prune_layers, *self.done_layers, *self.removed_layers}
        return [layer for layer in range(self.depth) if layer not in leaving]

    def start_fading(self) -> None:
        """Sets λ of all blocks; to be called after they are built."""
        for layer in (*self.done_layers, *self.removed_layers):
            self.blocks[layer].weigh_attention(0.0)
        for layer in self.done_layers:
            for name, parameter in self.blocks[layer].named_parameters():
                if name.startswith(REMOVED_PARTS):
                    parameter.stop_gradient = True
        if self.prune_layers or self.done_layers:
            weights = [block.attn_weight for block in self.blocks]
            self.register_buffer(BUFFER, paddle.to_tensor(weights, 'float32'))

    @property
    def leaves_parameters_out(self) -> bool:
        """At λ = 0 the attention of fading blocks gets no gradient."""
        return bool(self.prune_layers)

    def set_attn_lambda(self, value: float) -> None:
        """λ of the blocks in `prune_layers` for the following passes."""
        if not self.prune_layers or value == self.blocks[self.prune_layers[0]].attn_weight:
            return
        for layer in self.prune_layers:
            self.blocks[layer].weigh_attention(value)
        weights = paddle.to_tensor([block.attn_weight for block in self.blocks])
        self.attn_lambda.set_value(weights.astype(self.attn_lambda.dtype))

    def set_state_dict(self, state_dict: Mapping, *args, **kwargs):
        """Paddle's, and λ is what the state says."""
        result = super().set_state_dict(state_dict, *args, **kwargs)
        if self.prune_layers:
            weights = self.attn_lambda.tolist()
            for layer in self.prune_layers:
                self.blocks[layer].weigh_attention(weights[layer])
        return result

    set_dict = load_dict = set_state_dict

    def unused_weights(self, arrays: Mapping[str, np.ndarray], source: str) -> dict[str, str]:
        """The attention of removed blocks, and λ where nothing fades.

        Raises:
            UserError: λ in the file contradicts the model.
        """
        unused = {}
        for layer in self.removed_layers:
            parts = tuple(f'{self.blocks_name}.{layer}.{part}' for part in REMOVED_PARTS)
            unused.update({name: f'block {layer} has no attention' for name in arrays if name.startswith(parts)})
        if BUFFER in arrays and arrays[BUFFER].shape == (self.depth,):
            self._check_lambda(arrays[BUFFER], source)
            if not (self.prune_layers or self.done_layers):
                unused[BUFFER] = 'the attention of no block fades'
        return unused

    def _check_lambda(self, weights: np.ndarray, source: str) -> None:
        staying = self.attention_layers()
        for layer, weight in enumerate(weights.tolist()):
            if layer not in self.prune_layers and weight != float(layer in staying):
                raise UserError(
                    f'{source}: the attention of block {layer} has the weight {weight:.4g}, but in the model '
                    f'{int(layer in staying)}; make MODEL.LAMBDA.PRUNE_LAYERS and DONE_LAYERS those of the training'
                    + (', and finish it before removing the attention.' if 0 < weight < 1 else '.')
                )
