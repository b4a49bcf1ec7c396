# SPDX-License-Identifier: Apache-2.0
"""Schedules of model parameters such as keep rate, λ and momentum. The training loop applies them before each step."""

from __future__ import annotations

from typing import Protocol

from paddle import nn

from utils.errors import UserError
from utils.schedules import attn_lambda, encoder_momentum, keep_rate


class ModelSchedule(Protocol):
    """Schedule of one model parameter; `t` is the fractional number of epochs since the start of training."""

    name: str  # name in the log
    title: str  # name in pictures

    def value(self, t: float) -> float:
        """Return the value at `t`."""

    def is_final(self, t: float) -> bool:
        """Return whether the value is constant from `t` on."""

    def set(self, model: nn.Layer, value: float) -> None:
        """Set the value in the model."""


class KeepRateSchedule:
    """Keep rate of EViT (https://arxiv.org/abs/2202.07800), from MODEL.EVIT."""

    name, title = 'keep_rate', 'keep rate'

    def __init__(self, evit):
        self.final = evit.KEEP_RATE
        self.schedule = {'base': evit.KEEP_RATE, 'start': evit.SHRINK_START_EPOCH, 'length': evit.SHRINK_EPOCHS}

    def value(self, t: float) -> float:
        return keep_rate(t, **self.schedule)

    def is_final(self, t: float) -> bool:
        return self.value(t) == self.final

    def set(self, model: nn.Layer, value: float) -> None:
        _require(model, 'set_keep_rate', 'MODEL.EVIT.KEEP_RATE')
        model.set_keep_rate(value)


class AttentionDecaySchedule:
    """Attention weight λ (https://arxiv.org/abs/2404.05657), from MODEL.LAMBDA.

    Raises:
        UserError: λ > 0 in the last epoch, so that attention cannot be removed after training.
    """

    name, title = 'attn_lambda', 'attention weight λ'

    def __init__(self, removal, num_epochs: int):
        length = removal.DECAY_EPOCHS
        if length is None:
            length = (num_epochs - removal.START_EPOCH) * 299 // 400
        self.schedule = {'start': removal.START_EPOCH, 'length': length}
        last = self.value(num_epochs - 1)
        if last > 0:
            raise UserError(
                f'the attention weight λ is {last:.4g} in the last of {num_epochs} epochs, but must be 0: increase '
                'TRAIN.NUM_EPOCHS, or decrease MODEL.LAMBDA.START_EPOCH or DECAY_EPOCHS.'
            )

    def value(self, t: float) -> float:
        return attn_lambda(t, **self.schedule)

    def is_final(self, t: float) -> bool:
        return self.value(t) == 0

    def set(self, model: nn.Layer, value: float) -> None:
        _require(model, 'set_attn_lambda', 'MODEL.LAMBDA.PRUNE_LAYERS')
        model.set_attn_lambda(value)


class MomentumSchedule:
    """Momentum of the momentum encoder of MoCo v3, which is updated once in the training pass after each `set`."""

    name, title = 'momentum', 'momentum of the momentum encoder'

    def __init__(self, base: float, num_epochs: int):
        self.schedule = {'base': base, 'total': num_epochs}

    def value(self, t: float) -> float:
        return encoder_momentum(t, **self.schedule)

    def is_final(self, t: float) -> bool:
        """Return True: evaluation uses the base encoder."""
        return True

    def set(self, model: nn.Layer, value: float) -> None:
        model.set_momentum(value)


def _require(model: nn.Layer, method: str, key: str) -> None:
    if not hasattr(model, method):
        raise UserError(
            f'{key} is set, but {type(model).__name__} does not support it: remove {key}, or use a Vision Transformer.'
        )


def build_model_schedules(config) -> list[ModelSchedule]:
    """Build the schedules of a configuration."""
    model, schedules = config.MODEL, []
    if model.EVIT.KEEP_RATE < 1:
        schedules.append(KeepRateSchedule(model.EVIT))
    if model.LAMBDA.PRUNE_LAYERS and not model.LAMBDA.REMOVED:
        schedules.append(AttentionDecaySchedule(model.LAMBDA, config.TRAIN.NUM_EPOCHS))
    return schedules
