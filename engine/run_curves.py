# SPDX-License-Identifier: Apache-2.0
"""Scheduled values over a run, from the functions that the training loop calls before each step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.learning_rate import lr_schedule
from engine.length import RunLength
from tasks import Task

POINTS = 2000  # of a curve, at least one per epoch


@dataclass(frozen=True)
class Curve:
    """A scheduled value over a run.

    Attributes:
        name: name in the log and in VisualDL.
        title: name in the picture.
        values: [n].
    """

    name: str
    title: str
    values: np.ndarray


def run_curves(config, task: Task, global_batch: int, steps_per_epoch: int | None) -> tuple[np.ndarray, list[Curve]]:
    """Return the epochs, fractional, [n], and the curves of a run: the learning rate, the task's schedules, the EMA decay.

    Args:
        global_batch: images per optimizer step over all ranks.
        steps_per_epoch: optimizer steps per epoch; None: unknown, so that only schedules in epochs are right, and each
            epoch gets as many points as fit.
    """
    count = config.TRAIN.NUM_EPOCHS if steps_per_epoch is None else None
    steps = max(POINTS // count, 1) if steps_per_epoch is None else steps_per_epoch
    length = RunLength.from_config(config, steps)
    taken = np.arange(0, length.num_steps, max(length.num_steps // POINTS, 1))
    taken = np.union1d(taken, [length.num_steps - 1])
    lr = lr_schedule(config, global_batch, steps)
    positions = [divmod(int(step), steps) for step in taken]  # finished epochs, steps of the next one
    epochs = [epoch + step / steps for epoch, step in positions]
    curves = [Curve('lr', 'learning rate', np.array([lr(epoch + 1, step / steps) for epoch, step in positions]))]
    for schedule in task.schedules:
        title = getattr(schedule, 'title', schedule.name)
        curves.append(Curve(schedule.name, title, np.array([schedule.value(t) for t in epochs])))
    if config.TRAIN.MODEL_EMA:
        curves.append(Curve('ema_decay', 'decay of the EMA', np.full(len(taken), config.TRAIN.MODEL_EMA_DECAY)))
    return np.array(epochs), curves
