# SPDX-License-Identifier: Apache-2.0
"""Settings of a model that depend on the epoch. The loop sets them before each step."""

from __future__ import annotations

from typing import Protocol

from paddle import nn

from utils.errors import UserError
from utils.schedules import attn_lambda, encoder_momentum, keep_rate


class ModelSchedule(Protocol):
    """One setting of a model; `t` is the number of epochs since the start of training, with fractions."""

    name: str  # in the log

    def value(self, t: float) -> float:
        """The setting at `t`."""

    def is_final(self, t: float) -> bool:
        """Whether the setting keeps its value from `t` on."""

    def set(self, model: nn.Layer, value: float) -> None:
        """Apply the setting to the model."""


class KeepRateSchedule:
    """EViT's keep rate (https://arxiv.org/abs/2202.07800), by the keys of MODEL.EVIT."""

    name = 'keep_rate'

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
    """The weight λ of decaying attention (https://arxiv.org/abs/2404.05657), by the keys of MODEL.LAMBDA.

    Raises:
        UserError: λ is above 0 in the last epoch, so that the attention could not be removed after training.
    """

    name = 'attn_lambda'

    def __init__(self, removal, num_epochs: int):
        length = removal.DECAY_EPOCHS
        if length is None:
            length = (num_epochs - removal.START_EPOCH) * 299 // 400
        self.schedule = {'start': removal.START_EPOCH, 'length': length}
        last = self.value(num_epochs - 1)
        if last > 0:
            raise UserError(
                f'the decaying attention still has the weight {last:.4g} in the last of {num_epochs} epochs; it must be 0 '
                'there: raise TRAIN.NUM_EPOCHS, or lower MODEL.LAMBDA.START_EPOCH or DECAY_EPOCHS.'
            )

    def value(self, t: float) -> float:
        return attn_lambda(t, **self.schedule)

    def is_final(self, t: float) -> bool:
        return self.value(t) == 0

    def set(self, model: nn.Layer, value: float) -> None:
        _require(model, 'set_attn_lambda', 'MODEL.LAMBDA.PRUNE_LAYERS')
        model.set_attn_lambda(value)


class MomentumSchedule:
    """MoCo v3's momentum of the momentum encoder, which takes one step in the training pass after each `set`."""

    name = 'momentum'

    def __init__(self, base: float, num_epochs: int):
        self.schedule = {'base': base, 'total': num_epochs}

    def value(self, t: float) -> float:
        return encoder_momentum(t, **self.schedule)

    def is_final(self, t: float) -> bool:
        """True: evaluations use the base encoder."""
        return True

    def set(self, model: nn.Layer, value: float) -> None:
        model.set_momentum(value)


def _require(model: nn.Layer, method: str, key: str) -> None:
    if not hasattr(model, method):
        raise UserError(
            f'{key} is set, but {type(model).__name__} has no such setting; it is one of Vision Transformers.'
        )


def build_model_schedules(config) -> list[ModelSchedule]:
    """The schedules that the configuration asks for."""
    model, schedules = config.MODEL, []
    if model.EVIT.KEEP_RATE < 1:
        schedules.append(KeepRateSchedule(model.EVIT))
    if model.LAMBDA.PRUNE_LAYERS and not model.LAMBDA.REMOVED:
        schedules.append(AttentionDecaySchedule(model.LAMBDA, config.TRAIN.NUM_EPOCHS))
    return schedules
