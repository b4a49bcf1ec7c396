# SPDX-License-Identifier: Apache-2.0
"""Schedules: pure functions of the fractional epoch. Nothing here holds state, so a resumed run cannot disagree.

`t` counts epochs, with fractions where a schedule follows every step; T is the number of epochs, w of warm-up.
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
    """From `base` at progress 0 to `end` at 1."""
    return end + (base - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


# Each takes `t` and, of the values that `lr_schedule` collects, those it depends on.


@SCHEDULES.register('warmupcosine')
def warmup_cosine(t: float, *, base: float, start: float, end: float, warmup: float, total: float, **_) -> float:
    """Linear from `start` to `base` in `warmup` epochs, then a half cosine over the rest (PaddleViT, MAE)."""
    if t < warmup:
        return _warmup(t, base, start, warmup)
    return _half_cosine(base, end, (t - warmup) / (total - warmup) if total > warmup else 1.0)


@SCHEDULES.register('timmcosine')
def timm_cosine(t: float, *, base: float, start: float, end: float, warmup: float, total: float, **_) -> float:
    """As above, but the cosine runs over all `total` epochs, so that it is entered at t = warmup (timm, DeiT, Swin)."""
    if t < warmup:
        return _warmup(t, base, start, warmup)
    return _half_cosine(base, end, t / total)


@SCHEDULES.register('linear')
def linear(t: float, *, base: float, start: float, end: float, warmup: float, total: float, **_) -> float:
    """After the warm-up a straight line from `base` to `end` (Swin and MS-MLP, whose end is always base / 100)."""
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
    """After the warm-up `base`, times `decay_rate` for each `decay_epochs` since the start of training, at least `end`."""
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
    """From `base` to `end` as (1 - t / total)^power; the warm-up multiplies it by a line from start / base to 1 (mmsegmentation)."""
    value = end + (base - end) * max(1 - t / total, 0.0) ** power
    return value * (1 - (1 - t / warmup) * (1 - start / base)) if t < warmup and base else value


@SCHEDULES.register('constant')
def constant(t: float, *, base: float, start: float, warmup: float, **_) -> float:
    """`base` after the warm-up."""
    return _warmup(t, base, start, warmup) if t < warmup else base


def keep_rate(t: float, *, base: float, start: float, length: float) -> float:
    """EViT's keep rate (https://arxiv.org/abs/2202.07800, appendix; its helpers.py): 1, a half cosine, then `base`.

    Args:
        t: epochs since the start of training, with the fraction of the running one.
        base: the final rate.
        start: epochs with all tokens.
        length: epochs of the way down; 0: a jump.
    """
    if t < start:
        return 1.0
    return base if t >= start + length else _half_cosine(1.0, base, (t - start) / length)


def encoder_momentum(t: float, *, base: float, total: float) -> float:
    """MoCo-v3's momentum (https://arxiv.org/abs/2104.02057, section 4): a half cosine from `base` at t = 0 to 1 at `total`."""
    return _half_cosine(base, 1.0, t / total)


def attn_lambda(t: float, *, start: int, length: int) -> float:
    """Weight of fading attention (https://arxiv.org/abs/2404.05657): 1, a straight line, then 0.

    It is constant inside an epoch.

    Args:
        t: epochs since the start of training; fractions do not count.
        start: the last epoch, from 0, of weight 1.
        length: epochs after it until the weight is 0.
    """
    epoch = math.floor(t)
    return 1.0 if epoch <= start else max(0.0, 1 - (epoch - start) / max(length, 1))
