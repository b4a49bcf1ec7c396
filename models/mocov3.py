# SPDX-License-Identifier: Apache-2.0
"""MoCo-v3: "An Empirical Study of Training Self-Supervised Vision Transformers", https://arxiv.org/abs/2104.02057.

Symmetric InfoNCE between two augmented views: the base encoder and a predictor predict the projection of the other view
by the momentum encoder, a moving average of the base encoder. Light encoders follow "A Closer Look at Self-Supervised
Lightweight Vision Transformers" (MAE-Lite), https://arxiv.org/abs/2205.14443. Parameter names are upstream's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import initializer

from models.base import Classifier
from models.layers import (
    Intermediates,
    Linear,
    SyncBatchNorm,
    computed_table,
    copy_,
    fan_in,
    fix_,
    moco_position_table,
    xavier_uniform_,
)
from models.options import pretraining_options
from models.paddle_private import average_all
from models.registry import register_model
from models.vision_transformer import VisionTransformer
from models.weights.rules import Grid, WeightRules
from utils import device
from utils.errors import UserError


class ContrastiveOutput(NamedTuple):
    """Output for two views, each [B, dim], not normalized.

    Attributes:
        q1: query: prediction from view 1, compared with `k2`.
        q2: query: prediction from view 2, compared with `k1`.
        k1: key: projection of view 1 by the momentum encoder, without gradient.
        k2: key: projection of view 2 by the momentum encoder, without gradient.
    """

    q1: Tensor
    q2: Tensor
    k1: Tensor
    k2: Tensor


class MoCoWeights(WeightRules):
    """Rules of MoCo-v3."""

    def metadata(self, model) -> dict:
        """Return the number of heads."""
        return model.base_encoder.weight_rules.metadata(model.base_encoder)

    def resize(self, model, name: str, array: np.ndarray, grid: Grid | None = None) -> np.ndarray:
        """Compute position embeddings of another resolution instead of interpolating them."""
        return computed_table(model.base_encoder.pos_embed, array) if name.endswith('encoder.pos_embed') else array


class MoCoV3(Classifier):
    """Base encoder with projector, momentum encoder with projector, and predictor.

    The sine-cosine position embedding is fixed: part of the state dict, but not trained. The momentum encoder is part
    of the state dict, but gets no gradients.

    Args:
        dim: channels of the projections and predictions.
        mlp_dim: hidden channels of projector and predictor.
        freeze_patch: freeze the patch embedding for training stability (section 4.2).
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
            copy_(average, parameter)
            average.stop_gradient = True
        if freeze_patch and 'conv_stem' in encoder.get('variants', ()):
            raise UserError(
                'MODEL.MOCO.FREEZE_PATCH is for a linear patch embedding: remove it, or MODEL.TRANS.CONV_STEM.'
            )
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
        """Update the momentum encoder in the next training pass: w <- momentum * w + (1 - momentum) * base w."""
        self._next_momentum = momentum

    # ------------------------------------------------------------------------------------------------ forward
    def forward(self, x: Tensor) -> ContrastiveOutput | Tensor:
        """Compute predictions and projections of two views, or projections of images.

        Args:
            x: normalized views [B, 2, in_chans, H, W], or images [B, in_chans, H, W].

        Returns:
            `ContrastiveOutput` for views; projections [B, dim] by the base encoder for images.
        """
        if x.ndim == 4:
            return Classifier.forward(self, x)  # `super()` of a subclass recurses without end in exported programs
        view1, view2 = x.unbind(1)
        q1 = self.predictor(self.base_encoder(view1))  # separate passes: batch statistics are per view
        q2 = self.predictor(self.base_encoder(view2))
        with paddle.no_grad():
            if self.training and self._next_momentum is not None:
                self._update_momentum_encoder(self._next_momentum)
                self._next_momentum = None
            k1, k2 = self.momentum_encoder(view1), self.momentum_encoder(view2)
        return ContrastiveOutput(q1, q2, k1, k2)

    def _update_momentum_encoder(self, momentum: float) -> None:
        if device.on_gpu():  # a few operations instead of three per tensor; the last bits differ
            average_all(*zip(*self._pairs()), momentum)
            return
        for average, parameter in self._pairs():
            average.scale_(momentum)
            average.add_(parameter * (1 - momentum))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> normalized tokens [B, 1 + N, C] of the base encoder."""
        return self.base_encoder.forward_features(x)

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, want: Collection[str] = ('tokens',)
    ) -> Intermediates:
        """See `Classifier`, for the base encoder."""
        return self.base_encoder.forward_intermediates(x, indices, want)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> projections [B, dim], or with `pre_logits` the class token [B, C]."""
        return self.base_encoder.forward_head(x, pre_logits)

    def reset_classifier(self, num_classes: int) -> None:
        """Raise UserError for any number of classes but 0: there is no classifier."""
        if num_classes:
            raise UserError('MODEL.TYPE mocov3 has no classifier: fine-tune a MODEL.TYPE vit from its weights.')

    def layer_id(self, name: str) -> int:
        """See `Classifier`; `num_layers` for all parameters outside the base encoder."""
        part, _, rest = name.partition('.')
        return self.base_encoder.layer_id(rest) if part == 'base_encoder' else self.num_layers


def _encoder(dim: int, mlp_dim: int, **options) -> VisionTransformer:
    """Build a Vision Transformer with the initialization of MoCo-v3 and the projector as head."""
    vit = VisionTransformer(num_classes=0, **{'drop_path_rate': 0.0, **options})
    fix_(vit.pos_embed, moco_position_table(vit.embed_dim, vit.patch_embed.grid_size, vit.num_prefix))
    initializer.Normal(std=1e-6)(vit.cls_token)
    for name, layer in vit.named_sublayers():
        if name.endswith('qkv'):  # three matrices in one parameter
            initializer.XavierUniform(fan_in=vit.embed_dim, fan_out=vit.embed_dim)(layer.weight)
        elif isinstance(layer, nn.Linear):
            xavier_uniform_(layer)
    if 'conv_stem' not in options.get('variants', ()):
        conv = vit.patch_embed.conv
        initializer.XavierUniform(fan_in=fan_in(conv), fan_out=vit.embed_dim)(conv.weight)
        initializer.Constant(0.0)(conv.bias)
    vit.head = _projection_mlp(3, vit.embed_dim, mlp_dim, dim)
    return vit


def _projection_mlp(depth: int, channels: int, hidden: int, out: int) -> nn.Sequential:
    """Build an MLP of `depth` linear layers without biases, each with batch norm, and a ReLU except after the last."""
    sizes = [channels, *[hidden] * (depth - 1), out]
    layers: list[nn.Layer] = []
    for number, (before, after) in enumerate(zip(sizes, sizes[1:]), 1):
        uniform = initializer.Uniform(-(before**-0.5), before**-0.5)
        layers.append(Linear(before, after, weight_attr=paddle.ParamAttr(initializer=uniform), bias_attr=False))
        last = number == depth
        layers += [SyncBatchNorm(after, affine=not last)] + [nn.ReLU()] * (not last)
    return nn.Sequential(*layers)


@register_model('mocov3')
def build_mocov3(config) -> MoCoV3:
    """Build MoCo-v3 from a configuration."""
    moco = config.MODEL.MOCO
    return MoCoV3(dim=moco.DIM, mlp_dim=moco.MLP_DIM, freeze_patch=moco.FREEZE_PATCH, **pretraining_options(config))
