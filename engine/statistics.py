# SPDX-License-Identifier: Apache-2.0
"""Sums of each optimizer step: one small vector, one all-reduce.

Order of the vector: the loss, the task's parts of the loss and its counts, then `CONTROL`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import paddle

from datasets.batch import Batch
from tasks import Losses, Task
from utils.device import upload

CONTROL = ('images', 'skipped', 'nonfinite', 'stop')

# Checkpoints of version 0.1.0 hold the totals of an epoch as a list in this order.
_LIST_ORDER = ('loss', 'acc1', *CONTROL)


def names_of(task: Task) -> tuple[str, ...]:
    """Return the names of the sums, in the order of the vector."""
    return ('loss', *task.parts, *task.counts, *CONTROL)


class StepSums:
    """Sums over the micro-batches of one optimizer step on this rank; they stay on the device."""

    def __init__(self, task: Task):
        self.names = names_of(task)
        self._sums = {name: paddle.zeros([]) for name in self.names[: -len(CONTROL)]}
        self._images = self._skipped = 0

    def add(self, losses: Losses, batch: Batch) -> None:
        """Add a micro-batch."""
        for name, mean in {'loss': losses.total, **losses.parts}.items():
            self._sums[name] += mean.detach() * len(batch)
        for name, count in losses.counts.items():
            self._sums[name] += count
        self._images += len(batch)
        self._skipped += batch.skipped

    @property
    def loss(self) -> paddle.Tensor:
        """Sum of the loss over the images, 0-D."""
        return self._sums['loss']

    def vector(self, finite: paddle.Tensor, stopping: bool) -> paddle.Tensor:
        """Return the sums as a float32 vector [len(names)]; `finite` is a 0-D boolean."""
        images, skipped, stop = upload(np.array([self._images, self._skipped, stopping], 'float32')).unbind()
        return paddle.stack([*self._sums.values(), images, skipped, 1.0 - finite.astype('float32'), stop])


def means(task: Task, sums: Mapping[str, float]) -> dict[str, float]:
    """Return loss, parts of the loss and counts per image."""
    images = max(sums['images'], 1)
    return {name: sums[name] / images for name in names_of(task)[: -len(CONTROL)]}


def read_totals(task: Task, stored: Mapping[str, float] | list[float]) -> dict[str, float]:
    """Read the totals of an unfinished epoch from a checkpoint of any version; empty before its first step."""
    if not isinstance(stored, Mapping):
        stored = dict(zip(_LIST_ORDER, stored))
    if not any(stored.values()):
        return {}
    return {name: float(stored.get(name, 0.0)) for name in names_of(task)}
