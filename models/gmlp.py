# SPDX-License-Identifier: Apache-2.0
"""gMLP: image classification without attention and without position embeddings.

"Pay Attention to MLPs", https://arxiv.org/abs/2105.08050. Only the spatial gating unit mixes
tokens: a linear map over the token axis, whose output gates half of the channels. Outputs equal those of timm's
gmlp_*_224, whose gate norm has another epsilon than the other norms. Parameter names are PaddleViT's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
    PatchEmbed,
    are_plain,
    drop_path_rates,
    drops,
    hidden_channels,
    lecun_normal_,
    operator_replaces,
    requested,
    run_block,
    tokens_to_maps,
    xavier_uniform_,
)
from models.registry import register_model
from models.weights.rules import WeightRules
from utils.errors import UserError
from utils.sizes import size_text, size_value

NORM_EPS = 1e-6
GATE_NORM_EPS = 1e-5  # framework default, which only the gate norm of the published weights was trained with


class SpatialGatingUnit(nn.Layer):
    """Spatial gating unit: gate half of the channels by a linear map over the tokens of the other half (section 2.1).

    Args:
        dim: channels of the input, even.
        num_tokens: N; fixed, since the map is an [N, N] matrix.
    """

    def __init__(self, dim: int, num_tokens: int):
        super().__init__()
        self.norm = LayerNorm(dim // 2, epsilon=GATE_NORM_EPS)
        self.proj = Linear(num_tokens, num_tokens)
        # Near 0 and 1: the initial unit returns its first half, so that the block starts as an MLP (section 2.1).
        initializer.Normal(std=1e-6)(self.proj.weight)
        initializer.Constant(1.0)(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, dim / 2]."""
        return self.gate(*x.chunk(2, axis=-1))

    def gate(self, u: Tensor, v: Tensor) -> Tensor:
        """Gate u by v, the halves of the channels [B, N, dim / 2]."""
        v = self.norm(v)
        # Apply proj over the token axis; multiplication from the left avoids two transposes.
        v = paddle.matmul(self.proj.weight, v, transpose_x=True)
        return u * (v + self.proj.bias.astype(v.dtype).unsqueeze(-1))


