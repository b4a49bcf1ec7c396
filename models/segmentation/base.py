# SPDX-License-Identifier: Apache-2.0
"""Base class of segmentation models: a Vision Transformer backbone, and heads on its patch tokens."""

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
    """A backbone and a decoder on its patch tokens.

    Subclasses add `decode_head`, and may add `neck` and `auxiliary_head`.

    Args:
        num_classes: K.
        encoder: arguments of `Encoder`.

    Attributes:
        patch_size: side of a patch, pixels; image sides must be multiples of it.
        image_size: (height, width) of the images that the model is built for, pixels.
        fixed_size: True: accepts images of `image_size` only, due to relative positions.
        stride: output stride, pixels per logit.
    """

    def __init__(self, num_classes: int, **encoder):
        super().__init__()
        if not num_classes:
            raise UserError('a segmentation model needs classes: set MODEL.NUM_CLASSES.')
        self.num_classes = num_classes
        self.backbone = Encoder(**encoder)
        self.embed_dim, self.depth = self.backbone.embed_dim, self.backbone.depth
        embedding = self.backbone.patch_embed
        self.patch_size, self.image_size = embedding.patch_size, embedding.img_size
        self.stride: float = self.patch_size
        self.fixed_size = self.backbone.relative
        self.auxiliary_head: nn.Layer | None = None

    def heads(self) -> Iterator[nn.Layer]:
        """Iterate over the heads with classifiers."""
        yield from (head for head in (self.decode_head, self.auxiliary_head) if head is not None)

    def reset_classifier(self, num_classes: int) -> None:
        """See `Classifier`. Raises UserError for 0."""
        if not num_classes:
            raise UserError('a segmentation model has no features without classes; use its `backbone`.')
        self.num_classes = num_classes
        for head in self.heads():
            head.reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `Classifier`, for the blocks of the backbone."""
        self.backbone.set_grad_checkpointing(enable)

    def attention_layers(self) -> list[int]:
        """See `VisionTransformer`, for the backbone."""
        return self.backbone.attention_layers()

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, want: Collection[str] = ('tokens',)
    ) -> Intermediates:
        """See `Classifier`, for the backbone."""
        return self.backbone.forward_intermediates(x, indices, want)

    def layer_id(self, name: str) -> int:
        """See `Classifier`; `num_layers` for neck and heads."""
        part, _, rest = name.partition('.')
        return self.backbone.layer_id(rest) if part == 'backbone' else self.num_layers
