# SPDX-License-Identifier: Apache-2.0
"""Reports of a training run: log lines, rows of metrics.jsonl, VisualDL scalars and images."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import numpy as np
import paddle
from PIL import Image

from engine.distributed import Context
from engine.estimate import describe_estimate, peak_memory
from engine.learning_rate import lr_scale
from engine.length import RunLength
from engine.precision import describe_cpu_precision
from engine.state import TrainState
from engine.statistics import means
from tasks import Task
from utils.errors import UserError
from utils.files import atomic_write
from utils.runlog import MetricsFile, RunLog, VisualDLFile


class Reporter:
    """Writes the reports of one training run. The main process writes all files; other ranks write their own log only.

    Args:
        config: the resolved configuration.
        num_batches: micro-batches per epoch.
        length: length of the run.
        folder: folder of the run.
    """

    def __init__(
        self, config, task: Task, context: Context, log: RunLog, folder: str, num_batches: int, length: RunLength
    ):
        self.config = config
        self.task = task
        self.context = context
        self.log = log
        self.folder = folder
        self.num_batches = num_batches
        self.length = length
        self.num_epochs = length.num_epochs
        self._reports = 0
        self.metrics = MetricsFile(os.path.join(folder, 'metrics.jsonl')) if context.is_main else None
        self.writer = None

    def open(self, state: TrainState) -> None:
        """Open the files for a run that starts or resumes at `state`."""
        if self.context.is_main:
            self._rewind(state)
            self.writer = VisualDLFile(os.path.join(self.folder, 'vdl'))

    def _rewind(self, state: TrainState) -> None:
        """Drop the rows of metrics.jsonl that the run will write again."""
        row, state.unwritten = state.unwritten, None
        self.metrics.rewind(state.step, state.validated, trained=row is None)
        if row is not None:
            self.metrics.append(row)

    def close(self) -> None:
        """Close the files."""
        if self.writer is not None:
            self.writer.close()

    # ------------------------------------------------------------------------------------------------ log lines
    def start(self, epoch: int, global_batch: int) -> None:
        """Log the settings of a run that starts or resumes at `epoch`."""
        train, scale = self.config.TRAIN, lr_scale(self.config, global_batch)
        ends = scale if train.LR_SCHEDULER.SCALE_ENDS else 1.0
        self.log.master(f'----- Total # of train batch (single gpu): {self.num_batches}')
        self.log.master(
            f'Base lr is scaled to: {train.BASE_LR * scale}, warmup start lr is scaled to: '
            f'{train.WARMUP_START_LR * ends}, end lr is scaled to: {train.END_LR * ends}'
        )
        if self.config.AMP and not self.context.on_gpu:
            self.log.master(f'AMP on the CPU: training with {describe_cpu_precision()}.')
        self.log.master(f'----- Start training from epoch {epoch}.')

    def restart_timer(self, totals: Mapping[str, float]) -> None:
        """Restart the measurement of images per second; `totals` are the sums over the epoch so far."""
        self._reported, self._images = time.time(), totals['images']

    def due(self, window: range) -> bool:
        """Return True if a step over the micro-batches `window` is reported."""
        every = self.config.REPORT_FREQ
        return any(index % every == 0 or index == self.num_batches - 1 for index in window)

    def step(
        self,
        epoch: int,
        index: int,
        step: int,
        *,
        lr: float,
        norm: paddle.Tensor,
        own: Mapping[str, float],
        current: Mapping[str, float],
        totals: Mapping[str, float],
        settings: Mapping[str, float],
    ) -> None:
        """Report one optimizer step.

        Args:
            epoch: from 1.
            index: last micro-batch of the step.
            step: number of optimizer steps so far.
            norm: gradient norm before clipping, 0-D.
            own: sums over the epoch so far on this rank.
            current: sums of this step over all ranks.
            totals: sums over the epoch so far over all ranks.
            settings: scheduled values of the model by name, see `Task.update_schedules`.
        """
        head = f'Epoch[{epoch:03d}/{self.num_epochs:03d}], Step[{index:04d}/{self.num_batches:04d}], Lr: {lr:.6f}, '
        self.log.local(f'{head}Avg Loss: {means(self.task, own)["loss"]:.4f}{self._counts("Avg", own)}')
        now = means(self.task, current)
        speed = (totals['images'] - self._images) / max(time.time() - self._reported, 1e-9)
        self.restart_timer(totals)
        left = (self.num_batches - index - 1) * self.config.DATA.BATCH_SIZE * self.context.world_size
        loss, parts = now['loss'], {name: now[name] for name in self.task.parts}
        memory = f', Memory: {paddle.device.cuda.max_memory_allocated() / 2**30:.1f} GiB' if self.context.on_gpu else ''
        self.log.master(
            f'{head}Loss: {loss:.4f} ({means(self.task, totals)["loss"]:.4f}){self._counts("Avg", totals)}, '
            f'Grad Norm: {norm.item():.3f}, Images/s: {speed:.0f}, ETA: {left / max(speed, 1e-9):.0f} s{memory}'
            + ''.join(f', {name}: {value:.4g}' for name, value in {**settings, **parts}.items())
        )
        scalars = {'loss': loss, 'lr': lr, 'grad_norm': norm.item(), 'images_per_second': speed, **settings, **parts}
        self._scalars('train', scalars, step)
        self._reports += 1
        if self._reports == 2:  # the first one includes compilation and the start of the workers
            self._estimate(epoch, index, speed)

    def _estimate(self, epoch: int, index: int, speed: float) -> None:
        """Log what an epoch and the rest of the run take, from images per second after micro-batch `index`."""
        accumulate, length = self.config.TRAIN.ACCUM_ITER, self.length
        taken = (epoch - 1) * length.steps_per_epoch + index // accumulate + 1
        per_step = self.config.DATA.BATCH_SIZE * accumulate * self.context.world_size
        memory = peak_memory(self.context.on_gpu)
        self.log.master(f'----- {describe_estimate(length, taken, speed / per_step, memory)}')

    def epoch(self, state: TrainState, lr: float, totals: Mapping[str, float], seconds: float) -> None:
        """Report a finished epoch, or the steps of an incomplete last epoch.

        If the row of metrics.jsonl cannot be written, `state.unwritten` keeps it.

        Raises:
            UserError: the disk is full.
        """
        averages = means(self.task, totals)
        values = {
            'lr': lr,
            **averages,
            'images': int(totals['images']),
            'skipped': int(totals['skipped']),
            'images_per_second': totals['images'] / seconds,
            'seconds': seconds,
        }
        try:
            self.log.master(
                f'----- Epoch[{state.last_epoch:03d}/{self.num_epochs:03d}], Lr: {lr:.6f}, time: {seconds:.2f}, '
                f'Train Loss: {averages["loss"]:.4f}{self._counts("Train", totals)}'
            )
            self.record('train', state.last_epoch, state.step, **values)
        except UserError:
            state.unwritten = {'kind': 'train', 'epoch': state.last_epoch, 'step': state.step, **values}
            raise

    def _counts(self, prefix: str, sums: Mapping[str, float]) -> str:
        averages = means(self.task, sums)
        return ''.join(f', {prefix} {title}: {averages[name]:.4f}' for name, title in self.task.counts.items())

    # ------------------------------------------------------------------------------------------------ files
    def record(self, kind: str, epoch: int, step: int, **values) -> None:
        """Write a row of metrics.jsonl and its VisualDL scalars."""
        if self.metrics is not None:
            self.metrics.append({'kind': kind, 'epoch': epoch, 'step': step, **values})
            self._scalars(f'{kind}_epoch' if kind == 'train' else kind, values, step)

    def pictures(self, pictures: Mapping[str, Image.Image], state: TrainState) -> None:
        """Write PNG files and VisualDL images. Within an epoch, file names hold the step instead of the epoch."""
        when = f'step{state.step:07d}' if state.samples else f'{state.epoch:04d}'
        for name, picture in pictures.items():
            with atomic_write(os.path.join(self.folder, f'{name}_{when}.png')) as file:
                picture.save(file, 'PNG')
            self.writer.add_image(name, np.asarray(picture), state.step)

    def files(self, texts: Mapping[str, str], prefix: str = '') -> None:
        """Files of an evaluation in the run's folder, in the place of those of an earlier one."""
        if self.context.is_main:
            write_files(self.folder, {prefix + name: text for name, text in texts.items()})

    def _scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f'{group}/{name}', float(value), step)


def write_files(folder: str, texts: Mapping[str, str]) -> None:
    """Write texts to a folder by file name. Raises UserError where the disk is full."""
    for name, text in texts.items():
        with atomic_write(os.path.join(folder, name), 'w') as file:
            file.write(text)
