# SPDX-License-Identifier: Apache-2.0
"""Segmenter: "Segmenter: Transformer for Semantic Segmentation", https://arxiv.org/abs/2105.05633."""

from __future__ import annotations

from paddle import Tensor

from models.options import dense_options
from models.registry import register_model
from models.segmentation.base import Segmentor
from models.segmentation.decoders import LinearDecoder, MaskTransformer
from models.weights.segmentation import SegmenterWeights
from utils.errors import UserError

DECODERS = ('mask', 'linear')
HEAD_CHANNELS = 64  # channels per attention head of the decoder


class Segmenter(Segmentor):
    """Segmenter: a decoder on the normalized patch tokens.

    Args:
        num_classes: K.
        decoder: 'mask': `MaskTransformer`; 'linear': `LinearDecoder`.
        decoder_depth: blocks of the mask transformer.
        decoder_drop_rate: dropout in these blocks.
        encoder: further arguments of `VisionTransformer`.
    """

    weight_rules = SegmenterWeights()

    def __init__(
        self,
        num_classes: int = 1000,
        decoder: str = 'mask',
        decoder_depth: int = 2,
        decoder_drop_rate: float = 0.1,
        **encoder,
    ):
        super().__init__(num_classes, **encoder)
        if decoder not in DECODERS:
            raise UserError(
                f"there is no decoder '{decoder}' (MODEL.SEGMENTER.DECODER); choose from {', '.join(DECODERS)}."
            )
        dim = self.embed_dim
        if decoder == 'linear':
            self.decode_head = LinearDecoder(dim, num_classes)
        else:
            num_heads = self.backbone.num_heads if dim % HEAD_CHANNELS else dim // HEAD_CHANNELS
            self.decode_head = MaskTransformer(dim, num_heads, num_classes, decoder_depth, drop_rate=decoder_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images [B, in_chans, H, W], sides divisible by the patch size -> logits [B, K, H / P, W / P]."""
        return self.decode_head(self.forward_features(x), self.backbone.grid_of(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> normalized patch tokens [B, N, C]."""
        return self.backbone.forward_features(x)[:, self.backbone.num_prefix :]


@register_model('segmenter')
def build_segmenter(config) -> Segmenter:
    """Build Segmenter from a configuration."""
    segmenter = config.MODEL.SEGMENTER
    return Segmenter(
        num_classes=config.MODEL.NUM_CLASSES,
        decoder=segmenter.DECODER,
        decoder_depth=segmenter.NUM_LAYERS,
        decoder_drop_rate=segmenter.DROPOUT,
        **dense_options(config),
    )
