# SPDX-License-Identifier: Apache-2.0
"""What changes in a model by the run's clock: pure functions of the epoch, put into the model before each step."""

from __future__ import annotations

from typing import Protocol

from paddle import nn

from engine.schedules import attn_lambda, encoder_momentum, keep_rate
from utils.errors import UserError


class Clock(Protocol):
    """One number of a model that follows time; `t` counts epochs since the start of training, with fractions."""

    name: str  # in the log

    def value(self, t: float) -> float:
        """The number at `t`."""

    def is_final(self, t: float) -> bool:
        """Whether it stays what it is at `t`."""

    def set(self, model: nn.Layer, value: float) -> None:
        """Puts the number into the model."""


class KeepRateClock:
    """EViT's keep rate, of the keys of MODEL.EVIT."""

    name = 'keep_rate'

    def __init__(self, evit):
        self.final = evit.KEEP_RATE
        self.schedule = {'base': evit.KEEP_RATE, 'start': evit.SHRINK_START_EPOCH, 'length': evit.SHRINK_EPOCHS}

    def value(self, t: float) -> float:
        return keep_rate(t, **self.schedule)

    def is_final(self, t: float) -> bool:
        return self.value(t) == self.final

    def set(self, model: nn.Layer, value: float) -> None:
        _needs(model, 'set_keep_rate', 'MODEL.EVIT.KEEP_RATE')
        model.set_keep_rate(value)


class AttentionClock:
    """The weight λ of the fading attention, of the keys of MODEL.LAMBDA.

    Raises:
        UserError: a run whose last epoch still has attention to lose would leave a model that cannot do without.
    """

    name = 'attn_lambda'

    def __init__(self, fading, num_epochs: int):
        length = fading.DECAY_EPOCHS
        if length is None:
            length = (num_epochs - fading.START_EPOCH) * 299 // 400
        self.schedule = {'start': fading.START_EPOCH, 'length': length}
        last = self.value(num_epochs - 1)
        if last > 0:
            raise UserError(
                f'the fading attention still has the weight {last:.4g} in the last of {num_epochs} epochs; it must be 0 '
                'there: raise TRAIN.NUM_EPOCHS, or lower MODEL.LAMBDA.START_EPOCH or DECAY_EPOCHS.'
            )

    def value(self, t: float) -> float:
        return attn_lambda(t, **self.schedule)

    def is_final(self, t: float) -> bool:
        return self.value(t) == 0

    def set(self, model: nn.Layer, value: float) -> None:
        _needs(model, 'set_attn_lambda', 'MODEL.LAMBDA.PRUNE_LAYERS')
        model.set_attn_lambda(value)


class MomentumClock:
    """MoCo-v3's momentum. Each setting lets the momentum encoder take one step, in the next training pass."""

    name = 'momentum'

    def __init__(self, base: float, num_epochs: int):
        self.schedule = {'base': base, 'total': num_epochs}

    def value(self, t: float) -> float:
        return encoder_momentum(t, **self.schedule)

    def is_final(self, t: float) -> bool:
        """What is evaluated does not depend on it."""
        return True

    def set(self, model: nn.Layer, value: float) -> None:
        model.set_momentum(value)


def _needs(model: nn.Layer, method: str, key: str) -> None:
    if not hasattr(model, method):
        raise UserError(
            f'{key} is set, but {type(model).__name__} has no such setting; it is one of Vision Transformers.'
        )


def build_clocks(config) -> list[Clock]:
    """The clocks that the configuration asks for."""
    model, clocks = config.MODEL, []
    if model.EVIT.KEEP_RATE < 1:
        clocks.append(KeepRateClock(model.EVIT))
    if model.LAMBDA.PRUNE_LAYERS and not model.LAMBDA.REMOVED:
        clocks.append(AttentionClock(model.LAMBDA, config.TRAIN.NUM_EPOCHS))
    return clocks
