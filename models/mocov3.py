# SPDX-License-Identifier: Apache-2.0
"""MoCo-v3: "An Empirical Study of Training Self-Supervised Vision Transformers", https://arxiv.org/abs/2104.02057.

Symmetric InfoNCE between two augmented views: the trained encoder predicts the projection of the other view by a momentum
encoder, a moving average of its weights. For light encoders, as in "A Closer Look at Self-Supervised Lightweight
Vision Transformers" (MAE-Lite), https://arxiv.org/abs/2205.14443. Parameter names are upstream's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import initializer

from models.base import Classifier
from models.layers import Intermediates, SyncBatchNorm, computed_table, fix_, moco_position_table, xavier_uniform_
from models.options import pretraining_options
from models.registry import register_model
from models.vision_transformer import VisionTransformer
from models.weights.rules import WeightRules
from utils.errors import UserError


class ContrastiveOutput(NamedTuple):
    """Output for two views, each [B, dim], not normalized.

    Attributes:
        q1: prediction from view 1, to be compared with `k2`.
        q2: prediction from view 2, to be compared with `k1`.
        k1: projection of view 1 by the momentum encoder, without gradient.
        k2: projection of view 2 by the momentum encoder, without gradient.
    """

    q1: Tensor
    q2: Tensor
    k1: Tensor
    k2: Tensor


class MoCoWeights(WeightRules):
    """Rules of MoCo-v3."""

    def metadata(self, model) -> dict:
        """The number of heads."""
        return model.base_encoder.weight_rules.metadata(model.base_encoder)

    def resize(self, model, name: str, array: np.ndarray) -> np.ndarray:
        """Position embeddings of another resolution are computed, not interpolated."""
        return computed_table(model.base_encoder.pos_embed, array) if name.endswith('encoder.pos_embed') else array


class MoCoV3(Classifier):
    """A Vision Transformer with a projector, a momentum encoder, and a predictor.

    The position embedding is fixed (sines and cosines): part of the state dict, but not trained. The momentum encoder is
    part of the state dict, but gets no gradients.

    Args:
        dim: channels of the projections and predictions.
        mlp_dim: hidden channels of projector and predictor.
        freeze_patch: do not train the patch embedding, for stability.
        encoder: arguments of `VisionTransformer`.
    """

    num_classes = 0
    decays_all = True
    weight_rules = MoCoWeights()

    def __init__(self, dim: int = 256, mlp_dim: int = 4096, freeze_patch: bool = False, **encoder):
        super().__init__()
        self.base_encoder = _encoder(dim, mlp_dim, **encoder)
        self.momentum_encoder = _encoder(dim, mlp_dim, **encoder)
        self.predictor = _projection_mlp(2, dim, mlp_dim, dim)
        for average, parameter in self._pairs():
            average.set_value(parameter)
            average.stop_gradient = True
        if freeze_patch:
            for parameter in self.base_encoder.patch_embed.parameters():
                parameter.stop_gradient = True
        self.embed_dim, self.depth = self.base_encoder.embed_dim, self.base_encoder.depth
        self._next_momentum: float | None = None

    def _pairs(self):
        return zip(self.momentum_encoder.parameters(), self.base_encoder.parameters())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `Classifier`; the momentum encoder has no backward pass."""
        self.base_encoder.set_grad_checkpointing(enable)

    def set_momentum(self, momentum: float) -> None:
        """Let the next training pass start with average <- momentum * average + (1 - momentum) * parameter."""
        self._next_momentum = momentum

    # ------------------------------------------------------------------------------------------------ forward
    def forward(self, x: Tensor) -> ContrastiveOutput | Tensor:
        """Compares views, or projects images.

        Args:
            x: normalized views [B, 2, in_chans, H, W], or images [B, in_chans, H, W].

        Returns:
            A `ContrastiveOutput` of views; projections [B, dim] by the trained encoder of images.
        """
        if x.ndim == 4:
            return super().forward(x)
        view1, view2 = x.unbind(1)
        q1 = self.predictor(self.base_encoder(view1))  # one after the other: batch statistics are of one view
        q2 = self.predictor(self.base_encoder(view2))
        with paddle.no_grad():
            if self.training and self._next_momentum is not None:
                self._update_momentum_encoder(self._next_momentum)
                self._next_momentum = None
            k1, k2 = self.momentum_encoder(view1), self.momentum_encoder(view2)
        return ContrastiveOutput(q1, q2, k1, k2)

    def _update_momentum_encoder(self, momentum: float) -> None:
        for average, parameter in self._pairs():
            average.scale_(momentum)
            average.add_(parameter * (1 - momentum))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> normalized tokens [B, 1 + N, C] of the trained encoder."""
        return self.base_encoder.forward_features(x)

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, want: Collection[str] = ('tokens',)
    ) -> Intermediates:
        """Those of the trained encoder."""
        return self.base_encoder.forward_intermediates(x, indices, want)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> projections [B, dim]; with `pre_logits` the class token [B, C]."""
        return self.base_encoder.forward_head(x, pre_logits)

    def reset_classifier(self, num_classes: int) -> None:
        """Raise UserError for any number of classes: there is no classifier."""
        if num_classes:
            raise UserError('MODEL.TYPE mocov3 takes no classifier: start a MODEL.TYPE vit from its weights.')

    def layer_id(self, name: str) -> int:
        """That of the encoder; the last one for all that is not in it."""
        part, _, rest = name.partition('.')
        return self.base_encoder.layer_id(rest) if part == 'base_encoder' else self.num_layers


