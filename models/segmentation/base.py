# SPDX-License-Identifier: Apache-2.0
"""What the segmentation models share: a Vision Transformer without classifier as backbone, and heads on its patch tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from paddle import Tensor, nn

from models.base import Classifier
from models.layers import Intermediates
from models.vision_transformer import VisionTransformer
from utils.errors import UserError


class Encoder(VisionTransformer):
    """A Vision Transformer without classifier.

    Args:
        final_norm: LayerNorm after the last block.
        options: further arguments of `VisionTransformer`.
    """

    def __init__(self, final_norm: bool = True, **options):
        super().__init__(num_classes=0, reducers=(), **options)
        if not final_norm:
            self.norm = None


class Segmentor(Classifier):
    """A backbone and a decoder; class and distillation token are used by the backbone alone.

    Subclasses add `decode_head`, and may add `neck` and `auxiliary_head`.

    Args:
        num_classes: K.
        encoder: arguments of `Encoder`.

    Attributes:
        patch_size: side of a patch, pixels; sides of images are multiples of it.
        image_size: side of the images that the positions are for, pixels.
        fixed_size: takes images of `image_size` only, as relative positions do.
        stride: pixels per logit.
    """

    def __init__(self, num_classes: int, **encoder):
        super().__init__()
        if not num_classes:
            raise UserError('segmentation needs classes: set MODEL.NUM_CLASSES.')
        self.num_classes = num_classes
        self.backbone = Encoder(**encoder)
        self.embed_dim, self.depth = self.backbone.embed_dim, self.backbone.depth
        embedding = self.backbone.patch_embed
        self.patch_size, self.image_size = embedding.patch_size, embedding.img_size
        self.stride: float = self.patch_size
        self.fixed_size = self.backbone.relative
        self.auxiliary_head: nn.Layer | None = None

    def heads(self) -> Iterator[nn.Layer]:
        """The layers with classifiers."""
        yield from (head for head in (self.decode_head, self.auxiliary_head) if head is not None)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifiers by newly initialized ones. Raises UserError for 0."""
        if not num_classes:
            raise UserError('a segmentation model has no features without classes; take its `backbone`.')
        self.num_classes = num_classes
        for head in self.heads():
            head.reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `Classifier`; acts on the blocks of the backbone."""
        self.backbone.set_grad_checkpointing(enable)

    def attention_layers(self) -> list[int]:
        """Blocks that keep their attention."""
        return self.backbone.attention_layers()

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, want: Collection[str] = ('tokens',)
    ) -> Intermediates:
        """Those of the backbone."""
        return self.backbone.forward_intermediates(x, indices, want)

    def layer_id(self, name: str) -> int:
        """That of the backbone; the last one for neck and heads."""
        part, _, rest = name.partition('.')
        return self.backbone.layer_id(rest) if part == 'backbone' else self.num_layers