class GatedMlp(nn.Layer):
    """Linear C -> H, exact GELU, spatial gating H -> H / 2, Linear H / 2 -> C."""

    def __init__(self, dim: int, hidden_dim: int, num_tokens: int, drop_rate: float = 0.0):
        super().__init__()
        if hidden_dim % 2:
            raise UserError(
                'the spatial gating unit splits the hidden channels in halves, but int(MLP_RATIO * EMBED_DIM) = '
                f'{hidden_dim} is odd; change MLP_RATIO or EMBED_DIM.'
            )
        self.fc1 = Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.gate = SpatialGatingUnit(hidden_dim, num_tokens)
        self.fc2 = Linear(hidden_dim // 2, dim)
        self.drop = nn.Dropout(drop_rate)
        xavier_uniform_(self.fc1, bias_std=1e-6)
        xavier_uniform_(self.fc2, bias_std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        if not drops(self.drop):
            if operator_replaces(x, self._layers(), _CLASSES):
                return ops.gated_mlp(x, *self._weights(), epsilon=self.gate.norm._epsilon)
            if not paddle.in_dynamic_mode() and are_plain(self._layers(), _CLASSES):
                return self.fc2(self.gate.gate(*self._halves(x)))
        x = self.gate(self.drop(self.act(self.fc1(x))))
        return self.drop(self.fc2(x))

    def _layers(self) -> list[nn.Layer]:
        """Return the layers of `_CLASSES`."""
        norm, proj = (getattr(self.gate, name, None) for name in ('norm', 'proj'))
        return [self.fc1, self.act, self.gate, norm, proj, self.fc2, self.drop]

    def _weights(self) -> list[Tensor]:
        layers = (self.fc1, self.gate.norm, self.gate.proj, self.fc2)
        return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]

    def _halves(self, x: Tensor) -> list[Tensor]:
        """Return the halves of the gate's input [B, N, H / 2], by two linear layers, for exported programs.

        Without a split of activations, bfloat16 is 1.3 to 1.5 times as fast in Paddle's inference (Small, batch 8, one thread).
        Parameters are sliced: after `chunk` of a parameter, Paddle 3.3's inference is wrong from its second run on.
        """
        weight, bias, half = self.fc1.weight, self.fc1.bias, self.fc1.bias.shape[0] // 2
        halves = ((weight[:, :half], bias[:half]), (weight[:, half:], bias[half:]))
        return [self.act(F.linear(x, *parameters)) for parameters in halves]


_CLASSES = (Linear, nn.GELU, SpatialGatingUnit, LayerNorm, Linear, Linear, nn.Dropout)  # of what an operator replaces


class SpatialGatingBlock(nn.Layer):
    """x + DropPath(GatedMlp(LayerNorm(x)))."""

    def __init__(self, dim: int, hidden_dim: int, num_tokens: int, drop_rate: float, drop_path_rate: float):
        super().__init__()
        self.norm = LayerNorm(dim, epsilon=NORM_EPS)
        self.mlp_channels = GatedMlp(dim, hidden_dim, num_tokens, drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return x + self.drop_path(self.mlp_channels(self.norm(x)))


class GmlpWeights(WeightRules):
    """Rename timm's `stem.` and `blocks.` to PaddleViT's `patch_embed.` and `mixer_layers.`."""

    def rename(self, name: str) -> str | None:
        """See `WeightRules`."""
        for theirs, ours in (
            ('stem.proj.', 'patch_embed.patch_embed.'),
            ('stem.', 'patch_embed.'),
            ('blocks.', 'mixer_layers.'),
        ):
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return name


class GMLP(Classifier):
    """gMLP image classifier. The weights fix the image size, since the gates have one weight per pair of tokens.

    Args:
        img_size: side of the square image, pixels.
        patch_size: side of a patch, pixels.
        in_chans: channels of the image.
        num_classes: K; 0: return pooled features.
        embed_dim: C.
        depth: number of blocks.
        mlp_ratio: hidden channels H = int(mlp_ratio * embed_dim), even.
        stem_norm: LayerNorm after the patch embedding.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the blocks.
        drop_path_rate: stochastic depth rate.
        drop_path_ramp: increase the rate linearly over the depth; False: constant rate.
        head_bias: initial bias of the classifier; -log(K) for a sigmoid loss starts at probability 1 / (K + 1).
    """

    blocks_name = 'mixer_layers'
    weight_rules = GmlpWeights()

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        mlp_ratio: float = 6.0,
        stem_norm: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_ramp: bool = False,
        head_bias: float = 0.0,
    ):
        super().__init__()
        if not isinstance(size_value(img_size), int):
            raise UserError(
                f'gMLP takes square images only, not {size_text(img_size)}: its gates have one weight per pair of patches of a '
                'fixed square grid, which cannot be interpolated; set DATA.IMAGE_SIZE to one number.'
            )
        self.embed_dim = embed_dim
        self.depth = depth
        self.head_bias = head_bias
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, norm_eps=NORM_EPS if stem_norm else None, proj='patch_embed'
        )
        lecun_normal_(self.patch_embed.conv)
        hidden_dim, num_tokens = hidden_channels(embed_dim, mlp_ratio), self.patch_embed.num_patches
        self.mixer_layers = nn.LayerList(
            SpatialGatingBlock(embed_dim, hidden_dim, num_tokens, proj_drop_rate, rate)
            for rate in drop_path_rates(drop_path_rate, depth, drop_path_ramp)
        )
        self.norm = LayerNorm(embed_dim, epsilon=NORM_EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """See `Classifier`; the initial logits are all equal."""
        self.num_classes = num_classes
        self.head = Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        if num_classes:
            initializer.Constant(0.0)(self.head.weight)
            initializer.Constant(self.head_bias)(self.head.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, img_size, img_size] -> normalized tokens [B, N, C]."""
        x = self.patch_embed(x)
        for block in self.mixer_layers:
            x = run_block(block, x, checkpoint=self.grad_checkpointing)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalized tokens [B, N, C] -> logits [B, K], or with `pre_logits` their mean [B, C]."""
        x = x.mean(1)
        return x if pre_logits else self.head(self.head_drop(x))

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, want: Collection[str] = ('tokens',)
    ) -> Intermediates:
        """See `Classifier`; `want` may name 'tokens' [B, N, C] and 'maps' [B, C, S / P, S / P]."""
        want, recorded = requested(want, indices, self.depth, ('tokens', 'maps')), {}
        x = self.patch_embed(x)
        for i, block in enumerate(self.mixer_layers):
            x = run_block(block, x, checkpoint=self.grad_checkpointing)
            if i in want:
                maps = tokens_to_maps(x, self.patch_embed.grid_size) if 'maps' in want[i] else None
                recorded[i] = BlockIntermediates(tokens=x if 'tokens' in want[i] else None, maps=maps)
        return Intermediates(self.norm(x), recorded)


@register_model('gmlp', 'GatedMLP')
def build_gmlp(config) -> GMLP:
    """Build gMLP from a configuration."""
    mixer = config.MODEL.MIXER
    return GMLP(
        img_size=config.DATA.IMAGE_SIZE,
        patch_size=mixer.PATCH_SIZE,
        in_chans=config.DATA.IMAGE_CHANNELS,
        num_classes=config.MODEL.NUM_CLASSES,
        embed_dim=mixer.EMBED_DIM,
        depth=mixer.DEPTH,
        mlp_ratio=mixer.MLP_RATIO,
        stem_norm=mixer.STEM_NORM,
        proj_drop_rate=config.MODEL.DROPOUT,
        drop_path_rate=config.MODEL.DROPPATH,
        drop_path_ramp=config.MODEL.DROPPATH_RAMP,
    )