def _encoder(dim: int, mlp_dim: int, **options) -> VisionTransformer:
    """A Vision Transformer with MoCo-v3's initialization, whose head is the projector."""
    vit = VisionTransformer(num_classes=0, **{'drop_path_rate': 0.0, **options})
    grid = (vit.patch_embed.grid_size,) * 2
    fix_(vit.pos_embed, moco_position_table(vit.embed_dim, grid, vit.num_prefix))
    initializer.Normal(std=1e-6)(vit.cls_token)
    for name, layer in vit.named_sublayers():
        if name.endswith('qkv'):  # three matrices in one
            initializer.XavierUniform(fan_in=vit.embed_dim, fan_out=vit.embed_dim)(layer.weight)
        elif isinstance(layer, nn.Linear):
            xavier_uniform_(layer)
    conv = vit.patch_embed.conv
    initializer.XavierUniform(fan_in=conv.weight[0].size, fan_out=vit.embed_dim)(conv.weight)
    initializer.Constant(0.0)(conv.bias)
    vit.head = _projection_mlp(3, vit.embed_dim, mlp_dim, dim)
    return vit


def _projection_mlp(depth: int, channels: int, hidden: int, out: int) -> nn.Sequential:
    """`depth` linear maps without biases, each followed by a batch norm, and all but the last by a ReLU too."""
    sizes = [channels, *[hidden] * (depth - 1), out]
    layers: list[nn.Layer] = []
    for number, (before, after) in enumerate(zip(sizes, sizes[1:]), 1):
        uniform = initializer.Uniform(-(before**-0.5), before**-0.5)
        layers.append(nn.Linear(before, after, weight_attr=paddle.ParamAttr(initializer=uniform), bias_attr=False))
        last = number == depth
        layers += [SyncBatchNorm(after, affine=not last)] + [nn.ReLU()] * (not last)
    return nn.Sequential(*layers)


@register_model('mocov3')
def build_mocov3(config) -> MoCoV3:
    """Build MoCo-v3 from a configuration."""
    moco = config.MODEL.MOCO
    return MoCoV3(dim=moco.DIM, mlp_dim=moco.MLP_DIM, freeze_patch=moco.FREEZE_PATCH, **pretraining_options(config))
