# SPDX-License-Identifier: Apache-2.0
"""Device and process group. No other module depends on whether a run uses GPUs or CPUs, one rank or many."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import paddle
import paddle.distributed as dist

from engine.heartbeat import Heartbeat
from engine.network_watch import watched_over_network
from utils.environment import launched
from utils.errors import UserError
from utils.processes import die_with_parent, forking
from utils.reports import LOST, send_report
from utils.signals import SIGNALS, handle_signals

JOIN_NOTICE = 10.0  # seconds of waiting for other ranks until a note is printed
BUCKET = 2**25  # values of one all-reduce of gradients: 128 MiB in float32


@dataclass(frozen=True)
class Context:
    """Rank, world size and device of this process, and the counter of its progress that the launcher watches."""

    rank: int
    world_size: int
    on_gpu: bool
    heartbeat: Heartbeat | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mark(self) -> None:
        """Count one unit of progress; a rank that stops counting hangs."""
        if self.heartbeat is not None:
            self.heartbeat.mark(self.rank)

    def sum(self, values: paddle.Tensor) -> paddle.Tensor:
        """All-reduce a tensor in place with a sum over the ranks. Does not wait for the device."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def average(self, values: list[paddle.Tensor]) -> None:
        """Average tensors of one type over the ranks, in place, in all-reduces of up to `BUCKET` values."""
        if self.world_size == 1:
            return
        for bucket in _buckets(values):
            joined = self.sum(paddle.concat([value.flatten() for value in bucket])) / self.world_size
            for value, part in zip(bucket, joined.split([value.size for value in bucket])):
                paddle.assign(part.reshape(value.shape), value)

    def broadcast_text(self, text: str) -> str:
        """Return the text of rank 0 on every rank."""
        if self.world_size == 1:
            return text
        values = [text]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, text: str) -> list[str]:
        """The texts of all processes by rank, on every process."""
        if self.world_size == 1:
            return [text]
        texts: list[str] = []
        dist.all_gather_object(texts, text)
        return texts

    def barrier(self) -> None:
        """Wait until every rank calls this."""
        if self.world_size > 1:
            dist.barrier()

    def parallel(self, model: paddle.nn.Layer, find_unused_parameters: bool = False) -> paddle.nn.Layer:
        """Wrap a model in DataParallel: broadcast the weights of rank 0 and average the gradients over the ranks."""
        if self.world_size == 1:
            return model
        return paddle.DataParallel(model, find_unused_parameters=find_unused_parameters)

    def synchronize(self) -> None:
        """Wait until the device has finished its queue, to measure time."""
        if self.on_gpu:
            paddle.device.synchronize()


def _buckets(values: list[paddle.Tensor]) -> Iterator[list[paddle.Tensor]]:
    """Split a list into consecutive lists of up to `BUCKET` values, at least one tensor each."""
    bucket, size = [], 0
    for value in values:
        if bucket and size + value.size > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(value)
        size += value.size
    if bucket:
        yield bucket


def start(limit: float = 60.0) -> Context:
    """Choose the device and join the process group: NCCL on GPUs, gloo on CPUs.

    Rank and world size come from the launcher's environment variables; without them, this is a single process.

    Args:
        limit: seconds to wait for the other ranks; 0: no limit.
    """
    rank, world_size = launched() or (0, 1)
    on_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if on_gpu:
        paddle.set_device(f'gpu:{os.environ.get("FLAGS_selected_gpus", "0").split(",")[0]}')
    else:
        os.environ['PADDLE_DISTRI_BACKEND'] = 'gloo'
        paddle.set_device('cpu')
    heartbeat = Heartbeat.of_launcher()
    if world_size > 1:
        heartbeat = heartbeat or watched_over_network(rank, world_size)
        _join(rank, world_size, limit)
    return Context(rank, world_size, on_gpu, heartbeat)


def _join(rank: int, world_size: int, limit: float) -> None:
    output = io.StringIO()  # Paddle's notes on environment variables
    try:
        with _join_timeout(f'process {rank} of {world_size}', limit), contextlib.redirect_stderr(output):
            dist.init_parallel_env()
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f'process {rank} of {world_size} could not join the group: {reason}') from error


@contextlib.contextmanager
def _join_timeout(name: str, limit: float) -> Iterator[None]:
    """Print a note after `JOIN_NOTICE` seconds of the block, and end the process after `limit` seconds.

    Paddle waits without limit and holds the interpreter, so no Python thread or signal handler runs. Therefore a child
    process measures the time, and signals have their default effect.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handle_signals(signal.SIG_DFL)
    watched = os.getpid()
    with forking():
        watcher = os.fork()
    if watcher == 0:
        _watch(watched, name, limit)
    try:
        yield
    finally:
        os.kill(watcher, signal.SIGKILL)
        os.waitpid(watcher, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _watch(process: int, name: str, limit: float) -> None:
    die_with_parent()
    time.sleep(min(JOIN_NOTICE, limit or JOIN_NOTICE))
    master = os.environ.get('PADDLE_MASTER') or os.environ['PADDLE_TRAINER_ENDPOINTS'].partition(',')[0]
    hint = 'if no launcher started it, unset PADDLE_TRAINER_ID'
    bound = f'at most {limit:g} s (PEER_TIMEOUT)' if limit else 'without limit'
    os.write(2, f'note: {name} waits for the other ranks at {master}, {bound}; {hint}.\n'.encode())
    time.sleep(max(0.0, limit - JOIN_NOTICE) if limit else float(2**31))
    text = f'error: {name} waited {limit:g} s (PEER_TIMEOUT) for the other ranks at {master}; {hint}.'
    if not send_report(LOST, 1, text):
        os.write(2, f'{text}\n'.encode())
    os.kill(process, signal.SIGTERM)
    os._exit(0)
