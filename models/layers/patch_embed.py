# SPDX-License-Identifier: Apache-2.0
"""Patch embeddings: a linear projection, or a stack of convolutions."""

from __future__ import annotations

from paddle import Tensor, nn

import ops
from models.layers.basic import LayerNorm, operator_replaces
from models.layers.batch_norm import SyncBatchNorm
from models.paddle_private import is_patch_projection
from utils.errors import UserError
from utils.sizes import Side, size_pair, size_text


def project_patches(x: Tensor, project: nn.Layer, side: int) -> Tensor:
    """Apply a convolution whose kernel and stride are `side`, or a stem of convolutions. [B, C, H, W] -> [B, h, w, D].

    On the CPU a linear layer on the pixels of each patch is faster.
    """
    batch, channels, height, width = x.shape
    if not operator_replaces(x, [project], [nn.Conv2D]) or not is_patch_projection(project, channels, side):
        return project(x).transpose([0, 2, 3, 1])
    rows, columns = height // side, width // side
    x = x[:, :, : rows * side, : columns * side].reshape([batch, channels, rows, side, columns, side])
    x = x.transpose([0, 2, 4, 1, 3, 5]).reshape([batch, rows, columns, channels * side**2])
    return ops.linear(x, project.weight.flatten(1).transpose([1, 0]), project.bias)


class PatchEmbed(nn.Layer):
    """Split an image into patches and project each linearly, by a convolution whose stride is its kernel size.

    Args:
        img_size: size of the image that the model is built for, pixels, see `utils.sizes`.
        patch_size: side of a patch, pixels.
        in_chans: channels of the image.
        embed_dim: channels C of a token.
        norm_eps: epsilon of a LayerNorm on the tokens; None: no norm.
        any_size: also accept other image sizes that are multiples of the patch size.
        proj: attribute name of the convolution, which the published weights use.

    Attributes:
        img_size: (height, width), pixels.
        grid_size: (rows, columns) of patches.
        num_patches: rows times columns.
    """

    def __init__(
        self,
        img_size: Side = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_eps: float | None = None,
        any_size: bool = False,
        proj: str = 'proj',
    ):
        super().__init__()
        if any(side % patch_size for side in size_pair(img_size)):
            raise UserError(
                f'an image of {size_text(img_size)} pixels does not divide into patches of {patch_size}; '
                'set DATA.IMAGE_SIZE to a multiple, or change PATCH_SIZE.'
            )
        self.img_size = size_pair(img_size)
        self.patch_size = patch_size
        self.any_size = any_size
        self.grid_size = self.img_size[0] // patch_size, self.img_size[1] // patch_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self._proj = proj
        setattr(self, proj, self._projection(in_chans, embed_dim))
        self.norm = LayerNorm(embed_dim, epsilon=norm_eps) if norm_eps is not None else None

    def _projection(self, in_chans: int, embed_dim: int) -> nn.Layer:
        return nn.Conv2D(in_chans, embed_dim, self.patch_size, self.patch_size)

    @property
    def conv(self) -> nn.Conv2D:
        """Return the last convolution."""
        return self.convs[-1]

    @property
    def convs(self) -> list[nn.Conv2D]:
        """Return all convolutions; a linear projection is one."""
        return [
            layer for layer in getattr(self, self._proj).sublayers(include_self=True) if isinstance(layer, nn.Conv2D)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, N, C], rows of patches from top to bottom.

        The type is that of the weights, so that the residual stream of a model is in float32 under autocast (AMP_LEVEL O1).
        """
        self._check(x.shape[2], x.shape[3])
        x = project_patches(x, getattr(self, self._proj), self.patch_size).flatten(1, 2)
        dtype = self.conv.weight.dtype
        x = x if x.dtype == dtype else x.astype(dtype)
        return x if self.norm is None else self.norm(x)

    def _check(self, height: int, width: int) -> None:
        if self.any_size:
            if height % self.patch_size or width % self.patch_size:
                raise UserError(
                    f'an image of {height}x{width} pixels does not divide into patches of {self.patch_size}; '
                    'set DATA.IMAGE_SIZE to a multiple.'
                )
        elif (height, width) != self.img_size:
            raise UserError(
                f'the model takes images of {self.img_size[0]}x{self.img_size[1]} pixels, not {height}x{width}; '
                'set DATA.IMAGE_SIZE to the size of the data (the model is then built for it).'
            )


class ConvStem(PatchEmbed):
    """Patch embedding by convolutions: "Early Convolutions Help Transformers See Better", https://arxiv.org/abs/2106.14881.

    3 x 3 convolutions of stride 2 with batch normalization and ReLU halve the image until a pixel is a patch. They double the
    channels, up to C; a 1 x 1 convolution follows. Patch size 16: C/8, C/4, C/2 and C channels, as in MoCo v3's code.
    Arguments as in `PatchEmbed`; the patch size is a power of 2.
    """

    def _projection(self, in_chans: int, embed_dim: int) -> nn.Layer:
        halvings = self.patch_size.bit_length() - 1
        if self.patch_size != 2**halvings or halvings < 1 or embed_dim % 2 ** (halvings - 1):
            raise UserError(
                f'MODEL.TRANS.CONV_STEM needs a PATCH_SIZE that is a power of 2, not {self.patch_size}, and an EMBED_DIM '
                f'that is a multiple of PATCH_SIZE / 2, not {embed_dim}.'
            )
        layers, channels = [], in_chans
        for halving in range(halvings):
            out = embed_dim // 2 ** (halvings - 1 - halving)
            layers += [nn.Conv2D(channels, out, 3, 2, 1, bias_attr=False), SyncBatchNorm(out), nn.ReLU()]
            channels = out
        return nn.Sequential(*layers, nn.Conv2D(embed_dim, embed_dim, 1))
