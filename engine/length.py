# SPDX-License-Identifier: Apache-2.0
"""How long a run is and where it validates, counted in optimizer steps, by epochs or by iterations."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RunLength:
    """Length of a run.

    Attributes:
        steps_per_epoch: optimizer steps of one epoch.
        num_steps: optimizer steps of the run; the last epoch may be incomplete.
        validate_every: steps between validations; the end of the run is validated in any case.
    """

    steps_per_epoch: int
    num_steps: int
    validate_every: int

    @classmethod
    def of(cls, config, steps_per_epoch: int) -> RunLength:
        """By TRAIN.NUM_ITERS and VALIDATE_ITERS, where they are set, else by TRAIN.NUM_EPOCHS and VALIDATE_FREQ."""
        return cls(
            steps_per_epoch,
            config.TRAIN.NUM_ITERS or config.TRAIN.NUM_EPOCHS * steps_per_epoch,
            config.VALIDATE_ITERS or config.VALIDATE_FREQ * steps_per_epoch,
        )

    @property
    def num_epochs(self) -> int:
        """Epochs of the run, an incomplete last one included."""
        return math.ceil(self.num_steps / self.steps_per_epoch)

    def next_stop(self, step: int) -> int:
        """The next step after `step` at which an epoch or the run ends, or a validation is due."""
        ends = ((step // every + 1) * every for every in (self.steps_per_epoch, self.validate_every))
        return min(*ends, self.num_steps)

    def validation_due(self, step: int) -> bool:
        """Whether the weights after `step` steps are validated."""
        return step % self.validate_every == 0 or step >= self.num_steps
