# SPDX-License-Identifier: Apache-2.0
"""How fast a model is on this device, and how much memory it takes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import paddle

from engine import distributed
from engine.distributed import Context
from models import build_model
from models.exported import Predictor
from tasks import Task, build_task
from utils.errors import UserError
from utils.processes import die_with_parent

Call = Callable[[], None]  # one pass; may return before the device has finished it


@dataclass(frozen=True)
class Throughput:
    """Medians over the timed rounds."""

    batch_size: int
    images_per_second: float
    latency_ms: float  # of one batch


def measure(config, context: Context, rounds: int = 10, warmup: int = 3) -> Throughput:
    """Times the forward pass of the model that `config` describes, on DATA.BATCH_SIZE random images."""
    batch_size = config.DATA.BATCH_SIZE
    calls = Subject(config.MODEL.NAME, config).calls([batch_size], context)
    median = statistics.median(time_interleaved(calls, context, rounds, warmup)[0])
    return Throughput(batch_size, batch_size / median, median * 1000)


def report(result: Throughput) -> None:
    """Prints a measurement."""
    print(
        f'throughput: {result.images_per_second:.1f} images/s at batch {result.batch_size}, '
        f'{result.latency_ms:.1f} ms a batch (median)'
    )


# ---------------------------------------------------------------------------------------------------- time
def time_interleaved(calls: list[Call], context: Context, rounds: int, warmup: int) -> list[list[float]]:
    """Seconds of each call in each round, after `warmup` rounds that do not count.

    A round runs every call once, so that whatever else the machine does meanwhile slows all of them alike.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for index in range(warmup + rounds):
        for call, taken in zip(calls, seconds):
            context.synchronize()
            started = time.perf_counter()
            call()
            context.synchronize()
            if index >= warmup:
                taken.append(time.perf_counter() - started)
    return seconds


def layer_call(model: paddle.nn.Layer, shape: list[int], autocast: dict | None = None) -> Call:
    """A forward pass of random images, which lie on the device; `autocast`: arguments of `paddle.amp.auto_cast`."""
    model.eval()
    images = paddle.randn(shape)

    def call() -> None:
        with paddle.no_grad(), paddle.amp.auto_cast(**autocast) if autocast else contextlib.nullcontext():
            model(images)

    return call


def training_call(model: paddle.nn.Layer, task: Task, batch_size: int, autocast: dict | None = None) -> Call:
    """Forward and backward pass of a random micro-batch, as engine/train.py has them."""
    model.train()
    batch = task.example(batch_size)

    def call() -> None:
        task.update_schedules(model, 0.0)
        with paddle.amp.auto_cast(**autocast) if autocast else contextlib.nullcontext():
            losses = task.loss(model, batch, np.random.default_rng(0))
        losses.total.backward()
        model.clear_gradients(set_to_zero=False)

    return call


def predictor_call(predictor: Predictor, shape: list[int]) -> Call:
    """A run of an exported program, from images in main memory to logits in main memory."""
    images = np.random.default_rng(0).standard_normal(shape, 'float32')
    return lambda: predictor(images)


# ---------------------------------------------------------------------------------------------------- what is measured
@dataclass(frozen=True)
class Subject:
    """A model to measure, described so that another process can build it.

    Attributes:
        name: what tables call it.
        config: its configuration; with AMP it runs in mixed precision on a GPU.
        program: prefix of its exported files, which are then run instead of the layers.
        precision: of the exported program, 'fp32' or 'bf16'.
    """

    name: str
    config: object
    program: str | None = None
    precision: str = 'fp32'

    def image_shape(self) -> list[int]:
        """[C, H, W]."""
        return build_task(self.config).image_shape()

    def calls(self, batch_sizes: list[int], context: Context) -> list[Call]:
        """Builds the model, with random weights, and returns a forward pass for each batch size."""
        shapes = [[size, *self.image_shape()] for size in batch_sizes]
        if self.program is not None:
            predictor = Predictor(self.program, self.precision)
            return [predictor_call(predictor, shape) for shape in shapes]
        model, autocast = self._layers(context)
        return [layer_call(model, shape, autocast) for shape in shapes]

    def training_call(self, batch_size: int, context: Context) -> Call:
        """Builds the model, with random weights, and returns forward and backward pass of TRAIN.TASK, without a teacher."""
        model, autocast = self._layers(context)
        model.set_grad_checkpointing(self.config.TRAIN.RECOMPUTE)
        config = self.config.clone()
        config.defrost()
        config.MODEL.NUM_CLASSES = model.num_classes
        task = build_task(config)
        task.attach(model, print, training=False)
        return training_call(model, task, batch_size, autocast)

    def _layers(self, context: Context) -> tuple[paddle.nn.Layer, dict | None]:
        """The model, and what `paddle.amp.auto_cast` takes where it runs in mixed precision."""
        model = build_model(self.config)
        if not (self.config.AMP and context.on_gpu):
            return model, None
        autocast = {'level': self.config.AMP_LEVEL, 'dtype': self.config.AMP_DTYPE}
        if self.config.AMP_LEVEL == 'O2':
            model = paddle.amp.decorate(model, **autocast)
        return model, autocast


# ---------------------------------------------------------------------------------------------------- memory
def peak_memory(subject: Subject, batch_size: int, training: bool = False) -> int | None:
    """Bytes that building a model and evaluating one batch need at their peak, measured in a process of its own.

    With `training` the batch goes forward and backward; what an optimiser keeps is not part of it.

    On a GPU those that Paddle allocated there. On the CPU the growth of the resident memory since Paddle was imported,
    which Linux tells; None elsewhere.

    Raises:
        UserError: when it runs out of memory, or is killed, as systems short of memory do.
    """
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context('spawn'), initializer=die_with_parent
    ) as executor:
        try:
            return executor.submit(_peak_memory_here, subject, batch_size, training).result()
        except (BrokenProcessPool, MemoryError):
            raise UserError(
                f'{subject.name}: there is not enough memory for one batch of {batch_size} images; '
                'try a smaller -batch_size.'
            ) from None


def _peak_memory_here(subject: Subject, batch_size: int, training: bool) -> int | None:
    context = distributed.start()
    before = _resident('VmRSS')
    with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # the peak so far is forgotten
    call = subject.training_call(batch_size, context) if training else subject.calls([batch_size], context)[0]
    call()
    if context.on_gpu:
        context.synchronize()
        return paddle.device.cuda.max_memory_allocated()
    return None if before is None else _resident('VmHWM') - before


def _resident(field: str) -> int | None:
    """VmRSS, the resident memory of this process, or VmHWM, its peak, in bytes; None where there is no /proc."""
    try:
        with open('/proc/self/status', encoding='ascii') as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ':'))
    except OSError:
        return None
