# SPDX-License-Identifier: Apache-2.0
"""MS-MLP: attention-free pyramid with a mix-shifting token mixer.

"Mixing and Shifting: Exploiting Global and Local Dependencies in Vision MLPs", https://arxiv.org/abs/2202.06510.
Channels are split into groups. Each group is shifted by its own distance and mixed by a depthwise convolution with
its own kernel size, once along the width and once along the height. Outputs and parameter names equal those of the
published code (https://github.com/JegZheng/MS-MLP), which shifts before it mixes; the paper's figure mixes first.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.nn import initializer

import ops
from models.base import Classifier
from models.layers import (
    BlockIntermediates,
    DropPath,
    Intermediates,
    LayerNorm,
    Linear,
    drop_path_rates,
    hidden_channels,
    init_linear_,
    is_on_cpu,
    project_patches,
    requested,
    run_block,
    run_mlp,
    torch_conv_,
)
from models.registry import register_model
from utils.errors import UserError
from utils.sizes import image_size

NORM_EPS = 1e-6
LAYER_SCALE = 1e-6  # initial LayerScale value: a block starts near the identity


# ---------------------------------------------------------------------------------------------------- mixing
def split_channels(dim: int, groups: int) -> list[int]:
    """Split channels into `groups` groups of ceil(dim / groups); the last group has the remaining channels.

    Raises:
        UserError: there are too few channels for all groups.
    """
    size = -(-dim // groups)
    sizes = [min(size, dim - start) for start in range(0, dim, size)]
    if len(sizes) != groups:
        raise UserError(
            f'{dim} channels in groups of ceil({dim} / {groups}) = {size} make {len(sizes)} groups, but '
            f'MODEL.MSMLP.SHIFT_DIST has {groups} shifts; change SHIFT_DIST or EMBED_DIM.'
        )
    return sizes


def shifted_conv(x: Tensor, weight: Tensor, shift: tuple[int, int]) -> Tensor:
    """Roll maps by (down, right) pixels, then apply a depthwise convolution with zero padding.

    Args:
        x: [B, C, H, W].
        weight: [C, 1, k, k], k odd.
        shift: (down, right) pixels; may exceed the size of the map.

    Returns:
        [B, C, H, W]
    """
    return F.conv2d(paddle.roll(x, shift, (2, 3)), weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def shifted_conv_as_products(x: Tensor, weight: Tensor, shift: tuple[int, int]) -> Tensor:
    """Compute `shifted_conv` of maps [C, B, H, W] by two matrix products per channel, which include shift and padding.

    The first product, the same for all channels, gathers the k input rows of each output row. The second sums over
    these rows and the columns: its matrix has the kernel weights on k diagonals.
    """
    dim, batch, height, width = x.shape
    kernel = weight.shape[-1]
    rows = _taps(height, kernel, shift[0], weight.dtype).reshape([height * kernel, height])
    columns = _taps(width, kernel, shift[1], weight.dtype).transpose([1, 2, 0]).reshape([kernel, width * width])
    x = paddle.matmul(rows, x).reshape([dim, batch * height, kernel * width])
    bands = paddle.matmul(weight.reshape([dim * kernel, kernel]), columns).reshape([dim, kernel * width, width])
    return paddle.bmm(x, bands).reshape([dim, batch, height, width])


@functools.lru_cache(maxsize=256)
def _taps(size: int, kernel: int, shift: int, dtype: paddle.dtype) -> Tensor:
    """Return [size, kernel, size]: 1 where kernel weight j of output o applies to input i, after roll and padding."""
    rolled = np.arange(size)[:, None] + np.arange(kernel) - kernel // 2
    inside = (rolled >= 0) & (rolled < size)
    taps = np.eye(size)[(rolled - shift) % size] * inside[..., None]
    return paddle.to_tensor(taps, dtype, place=paddle.CPUPlace())


class MixShiftBlock(nn.Layer):
    """x + DropPath(gamma * MLP(LayerNorm(mix(x)))); `mix` is the sum of the two shifted convolutions.

    Args:
        dim: channels C.
        shift_dist: shift of each channel group, pixels: to the right in one branch, down in the other.
        mix_size: kernel size of each group, odd.
        mlp_ratio: hidden channels of the MLP = int(mlp_ratio * C).
        drop_path_rate: stochastic depth rate.
    """

    def __init__(
        self,
        dim: int,
        shift_dist: Sequence[int],
        mix_size: Sequence[int],
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.shift_dist = tuple(shift_dist)
        self.group_dims = split_channels(dim, len(self.shift_dist))
        self.gamma = self.create_parameter([dim], default_initializer=initializer.Constant(LAYER_SCALE))
        self.dwconv_lr = _depthwise_convs(self.group_dims, mix_size)
        self.dwconv_td = _depthwise_convs(self.group_dims, mix_size)
        self.norm = LayerNorm(dim, epsilon=NORM_EPS)
        hidden_dim = hidden_channels(dim, mlp_ratio)
        self.pwconv1 = Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.pwconv2 = Linear(hidden_dim, dim)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        z = self.norm(self.mix(x))
        z = run_mlp(z, self.pwconv1, self.act, self.pwconv2)
        return x + self.drop_path(self.gamma * z)

    def mix(self, x: Tensor) -> Tensor:
        """Sum the left-right and top-down branches, [B, H, W, C] -> [B, H, W, C]."""
        convs = list(zip(self.dwconv_lr, self.dwconv_td))
        # One bias for both branches: its gradient, a sum over all positions, costs as much as a small convolution.
        bias = paddle.concat([lr.bias + td.bias for lr, td in convs])
        weights = [conv.weight for pair in convs for conv in pair]
        if ops.usable(x, bias, *weights):
            weight = paddle.concat([weight.flatten() for weight in weights])
            kernels = [weight.shape[-1] for weight in weights[::2]]
            return ops.shifted_convs(x, weight, bias, self.group_dims, kernels, self.shift_dist)
        # On CPUs, matrix products are 3.1 to 9.6 times faster than Paddle's depthwise convolution (Tiny, batch 8, one
        # thread, forward and backward, by stage). GPUs and exported models use the convolution.
        products = paddle.in_dynamic_mode() and is_on_cpu(x)
        conv, axis = (shifted_conv_as_products, 0) if products else (shifted_conv, 1)
        maps = x.transpose([3, 0, 1, 2] if products else [0, 3, 1, 2])
        groups = zip(maps.split(self.group_dims, axis), self.shift_dist, convs)
        z = [conv(group, lr.weight, (0, s)) + conv(group, td.weight, (s, 0)) for group, s, (lr, td) in groups]
        z = paddle.concat(z, axis) + bias.reshape([-1] + [1] * (3 - axis))
        return z.transpose([1, 2, 3, 0] if products else [0, 2, 3, 1])


def _depthwise_convs(group_dims: Sequence[int], mix_size: Sequence[int]) -> nn.LayerList:
    """Build the layers that hold the parameters of one branch; their forward methods are not used."""
    convs = nn.LayerList(nn.Conv2D(dim, dim, kernel, groups=dim) for dim, kernel in zip(group_dims, mix_size))
    for conv in convs:
        torch_conv_(conv)
    return convs


# ---------------------------------------------------------------------------------------------------- pyramid
class PatchProjection(nn.Layer):
    """Project each patch linearly, then normalize it. Rows and columns that do not fill a patch are dropped.

    Args:
        in_dim: channels of the input.
        dim: channels C of the output.
        patch_size: side of a patch.
        norm: LayerNorm after the projection.
    """

    def __init__(self, in_dim: int, dim: int, patch_size: int, norm: bool = True):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2D(in_dim, dim, patch_size, patch_size)
        torch_conv_(self.proj)
        self.norm = LayerNorm(dim, epsilon=NORM_EPS) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_dim, H, W] -> [B, H // patch_size, W // patch_size, C]."""
        x = project_patches(x, self.proj, self.patch_size)
        return x if self.norm is None else self.norm(x)


