# SPDX-License-Identifier: Apache-2.0
"""Throughput, latency and peak memory of a model on this device."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import paddle

from datasets.batch import to_device
from datasets.loader import Batch, Loader
from engine import distributed
from engine.distributed import Context
from engine.precision import Precision
from engine.update import Updater
from models import build_model
from models.engines import LAYERS, Engine, open_engine, write_engine_file
from tasks import Task, build_task
from utils.errors import UserError
from utils.processes import die_with_parent, resident_memory
from utils.temporary import temporary_folder

Call = Callable[[], None]  # runs one pass; may return before the device has finished it


@dataclass(frozen=True)
class Throughput:
    """Medians over the timed rounds."""

    batch_size: int
    images_per_second: float
    latency_ms: float  # of one batch


def measure(config, context: Context, rounds: int = 10, warmup: int = 3) -> Throughput:
    """Measure the forward pass of the model of `config` on DATA.BATCH_SIZE random images."""
    batch_size = config.DATA.BATCH_SIZE
    case = BenchmarkCase(config.MODEL.NAME, config, precision=config.ENGINE_PRECISION)
    build_task(config).check_engine()
    with temporary_folder('throughput') as folder:
        if config.ENGINE != LAYERS:
            case = exported(case, os.path.join(folder, 'model'))
        calls = case.calls([batch_size], context)
        median = statistics.median(time_interleaved(calls, context, rounds, warmup)[0])
    return Throughput(batch_size, batch_size / median, median * 1000)


def report(result: Throughput) -> None:
    """Print a measurement."""
    print(
        f'throughput: {result.images_per_second:.1f} images/s at batch {result.batch_size}, '
        f'{result.latency_ms:.1f} ms a batch (median)'
    )


# ---------------------------------------------------------------------------------------------------- time
def time_interleaved(calls: list[Call], context: Context, rounds: int, warmup: int) -> list[list[float]]:
    """Return the seconds of each call in each round, after `warmup` rounds.

    A round runs every call once, so that other load on the machine slows all calls alike.
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


def layer_call(model: paddle.nn.Layer, shape: list[int], precision: Precision) -> Call:
    """Return a forward pass of random images on the device."""
    model.eval()
    images = paddle.randn(shape)

    def call() -> None:
        with paddle.no_grad(), precision.autocast():
            model(images)

    return call


def training_call(config, model: paddle.nn.Layer, task: Task, batch_size: int, context: Context) -> Call:
    """Return a step of engine/train.py on a random batch: input copy, passes, clipping, optimizer and EMA."""
    model.train()
    precision = Precision(config, context.on_gpu)
    updater = Updater(config, model, precision)
    batch = _on_host(task.example(batch_size))

    def call() -> None:
        task.update_schedules(model, 0.0)
        inputs = to_device(batch, config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
        with precision.autocast():
            losses = task.loss(model, inputs, np.random.default_rng(0))
        updater.backward(losses.total)
        updater.clip(context)
        updater.step(config.TRAIN.BASE_LR)
        updater.clear_gradients()

    return call


def _on_host(example: Batch) -> Batch:
    """Return a batch as a loader returns it: random images [..., H, W, C] uint8 and arrays of targets."""
    *many, channels, height, width = example.images.shape
    images = np.random.default_rng(0).integers(0, 256, (*many, height, width, channels), dtype=np.uint8)
    targets = {
        name: target if isinstance(target, list) else np.asarray(target) for name, target in example.targets.items()
    }
    return dataclasses.replace(example, images=images, targets=targets)


def engine_call(engine: Engine, shape: list[int]) -> Call:
    """Return a run of an inference engine, from images in host memory to logits in host memory."""
    images = np.random.default_rng(0).standard_normal(shape, 'float32')
    return lambda: engine(images)


def loader_speed(loader: Loader, batches: int) -> float:
    """Return the images per second of a training loader alone, over `batches` batches after the first one."""
    with loader:
        endless = itertools.chain.from_iterable(loader.epoch(epoch, borrow=True) for epoch in itertools.count())
        next(endless)  # starts the workers
        started = time.perf_counter()
        images = sum(len(batch) for batch in itertools.islice(endless, batches))
        return images / (time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------- cases
@dataclass(frozen=True)
class BenchmarkCase:
    """A model to measure, in a form that another process can build it from.

    Attributes:
        name: name in tables.
        config: its configuration; with AMP it runs in mixed precision on a GPU.
        program: what `open_engine` takes; the ENGINE of the configuration runs it instead of the layers.
        precision: precision of the engine, 'fp32' or 'bf16'.
    """

    name: str
    config: object
    program: str | None = None
    precision: str = 'fp32'

    def image_shape(self) -> list[int]:
        """Return [C, H, W]."""
        return build_task(self.config).image_shape()

    def calls(self, batch_sizes: list[int], context: Context) -> list[Call]:
        """Build the model with random weights and return a forward pass for each batch size."""
        shapes = [[size, *self.image_shape()] for size in batch_sizes]
        if self.program is not None:
            engine = open_engine(self.config.ENGINE, self.program, self.precision)
            return [engine_call(engine, shape) for shape in shapes]
        model, precision = build_model(self.config), Precision(self.config, context.on_gpu)
        precision.cast(model)
        return [layer_call(model, shape, precision) for shape in shapes]

    def training_call(self, batch_size: int, context: Context) -> Call:
        """Build the model with random weights and return a training step of TRAIN.TASK, without a teacher."""
        model = build_model(self.config)
        model.set_grad_checkpointing(self.config.TRAIN.RECOMPUTE)
        config = self.config.clone()
        config.defrost()
        config.MODEL.NUM_CLASSES = model.num_classes
        task = build_task(config)
        task.attach(model, print, training=False)
        return training_call(config, model, task, batch_size, context)


def exported(case: BenchmarkCase, prefix: str) -> BenchmarkCase:
    """Export the model of a case for its ENGINE, and return the case that runs it.

    Raises:
        UserError: see `Task.check_engine`.
    """
    build_task(case.config).check_engine()
    program = write_engine_file(case.config.ENGINE, build_model(case.config), case.image_shape(), prefix)
    return dataclasses.replace(case, program=program)


# ---------------------------------------------------------------------------------------------------- memory
def peak_memory(case: BenchmarkCase, batch_size: int, training: bool = False) -> int | None:
    """Measure the peak memory, in bytes, of building a model and evaluating one batch, in a subprocess.

    With `training`, of a training step with its optimizer instead.

    Returns:
        On a GPU, the memory that Paddle allocated there. On the CPU under Linux, the growth of the resident memory since
        Paddle was imported. Elsewhere None.

    Raises:
        UserError: the subprocess ran out of memory or was killed.
    """
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context('spawn'), initializer=die_with_parent
    ) as executor:
        try:
            return executor.submit(_peak_memory_here, case, batch_size, training).result()
        except (BrokenProcessPool, MemoryError):
            raise UserError(
                f'{case.name}: there is not enough memory for one batch of {batch_size} images; '
                'try a smaller -batch_size.'
            ) from None


def _peak_memory_here(case: BenchmarkCase, batch_size: int, training: bool) -> int | None:
    context = distributed.start()
    before = resident_memory('VmRSS')
    with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # resets the peak
    call = case.training_call(batch_size, context) if training else case.calls([batch_size], context)[0]
    call()
    if context.on_gpu:
        context.synchronize()
        return paddle.device.cuda.max_memory_allocated()
    return None if before is None else resident_memory('VmHWM') - before
