# SPDX-License-Identifier: Apache-2.0
"""Interface of image classifiers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from paddle import Tensor, nn

from models.layers import Intermediates
from models.weights.rules import WeightRules


class Classifier(nn.Layer):
    """A stem, a stack of blocks and a head.

    Subclasses set `num_classes`, `depth` and `head`, and implement `forward_features` and `forward_head`. The
    attributes below define layer-wise learning rates, fine-tuning and weight conversion.
    """

    stem_names: tuple[str, ...] = ('patch_embed',)
    blocks_name: str = 'blocks'
    weight_rules = WeightRules()
    decays_all: bool = False  # apply weight decay to biases and norms too, as some published recipes do
    grad_checkpointing: bool = False
    frozen: Sequence[nn.Layer] = ()  # layers without gradients, which stay in evaluation mode

    def train(self) -> None:
        """Set training mode, except for the frozen layers."""
        super().train()
        for layer in self.frozen:
            layer.eval()

    def freeze_backbone(self) -> list[str]:
        """Freeze all layers but the classifier. Return the names of the classifier's parameters."""
        rules = self.weight_rules
        self.frozen = [layer for name, layer in self.named_children() if not rules.is_head(f'{name}.')]
        for layer in self.frozen:
            layer.eval()
        for name, parameter in self.named_parameters():
            parameter.stop_gradient = not rules.is_head(name)
        return [name for name, _ in self.named_parameters() if rules.is_head(name)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable gradient checkpointing: recompute the blocks in the backward pass instead of storing activations."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images [B, in_chans, H, W] -> logits [B, K]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor):
        """Normalized images [B, in_chans, H, W] -> input of `forward_head`."""
        raise NotImplementedError

    def forward_head(self, x) -> Tensor:
        """Features -> logits [B, K]."""
        raise NotImplementedError

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, want: Collection[str] = ('tokens',)
    ) -> Intermediates:
        """Run `forward_features` and return intermediate results of blocks, or of the stages of a pyramid.

        Args:
            x: normalized images [B, in_chans, H, W].
            indices: block numbers, from 0; None: all blocks.
            want: names of the `BlockIntermediates` to return for each block.
        """
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by an initialized one for `num_classes`; 0: `forward` returns the pooled features."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, in addition to biases and norms."""
        return set()

    @property
    def num_layers(self) -> int:
        """Return the largest `layer_id`, that of the head."""
        return self.depth + 1

    def layer_id(self, name: str) -> int:
        """Return the layer of a parameter for layer-wise learning rates.

        0: stem; i + 1: block i; `num_layers`: norm and head.
        """
        part, _, rest = name.partition('.')
        if part in self.stem_names:
            return 0
        if part == self.blocks_name:
            return int(rest.partition('.')[0]) + 1
        return self.num_layers

    @property
    def has_unused_parameters(self) -> bool:
        """Return whether a training step may leave parameters without gradients (`find_unused_parameters`)."""
        return False
