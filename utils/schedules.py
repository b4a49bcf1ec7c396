# SPDX-License-Identifier: Apache-2.0
"""Schedules as pure functions of the fractional epoch. They hold no state, so a resumed run gets the same values.

`t` is the number of epochs since the start of training, with fractions where a schedule is updated every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from utils.registry import Registry

_EXACT = 1e-9  # epochs; steps divided by steps per epoch are not exact

SCHEDULES = Registry('learning-rate schedule (TRAIN.LR_SCHEDULER.NAME)')


def _warmup(t: float, base: float, start: float, warmup: float) -> float:
    return start + (base - start) * t / warmup


def _half_cosine(base: float, end: float, progress: float) -> float:
    """Return a half cosine from `base` at progress 0 to `end` at progress 1."""
    return end + (base - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


# Each schedule takes `t` and some of the values that `engine.learning_rate.lr_schedule` collects.


@SCHEDULES.register('warmupcosine')
def warmup_cosine(t: float, *, base: float, start: float, end: float, warmup: float, total: float, **_) -> float:
    """Linear warm-up from `start` to `base`, then a half cosine over the remaining epochs (PaddleViT, MAE)."""
    if t < warmup:
        return _warmup(t, base, start, warmup)
    return _half_cosine(base, end, (t - warmup) / (total - warmup) if total > warmup else 1.0)


@SCHEDULES.register('timmcosine')
def timm_cosine(t: float, *, base: float, start: float, end: float, warmup: float, total: float, **_) -> float:
    """Linear warm-up; the half cosine spans all `total` epochs and is entered at t = `warmup` (timm, DeiT, Swin)."""
    if t < warmup:
        return _warmup(t, base, start, warmup)
    return _half_cosine(base, end, t / total)


@SCHEDULES.register('linear')
def linear(t: float, *, base: float, start: float, end: float, warmup: float, total: float, **_) -> float:
    """Linear warm-up, then a line from `base` to `end` (Swin and MS-MLP, where `end` is `base` / 100)."""
    if t < warmup:
        return _warmup(t, base, start, warmup)
    return base + (end - base) * ((t - warmup) / (total - warmup) if total > warmup else 1.0)


@SCHEDULES.register('step')
def step(
    t: float,
    *,
    base: float,
    start: float,
    end: float,
    warmup: float,
    decay_epochs: float,
    decay_rate: float,
    **_,
) -> float:
    """Linear warm-up, then `base` times `decay_rate` once per `decay_epochs` since the start, at least `end`."""
    if t < warmup:
        return _warmup(t, base, start, warmup)
    return max(base * decay_rate ** (t // decay_epochs), end)


@SCHEDULES.register('multistep')
def multistep(
    t: float,
    *,
    base: float,
    start: float,
    end: float,
    warmup: float,
    milestones: Sequence[float],
    decay_rate: float,
    **_,
) -> float:
    """After the warm-up `base`, times `decay_rate` from each of the milestones on (detectron2), at least `end`."""
    if t < warmup:
        return _warmup(t, base, start, warmup)
    passed = sum(t >= milestone - _EXACT for milestone in milestones)
    return max(base * decay_rate**passed, end)


@SCHEDULES.register('poly')
def poly(
    t: float, *, base: float, start: float, end: float, warmup: float, total: float, power: float = 1.0, **_
) -> float:
    """Polynomial decay (1 - t / total)^power from `base` to `end`, as in mmsegmentation.

    The warm-up multiplies it by a line from `start` / `base` to 1.
    """
    value = end + (base - end) * max(1 - t / total, 0.0) ** power
    return value * (1 - (1 - t / warmup) * (1 - start / base)) if t < warmup and base else value


@SCHEDULES.register('constant')
def constant(t: float, *, base: float, start: float, warmup: float, **_) -> float:
    """Linear warm-up, then `base`."""
    return _warmup(t, base, start, warmup) if t < warmup else base


def keep_rate(t: float, *, base: float, start: float, length: float) -> float:
    """EViT's keep rate (https://arxiv.org/abs/2202.07800, appendix; helpers.py): 1, then a half cosine to `base`.

    Args:
        t: epochs since the start of training, with fractions.
        base: final keep rate.
        start: number of epochs with all tokens.
        length: number of epochs of the decay; 0: a jump.
    """
    if t < start:
        return 1.0
    return base if t >= start + length else _half_cosine(1.0, base, (t - start) / length)


def encoder_momentum(t: float, *, base: float, total: float) -> float:
    """MoCo v3 momentum (https://arxiv.org/abs/2104.02057, section 4): a half cosine from `base` to 1."""
    return _half_cosine(base, 1.0, t / total)


def attn_lambda(t: float, *, start: int, length: int) -> float:
    """Weight of the decaying attention (https://arxiv.org/abs/2404.05657): 1, then a linear decay to 0.

    It is constant within an epoch.

    Args:
        t: epochs since the start of training; fractions are ignored.
        start: last epoch, counted from 0, with weight 1.
        length: number of epochs of the decay.
    """
    epoch = math.floor(t)
    return 1.0 if epoch <= start else max(0.0, 1 - (epoch - start) / max(length, 1))