class Stage(nn.Layer):
    """Blocks of one resolution, then (except in the last stage) a projection that halves sides and doubles channels."""

    def __init__(self, dim: int, blocks: Sequence[MixShiftBlock], last: bool):
        super().__init__()
        self.blocks = nn.LayerList(blocks)
        self.downsample = None if last else PatchProjection(dim, 2 * dim, 2)

    def forward(self, x: Tensor, checkpoint: bool = False) -> Tensor:
        """[B, H, W, C] -> [B, H // 2, W // 2, 2 C], or [B, H, W, C] in the last stage."""
        return self.project(self.run_blocks(x, checkpoint))

    def run_blocks(self, x: Tensor, checkpoint: bool = False) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]; `checkpoint`: gradient checkpointing."""
        for block in self.blocks:
            x = run_block(block, x, checkpoint=checkpoint)
        return x

    def project(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H // 2, W // 2, 2 C], or [B, H, W, C] in the last stage."""
        return x if self.downsample is None else self.downsample(x.transpose([0, 3, 1, 2]))


class MSMLP(Classifier):
    """MS-MLP image classifier for any image size of at least `min_size` pixels.

    Args:
        patch_size: side of a patch, pixels.
        in_chans: channels of the image.
        num_classes: K; 0: return pooled features.
        embed_dim: channels of the first stage, doubled in each further stage.
        depths: number of blocks of each stage.
        shift_dist: shift of each channel group, pixels, in all stages.
        mix_size: for each stage the kernel size of each group, odd.
        mlp_ratio: hidden channels of the MLPs / channels.
        patch_norm: LayerNorm after the patch embedding; the projections between stages always have one.
        drop_rate: dropout after the patch embedding.
        drop_path_rate: stochastic depth rate.
        drop_path_ramp: increase the rate linearly over the depth; False: constant rate.
    """

    def __init__(
        self,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (3, 3, 9, 3),
        shift_dist: Sequence[int] = (-2, -1, 0, 1, 2),
        mix_size: Sequence[Sequence[int]] = ((1, 1, 3, 5, 7), (1, 3, 3, 5, 7), (1, 5, 5, 5, 7), (1, 7, 7, 7, 7)),
        mlp_ratio: float = 4.0,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_ramp: bool = False,
    ):
        super().__init__()
        _check_groups(depths, shift_dist, mix_size)
        self.depths = tuple(depths)
        self.depth = sum(depths)
        self.min_size = patch_size * 2 ** (len(depths) - 1)
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchProjection(in_chans, embed_dim, patch_size, patch_norm)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(drop_path_rates(drop_path_rate, self.depth, drop_path_ramp))
        self.layers = nn.LayerList()
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            blocks = [MixShiftBlock(dim, shift_dist, mix_size[i], mlp_ratio, next(rates)) for _ in range(depth)]
            self.layers.append(Stage(dim, blocks, last=i + 1 == len(depths)))
        self.norm = LayerNorm(self.num_features, epsilon=NORM_EPS)
        self.reset_classifier(num_classes)
        self.apply(init_linear_)

    def reset_classifier(self, num_classes: int) -> None:
        """See `Classifier`."""
        self.num_classes = num_classes
        self.head = Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_linear_(self.head)

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError if an image is too small for the number of stages."""
        if min(height, width) < self.min_size:
            raise UserError(
                f'an image of {height}x{width} pixels is too small for {len(self.depths)} stages (MODEL.MSMLP.DEPTHS); '
                f'its sides must be at least {self.min_size}.'
            )

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> maps of the last stage [B, h, w, C], not normalized."""
        x = self._embed(x)
        for stage in self.layers:
            x = stage(x, self.grad_checkpointing)
        return x

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, want: Collection[str] = ('maps',)
    ) -> Intermediates:
        """See `Classifier`, by stage; `want` may name 'maps' [B, C, h, w], the output of the last block of a stage."""
        want, recorded = requested(want, indices, len(self.depths), ('maps',)), {}
        x = self._embed(x)
        for i, stage in enumerate(self.layers):
            x = stage.run_blocks(x, self.grad_checkpointing)
            if i in want:
                recorded[i] = BlockIntermediates(maps=x.transpose([0, 3, 1, 2]))
            x = stage.project(x)
        return Intermediates(x, recorded)

    def _embed(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, h, w, embed_dim]."""
        if paddle.in_dynamic_mode():  # the size may be unknown in an export
            self.check_size(x.shape[2], x.shape[3])
        return self.pos_drop(self.patch_embed(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps [B, h, w, C] -> logits [B, K], or with `pre_logits` their normalized mean [B, C]."""
        x = self.norm(x.mean([1, 2]))
        return x if pre_logits else self.head(x)

    def layer_id(self, name: str) -> int:
        """See `Classifier`; blocks are counted through all stages, and a projection belongs to the block before it."""
        if not name.startswith('layers.'):
            return super().layer_id(name)
        _, stage, part, block, *_ = name.split('.')
        first = sum(self.depths[: int(stage)])
        return first + (int(block) + 1 if part == 'blocks' else self.depths[int(stage)])


