# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedule of a run: a function of utils/schedules.py with the values of TRAIN."""

from __future__ import annotations

from collections.abc import Callable

from utils.errors import UserError
from utils.schedules import SCHEDULES


def lr_schedule(config, global_batch: int, steps_per_epoch: int = 1) -> Callable[[int, float], float]:
    """Return the learning-rate schedule of a run.

    Args:
        config: the configuration; its section TRAIN is read.
        global_batch: images per optimizer step over all ranks and micro-batches.
        steps_per_epoch: converts TRAIN.NUM_ITERS, WARMUP_ITERS and MILESTONES, if in steps, to fractional epochs.

    Returns:
        `lr(epoch, progress)` with `epoch` from 1 and `progress` in [0, 1), the fraction of the epoch's steps already taken.
        With UPDATE step, t = epoch - 1 + progress. With UPDATE epoch, t = epoch - LAG. LAG 0 is PaddleViT's rule. LAG 2 is
        DeiT's: its loop sets the rate after each epoch from the index of that epoch, counted from 0.
    """
    train = config.TRAIN
    function = SCHEDULES[train.LR_SCHEDULER.NAME]
    scale = lr_scale(config, global_batch)
    ends = scale if train.LR_SCHEDULER.SCALE_ENDS else 1.0
    steps = 1 if train.NUM_ITERS is None else steps_per_epoch
    if train.LR_SCHEDULER.NAME == 'multistep' and not train.LR_SCHEDULER.MILESTONES:
        raise UserError('TRAIN.LR_SCHEDULER.NAME multistep needs TRAIN.LR_SCHEDULER.MILESTONES: say when it decays.')
    values = {
        'base': train.BASE_LR * scale,
        'start': train.WARMUP_START_LR * ends,
        'end': train.END_LR * ends,
        'warmup': train.WARMUP_EPOCHS if train.WARMUP_ITERS is None else train.WARMUP_ITERS / steps_per_epoch,
        'total': train.NUM_EPOCHS if train.NUM_ITERS is None else train.NUM_ITERS / steps_per_epoch,
        'decay_epochs': train.LR_SCHEDULER.DECAY_EPOCHS,
        'milestones': [milestone / steps for milestone in train.LR_SCHEDULER.MILESTONES],
        'decay_rate': train.LR_SCHEDULER.DECAY_RATE,
        'power': train.LR_SCHEDULER.POWER,
    }
    if train.LR_SCHEDULER.UPDATE == 'step':
        return lambda epoch, progress: function(epoch - 1 + progress, **values)
    return lambda epoch, progress: function(max(epoch - train.LR_SCHEDULER.LAG, 0), **values)


def lr_scale(config, global_batch: int) -> float:
    """Return the factor of the linear scaling rule: images per step / LINEAR_SCALED_LR, or 1 if that is None."""
    reference = config.TRAIN.LINEAR_SCALED_LR
    return 1.0 if reference is None else global_batch / reference
