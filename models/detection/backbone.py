# SPDX-License-Identifier: Apache-2.0
"""ViTDet's backbone: the Vision Transformer on patch tokens alone, and a feature pyramid from its last map.

"Exploring Plain Vision Transformer Backbones for Object Detection", https://arxiv.org/abs/2203.16527. Parameter names are those
of detectron2.
"""

from __future__ import annotations

from collections.abc import Sequence

from paddle import Tensor, nn
from paddle.nn import initializer

from models.detection.pyramid import STRIDES, simple_pyramid
from models.layers import resize_position_table, tokens_to_maps
from models.vision_transformer import VisionTransformer
from utils.errors import UserError


class PatchEncoder(VisionTransformer):
    """A Vision Transformer without class token, last LayerNorm and classifier.

    Args:
        img_size: side of the image that decomposed relative positions are for, pixels; other sizes interpolate them.
        position_size: side of the image that the position embedding is for, pixels: that of the pre-training. Its first row is
            the class token's, which is not used.
        options: further arguments of `VisionTransformer`.
    """

    def __init__(self, img_size: int = 640, position_size: int = 224, **options):
        super().__init__(img_size, num_classes=0, reducers=(), **options)
        self.norm = None
        self.position_grid = (position_size // self.patch_embed.patch_size,) * 2
        if self.absolute:
            rows = 1 + self.position_grid[0] * self.position_grid[1]
            shape, init = [1, rows, self.embed_dim], initializer.TruncatedNormal(std=0.02)
            self.pos_embed = self.create_parameter(shape, default_initializer=init)

    def _add_tokens(self, absolute: bool) -> None:
        self.cls_token = self.dist_token = self.pos_embed = None
        self.num_prefix, self.absolute = 0, absolute

    def embed(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> patch tokens with their positions [B, N, C]."""
        grid = self.grid_of(x)
        x = self.patch_embed(x).astype(self.patch_embed.conv.weight.dtype)
        if self.pos_embed is None:
            return self.pos_drop(x)
        return self.pos_drop(x + resize_position_table(self.pos_embed, self.position_grid, grid, 1)[:, 1:])

    def merge_tokens(self, r: int | Sequence[float], start: int = 0, prop_attn: bool = True) -> None:
        """Raises UserError: a detector needs all patch tokens."""
        raise UserError('a detector needs all patch tokens, which ToMe merges: set MODEL.TOME.R to 0.')


class ViTDetBackbone(nn.Layer):
    """Patch encoder and simple feature pyramid.

    Args:
        channels: of the levels of the pyramid.
        encoder: arguments of `PatchEncoder`.

    Attributes:
        strides: pixels per cell of each level.
    """

    def __init__(self, channels: int = 256, **encoder):
        super().__init__()
        self.net = PatchEncoder(**encoder)
        patch_size = self.net.patch_embed.patch_size
        self.strides = tuple(patch_size * factor for factor in STRIDES)
        self.channels = channels
        for number, level in simple_pyramid(self.net.embed_dim, channels).items():
            setattr(self, f'simfp_{number}', level)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalized images [B, in_chans, H, W] -> levels p2 to p6 [B, channels, H / stride, W / stride]."""
        tokens, state = self.net.forward_tokens(x)
        last = tokens_to_maps(tokens, state.grid)
        levels = [getattr(self, f'simfp_{number}')(last) for number in (2, 3, 4, 5)]
        return [*levels, levels[-1][:, :, ::2, ::2]]  # p6 is a max pool of kernel 1 and stride 2
