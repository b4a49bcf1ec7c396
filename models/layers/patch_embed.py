# SPDX-License-Identifier: Apache-2.0
"""Patch embedding."""

from __future__ import annotations

from paddle import Tensor, nn

from utils.errors import UserError
from utils.sizes import Side, size_pair, size_text


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
        setattr(self, proj, nn.Conv2D(in_chans, embed_dim, patch_size, patch_size))
        self.norm = nn.LayerNorm(embed_dim, epsilon=norm_eps) if norm_eps is not None else None

    @property
    def conv(self) -> nn.Conv2D:
        """Return the convolution."""
        return getattr(self, self._proj)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, N, C], rows of patches from top to bottom.

        The type is that of the weights, so that the residual stream of a model is in float32 under autocast (AMP_LEVEL O1).
        """
        self._check(x.shape[2], x.shape[3])
        x = self.conv(x).flatten(2).transpose([0, 2, 1])
        if x.dtype != self.conv.weight.dtype:
            x = x.astype(self.conv.weight.dtype)
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
