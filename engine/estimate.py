# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a training run, estimated from its first steps with numbers that the host has already."""

from __future__ import annotations

import paddle

from engine.length import RunLength
from utils.processes import resident_memory
from utils.text import duration


def peak_memory(on_gpu: bool) -> int | None:
    """Return the peak memory of this process in bytes: allocated on the GPU, else resident; None where it is unknown.

    The device is not asked, so the host does not wait for it.
    """
    return paddle.device.cuda.max_memory_allocated() if on_gpu else resident_memory('VmHWM')


def describe_estimate(length: RunLength, step: int, steps_per_second: float, memory: int | None) -> str:
    """Describe what an epoch and the rest of a run take.

    Args:
        length: length of the run.
        step: optimizer steps taken since the start of the schedules.
        steps_per_second: speed of the last steps.
        memory: peak memory in bytes; None: unknown.
    """
    epoch, rest = (steps / max(steps_per_second, 1e-9) for steps in (length.steps_per_epoch, length.num_steps - step))
    text = (
        f'Estimate: {duration(epoch)} per epoch of {length.steps_per_epoch} steps, {duration(rest)} for the remaining '
        f'{length.num_steps - step} steps of the run, without validations'
    )
    return text if memory is None else f'{text}; peak memory {memory / 2**30:.2f} GiB'
