# SPDX-License-Identifier: Apache-2.0
"""What every image classifier offers to the training loop, the tools and the user."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from paddle import Tensor, nn

from models.layers import Intermediates
from models.weights.rules import WeightRules


class Classifier(nn.Layer):
    """A stem, a stack of blocks and a head.

    Subclasses set `num_classes`, `depth` and `head`, and implement `forward_features` and `forward_head`. Layer-wise learning
    rates, fine-tuning and weight conversion rest on the attributes below.
    """

    stem_names: tuple[str, ...] = ('patch_embed',)
    blocks_name: str = 'blocks'
    weight_rules = WeightRules()
    decays_all: bool = False  # weight decay acts on biases and norms too, as a published training had it
    grad_checkpointing: bool = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations, which saves memory."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images [B, in_chans, H, W] -> logits [B, K]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor):
        """Normalized images -> what `forward_head` takes."""
        raise NotImplementedError

    def forward_head(self, x) -> Tensor:
        """Features -> logits [B, K]."""
        raise NotImplementedError

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, want: Collection[str] = ('tokens',)
    ) -> Intermediates:
        """`forward_features` and intermediate results of blocks, or of the stages of a pyramid.

        Args:
            x: normalized images [B, in_chans, H, W].
            indices: numbers of the blocks, from 0; None: all.
            want: names of `BlockIntermediates` to return of each.
        """
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a newly initialized one for `num_classes`; 0: return the pooled features."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone, besides biases and norms."""
        return set()

    @property
    def num_layers(self) -> int:
        """The largest `layer_id`: that of the head."""
        return self.depth + 1

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 the stem, i + 1 block i, `num_layers` norm and head."""
        part, _, rest = name.partition('.')
        if part in self.stem_names:
            return 0
        if part == self.blocks_name:
            return int(rest.partition('.')[0]) + 1
        return self.num_layers

    @property
    def has_unused_parameters(self) -> bool:
        """True if a training step may leave parameters without gradients (DataParallel: `find_unused_parameters`)."""
        return False
