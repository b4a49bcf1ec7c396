# SPDX-License-Identifier: Apache-2.0
"""Optimizers, parameter groups and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import paddle

from engine.flat import Layout
from engine.paddle_private import FusedAdamW, FusedLamb, FusedMomentum, divide_all, squared_norm
from models.layers.constants import constant
from utils import device
from utils.registry import Registry

OPTIMIZERS = Registry('optimizer (TRAIN.OPTIMIZER.NAME)')


def parameter_groups(
    model: paddle.nn.Layer,
    weight_decay: float,
    layer_decay: float = 1.0,
    parameters: Mapping[str, paddle.Tensor] | None = None,
) -> list[dict]:
    """Group the trainable parameters by weight decay and learning-rate factor.

    Parameters in `model.no_weight_decay()` have no weight decay. Biases and tensors of fewer than two dimensions have none
    either, unless `model.decays_all`. With `layer_decay` d < 1, layer i of n has the learning-rate factor d^(n - i) (BEiT's
    layer-wise decay), with i from `model.layer_id`. `parameters`: see `build_optimizer`.

    Returns:
        Paddle's parameter groups: `params`, `weight_decay`, `learning_rate` (a factor of the learning rate).
    """
    exempt = model.no_weight_decay()
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in (dict(model.named_parameters()) if parameters is None else parameters).items():
        if parameter.stop_gradient:
            continue
        decayed = name not in exempt and (model.decays_all or (parameter.ndim >= 2 and not name.endswith('bias')))
        scale = layer_decay ** (model.num_layers - model.layer_id(name)) if layer_decay < 1.0 else 1.0
        groups.setdefault((weight_decay if decayed else 0.0, scale), []).append(parameter)
    return [
        {'params': parameters, 'weight_decay': decay, 'learning_rate': scale}
        for (decay, scale), parameters in groups.items()
    ]


@OPTIMIZERS.register('AdamW')
def _adamw(groups: list[dict], options) -> paddle.optimizer.Optimizer:
    return FusedAdamW(
        learning_rate=0.0,  # the loop sets it before each step
        parameters=groups,
        beta1=options.BETAS[0],
        beta2=options.BETAS[1],
        epsilon=options.EPS,
    )


@OPTIMIZERS.register('SGD', 'Momentum')
def _sgd(groups: list[dict], options) -> paddle.optimizer.Optimizer:
    for group in groups:  # L2 regularization, as weight decay of SGD in PyTorch
        group['weight_decay'] = paddle.regularizer.L2Decay(group['weight_decay']) if group['weight_decay'] else None
    return FusedMomentum(
        learning_rate=0.0,
        parameters=groups,
        momentum=options.MOMENTUM,
        use_nesterov=options.NESTEROV,
    )


@OPTIMIZERS.register('Lamb')
def _lamb(groups: list[dict], options) -> paddle.optimizer.Optimizer:
    for group in groups:
        group['lamb_weight_decay'] = group.pop('weight_decay')
    return FusedLamb(
        learning_rate=0.0,
        parameters=groups,
        beta1=options.BETAS[0],
        beta2=options.BETAS[1],
        epsilon=options.EPS,
    )


class LARS(FusedMomentum):
    """LARS: layer-wise adaptive rate scaling (https://arxiv.org/abs/1708.03888), as in MoCo v3.

    For a tensor w of two or more dimensions, g <- g + decay * w, then g <- g * trust * |w| / |g| if both norms are positive.
    For all tensors, v <- momentum * v + g and w <- w - lr * v. Parameter groups hold the decay as `lars_weight_decay`.
    """

    trust_coefficient = 0.001

    def scaled(self, weight: paddle.Tensor, gradient: paddle.Tensor, group: dict) -> paddle.Tensor:
        """See `FusedMomentum`."""
        if weight.ndim < 2:
            return gradient
        step = gradient + group['lars_weight_decay'] * weight
        return step * self._trust(*(paddle.sqrt(paddle.square(tensor).sum()) for tensor in (weight, step)))

    def all_scaled(
        self, layout: Layout, weights: paddle.Tensor, gradients: paddle.Tensor, group: dict
    ) -> paddle.Tensor:
        """See `FusedMomentum`."""
        scales = constant(_are_scaled, tuple(len(shape) for shape in layout.shapes))
        steps = gradients + layout.spread(scales * group['lars_weight_decay']) * weights
        trust = paddle.where(
            scales > 0, self._trust(layout.norms(weights), layout.norms(steps)), paddle.ones_like(scales)
        )
        return steps * layout.spread(trust)

    def _trust(self, sizes: paddle.Tensor, lengths: paddle.Tensor) -> paddle.Tensor:
        """Return the factors of gradients with norms `lengths`, of weights with norms `sizes`."""
        both = paddle.logical_and(sizes > 0, lengths > 0)
        return paddle.where(both, self.trust_coefficient * sizes / lengths, paddle.ones_like(sizes))


def _are_scaled(dimensions: tuple[int, ...]) -> np.ndarray:
    return (np.array(dimensions) >= 2).astype('float32')


@OPTIMIZERS.register('LARS')
def _lars(groups: list[dict], options) -> paddle.optimizer.Optimizer:
    for group in groups:
        group['lars_weight_decay'], group['weight_decay'] = group['weight_decay'], None
    return LARS(learning_rate=0.0, parameters=groups, momentum=options.MOMENTUM)


def build_optimizer(
    config, model: paddle.nn.Layer, parameters: Mapping[str, paddle.Tensor] | None = None
) -> paddle.optimizer.Optimizer:
    """Build the optimizer that TRAIN.OPTIMIZER names, over `parameter_groups`.

    Args:
        parameters: structured name -> float32 parameter (`engine.precision.MasterWeights`); None: those of the model.
    """
    groups = parameter_groups(model, config.TRAIN.WEIGHT_DECAY, config.TRAIN.LAYER_DECAY, parameters)
    return OPTIMIZERS[config.TRAIN.OPTIMIZER.NAME](groups, config.TRAIN.OPTIMIZER)


@paddle.no_grad()
def clip_gradients(
    parameters: Iterable[paddle.Tensor], max_norm: float | None, loss_scale: paddle.Tensor | None = None
) -> paddle.Tensor:
    """Clip the gradients in place to a global L2 norm of `max_norm`; None or 0: no clipping (PaddleViT).

    Args:
        loss_scale: 0-D factor that the gradients contain; None: 1.

    Returns:
        The norm before clipping, a 0-D tensor, with the factor. Does not wait for the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    clips = bool(max_norm) and math.isfinite(max_norm)
    if clips and loss_scale is not None:
        max_norm = max_norm * loss_scale
    if device.on_gpu():  # a few operations instead of two per tensor; the last bits differ
        norm = paddle.sqrt(squared_norm(paddle.concat([gradient.flatten() for gradient in gradients]))).squeeze(0)
        if clips:
            divide_all(gradients, paddle.clip((norm + 1e-6) / max_norm, min=1.0))
        return norm
    norm = paddle.sqrt(paddle.add_n([squared_norm(gradient) for gradient in gradients])).squeeze(0)
    factor = paddle.clip(max_norm / (norm + 1e-6), max=1.0).item() if clips else 1.0  # on the CPU nothing waits
    if factor != 1.0:
        for gradient in gradients:
            gradient.scale_(factor)  # the bits of multiply_ by a tensor, in a fifth of the time
    return norm
