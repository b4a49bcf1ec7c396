# SPDX-License-Identifier: Apache-2.0
"""The device and the process group: the one place that knows whether a run is on GPUs or CPUs, on one process or many."""

from __future__ import annotations

import os
from dataclasses import dataclass

import paddle
import paddle.distributed as dist

from utils.errors import UserError


@dataclass(frozen=True)
class Context:
    """Where this process runs."""

    rank: int
    world_size: int
    on_gpu: bool

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: paddle.Tensor) -> paddle.Tensor:
        """Adds a tensor over all processes, in place; every process gets the sum. Does not wait for the device."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def broadcast_text(self, text: str) -> str:
        """The main process's text, on every process."""
        if self.world_size == 1:
            return text
        values = [text]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def parallel(self, model: paddle.nn.Layer, find_unused_parameters: bool = False) -> paddle.nn.Layer:
        """Wraps a model so that its gradients are averaged over the processes; the main process's weights win."""
        if self.world_size == 1:
            return model
        return paddle.DataParallel(model, find_unused_parameters=find_unused_parameters)

    def synchronize(self) -> None:
        """Waits for the device's queue; for measuring time."""
        if self.on_gpu:
            paddle.device.synchronize()


def start() -> Context:
    """Chooses the device and joins the process group: NCCL on GPUs, gloo on CPUs.

    Rank and size come from the variables that a launcher sets; without them this is a single process.
    """
    rank = int(os.environ.get('PADDLE_TRAINER_ID', '0'))
    world_size = int(os.environ.get('PADDLE_TRAINERS_NUM', '1'))
    on_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if on_gpu:
        paddle.set_device(f'gpu:{os.environ.get("FLAGS_selected_gpus", "0").split(",")[0]}')
    else:
        os.environ.setdefault('PADDLE_DISTRI_BACKEND', 'gloo')
        paddle.set_device('cpu')
    if world_size > 1:
        try:
            dist.init_parallel_env()
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f'process {rank} of {world_size} could not join the group: {reason}') from error
    return Context(rank, world_size, on_gpu)
