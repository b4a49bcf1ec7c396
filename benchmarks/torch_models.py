# SPDX-License-Identifier: Apache-2.0
"""The compared models in PyTorch: timm's where it has them; plain references of EViT and MS-MLP.

EViT: https://arxiv.org/abs/2202.07800, MS-MLP: https://arxiv.org/abs/2202.06510. Parameters have the names of the published
weights, so that the models of this suite can load them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

NORM_EPS = 1e-6
DROP_PATH = 0.1


def build(name: str) -> nn.Module:
    """Build a model by the name of its configuration in this suite."""
    return BUILDERS[name]()


# ---------------------------------------------------------------------------------------------------- EViT
class EViT(VisionTransformer):
    """Vision Transformer whose blocks `locations` keep a share of the patch tokens and fuse the rest into one token.

    Args:
        keep_rate: share of the tokens to keep, by attention from the class token.
        locations: numbers of these blocks, from 0.
        options: of `VisionTransformer`.
    """

    def __init__(self, keep_rate: float, locations: Sequence[int] = (3, 6, 9), **options):
        super().__init__(**options)
        self.keep_rate, self.locations = keep_rate, locations

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K]."""
        x = self._pos_embed(self.patch_embed(x))
        for number, block in enumerate(self.blocks):
            x = self._reducing_block(block, x) if number in self.locations else block(x)
        return self.forward_head(self.norm(x))

    def _reducing_block(self, block: nn.Module, x: Tensor) -> Tensor:
        mixed, scores = attend(block.attn, block.norm1(x))
        x = x + block.drop_path1(mixed)
        x = fuse_tokens(x, scores, math.ceil(self.keep_rate * (x.shape[1] - 1)))
        return x + block.drop_path2(block.mlp(block.norm2(x)))


def attend(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run an attention layer of timm. Return its output [B, N, C] and the class token's attention, mean of heads [B, N - 1]."""
    batch, tokens, dim = x.shape
    q, k, v = layer.qkv(x).reshape(batch, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q * layer.scale @ k.transpose(-2, -1)).softmax(-1)
    mixed = layer.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))
    return mixed, weights[:, :, 0, 1:].mean(1)


def fuse_tokens(x: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return class token, the `count` tokens of highest score, and the sum of the others weighted by score."""
    body, dim = x[:, 1:], x.shape[-1]
    order = scores.detach().argsort(dim=1, descending=True)
    kept, rest = order[:, :count], order[:, count:]
    weights = scores.gather(1, rest).unsqueeze(-1)
    fused = (body.gather(1, rest.unsqueeze(-1).expand(-1, -1, dim)) * weights).sum(1, keepdim=True)
    return torch.cat([x[:, :1], body.gather(1, kept.unsqueeze(-1).expand(-1, -1, dim)), fused], 1)


# ---------------------------------------------------------------------------------------------------- MS-MLP
class MixShiftBlock(nn.Module):
    """Shifts and depthwise convolutions of channel groups along both axes, then an MLP, with LayerScale."""

    def __init__(self, dim: int, shifts: Sequence[int], kernels: Sequence[int], drop_path: float):
        super().__init__()
        size = math.ceil(dim / len(shifts))
        self.sizes = [min(size, dim - start) for start in range(0, dim, size)]
        self.shifts = shifts
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))
        self.dwconv_lr, self.dwconv_td = (
            nn.ModuleList(nn.Conv2d(c, c, k, padding=k // 2, groups=c) for c, k in zip(self.sizes, kernels))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(dim, NORM_EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        parts = zip(x.split(self.sizes, 1), self.shifts, self.dwconv_lr, self.dwconv_td)
        mixed = [lr(part.roll(shift, 3)) + td(part.roll(shift, 2)) for part, shift, lr, td in parts]
        z = self.norm(torch.cat(mixed, 1).permute(0, 2, 3, 1))
        z = self.gamma * self.pwconv2(F.gelu(self.pwconv1(z)))
        return x + self.drop_path(z.permute(0, 3, 1, 2))


class Projection(nn.Module):
    """Convolution of patches, then LayerNorm of each position, [B, C, H, W] -> [B, C', H / size, W / size]."""

    def __init__(self, channels: int, dim: int, size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, size, size)
        self.norm = nn.LayerNorm(dim, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MSMLP(nn.Module):
    """MS-MLP image classifier.

    Args:
        dim: channels of the first stage, doubled in each further one.
        depths: blocks of each stage.
        shifts: pixels, of each channel group.
        kernels: sizes for each stage and channel group.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: Sequence[int] = (3, 3, 9, 3),
        shifts: Sequence[int] = (-2, -1, 0, 1, 2),
        kernels: Sequence[Sequence[int]] = ((1, 1, 3, 5, 7), (1, 3, 3, 5, 7), (1, 5, 5, 5, 7), (1, 7, 7, 7, 7)),
        drop_path: float = DROP_PATH,
        num_classes: int = 1000,
    ):
        super().__init__()
        self.patch_embed = Projection(3, dim, 4)
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            width, stage = dim * 2**i, nn.Module()
            stage.blocks = nn.ModuleList(MixShiftBlock(width, shifts, kernels[i], next(rates)) for _ in range(depth))
            if i + 1 < len(depths):
                stage.downsample = Projection(width, 2 * width, 2)
            self.layers.append(stage)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K]."""
        x = self.patch_embed(x)
        for stage in self.layers:
            for block in stage.blocks:
                x = block(x)
            if hasattr(stage, 'downsample'):
                x = stage.downsample(x)
        return self.head(self.norm(x.mean((2, 3))))


# ---------------------------------------------------------------------------------------------------- names
def _evit() -> EViT:
    return EViT(0.5, embed_dim=384, depth=12, num_heads=6, drop_path_rate=DROP_PATH)


def _vit_tiny() -> VisionTransformer:
    return VisionTransformer(embed_dim=192, depth=12, num_heads=12, global_pool='avg', drop_path_rate=DROP_PATH)


BUILDERS = {
    'gmlp_s16_224': lambda: timm.create_model('gmlp_s16_224', drop_path_rate=DROP_PATH),
    'deit_small_patch16_224': lambda: timm.create_model('deit_small_patch16_224', drop_path_rate=DROP_PATH),
    'evit_small_patch16_224_k05_fuse': _evit,
    'vit_tiny_patch16_224_mae_finetune': _vit_tiny,
    'ms_mlp_tiny_patch4_shift5_224': MSMLP,
}