def _check_groups(depths: Sequence[int], shift_dist: Sequence[int], mix_size: Sequence[Sequence[int]]) -> None:
    lists = [('DEPTHS', depths), ('SHIFT_DIST', shift_dist)]
    lists += [(f'MIX_SIZE of stage {stage}', kernels) for stage, kernels in enumerate(mix_size)]
    for name, values in lists:
        if not isinstance(values, (list, tuple)) or not values or not all(isinstance(value, int) for value in values):
            raise UserError(f'MODEL.MSMLP.{name} must be a list of whole numbers, not {values!r}.')
    if min(depths) < 1:
        raise UserError(f'MODEL.MSMLP.DEPTHS is {list(depths)}, but each stage needs a block.')
    if len(mix_size) != len(depths):
        raise UserError(
            f'MODEL.MSMLP.MIX_SIZE has {len(mix_size)} stages, but DEPTHS {list(depths)} has {len(depths)}: change one.'
        )
    for name, kernels in lists[2:]:
        if len(kernels) != len(shift_dist):
            raise UserError(
                f'MODEL.MSMLP.{name} has {len(kernels)} kernels for the {len(shift_dist)} groups of SHIFT_DIST.'
            )
        if any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise UserError(
                f'MODEL.MSMLP.{name} is {list(kernels)}, but kernels must be odd: even ones change the size of a map.'
            )


@register_model('ms_mlp')
def build_ms_mlp(config) -> MSMLP:
    """Build MS-MLP from a configuration."""
    msmlp = config.MODEL.MSMLP
    model = MSMLP(
        patch_size=msmlp.PATCH_SIZE,
        in_chans=config.DATA.IMAGE_CHANNELS,
        num_classes=config.MODEL.NUM_CLASSES,
        embed_dim=msmlp.EMBED_DIM,
        depths=msmlp.DEPTHS,
        shift_dist=msmlp.SHIFT_DIST,
        mix_size=msmlp.MIX_SIZE,
        mlp_ratio=msmlp.MLP_RATIO,
        patch_norm=msmlp.PATCH_NORM,
        drop_rate=config.MODEL.DROPOUT,
        drop_path_rate=config.MODEL.DROPPATH,
        drop_path_ramp=config.MODEL.DROPPATH_RAMP,
    )
    model.check_size(*image_size(config))
    return model
