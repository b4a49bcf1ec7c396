# SPDX-License-Identifier: Apache-2.0
"""Length of a run and its validation interval in optimizer steps, from epochs or iterations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.errors import UserError


@dataclass(frozen=True)
class RunLength:
    """Length of a run.

    Attributes:
        steps_per_epoch: optimizer steps of one epoch.
        num_steps: optimizer steps of the run; the last epoch may be incomplete.
        validate_every: steps between validations; the last step is always validated.
    """

    steps_per_epoch: int
    num_steps: int
    validate_every: int

    @classmethod
    def from_config(cls, config, steps_per_epoch: int) -> RunLength:
        """Read TRAIN.NUM_ITERS and VALIDATE_ITERS if they are set, else TRAIN.NUM_EPOCHS and VALIDATE_FREQ."""
        return cls(
            steps_per_epoch,
            config.TRAIN.NUM_ITERS or config.TRAIN.NUM_EPOCHS * steps_per_epoch,
            config.VALIDATE_ITERS or config.VALIDATE_FREQ * steps_per_epoch,
        )

    @property
    def num_epochs(self) -> int:
        """Number of epochs, including an incomplete last one."""
        return math.ceil(self.num_steps / self.steps_per_epoch)

    def next_stop(self, step: int) -> int:
        """Return the next step after `step` at which an epoch or the run ends, or a validation is due."""
        ends = ((step // every + 1) * every for every in (self.steps_per_epoch, self.validate_every))
        return min(*ends, self.num_steps)

    def validation_due(self, step: int) -> bool:
        """Return True if a validation follows step `step`."""
        return step % self.validate_every == 0 or step >= self.num_steps


def count_steps(num_batches: int, train) -> int:
    """Return the optimizer steps of an epoch. Raises UserError if there are none (TRAIN.ACCUM_MODE ms_mlp)."""
    if train.ACCUM_MODE != 'ms_mlp':
        return math.ceil(num_batches / train.ACCUM_ITER)
    if num_batches < train.ACCUM_ITER:
        raise UserError(
            f'TRAIN.ACCUM_ITER is {train.ACCUM_ITER}, but an epoch has {num_batches} micro-batches, and TRAIN.ACCUM_MODE '
            'ms_mlp drops those that fill no step: lower TRAIN.ACCUM_ITER.'
        )
    return num_batches // train.ACCUM_ITER
