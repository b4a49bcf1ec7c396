# SPDX-License-Identifier: Apache-2.0
"""The training loop.

One optimiser step is a window of ACCUM_ITER micro-batches. Its gradient is that of the mean loss over all images of the
window on all processes, leftover windows and uneven batches included. Every random draw of a step is a function of
(SEED, epoch, micro-batch, rank), so the state of a run is its weights, its optimiser and its position, nothing else.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from dataclasses import asdict, dataclass, field

import numpy as np
import paddle
from PIL import Image

from datasets.batch import to_tensor
from engine.checkpoint import (
    BEST,
    from_automatic_names,
    keep_epoch,
    optimizer_state,
    save_best,
    save_last,
    set_optimizer_state,
)
from engine.distributed import Context
from engine.ema import ModelEma
from engine.evaluate import Interrupted, evaluate
from engine.optim import build_optimizer, clip_gradients
from engine.schedules import lr_scale, lr_schedule
from engine.signals import StopSignal
from models.pretrained import load_state
from utils.errors import UserError
from utils.files import atomic_write
from utils.runlog import MetricsFile, RunLog, VisualDLFile, progress
from utils.weights import FACTS

# Entries of the sums that travel with each step, one small reduction for all processes.
LOSS, CORRECT, IMAGES, SKIPPED, NONFINITE, STOP = range(6)


@dataclass
class Position:
    """Where a run is; all of it goes into checkpoints."""

    epoch: int = 0  # finished epochs
    step: int = 0  # optimiser steps taken
    samples: int = 0  # images of epoch + 1 taken
    validated: bool = True  # whether the validation that was due after `epoch` is done
    best_score: float = -math.inf  # of the validations so far: an accuracy, or minus a loss
    best_epoch: int = 0
    totals: list = field(default_factory=lambda: [0.0] * 6)  # sums over the unfinished epoch
    unwritten: dict | None = None  # row of `epoch` that metrics.jsonl could not take


class Trainer:
    """Trains a model on one process; its twins on the other processes take the same steps.

    Args:
        config: the resolved tree.
        model: the bare model, pretrained weights loaded.
        task: an objective of engine/tasks.py.
        loaders: training and validation loaders of this process.
    """

    def __init__(self, config, model, task, train_loader, val_loader, context: Context, log: RunLog, folder: str):
        self.config = config
        self.model = model
        self.task = task
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.context = context
        self.log = log
        self.folder = folder
        self.position = Position()
        self.global_batch = config.DATA.BATCH_SIZE * config.TRAIN.ACCUM_ITER * context.world_size
        self.lr = lr_schedule(config, self.global_batch)
        self.optimizer = build_optimizer(config, model)
        self.amp = config.AMP and context.on_gpu
        self.scaler = paddle.amp.GradScaler(enable=self.amp and config.AMP_DTYPE == 'float16')
        if self.amp and config.AMP_LEVEL == 'O2':
            self.model, self.optimizer = paddle.amp.decorate(
                model, self.optimizer, level='O2', dtype=config.AMP_DTYPE, master_weight=True
            )
        self.ema = ModelEma(self.model, config.TRAIN.MODEL_EMA_DECAY) if config.TRAIN.MODEL_EMA else None
        self.metrics = MetricsFile(os.path.join(folder, 'metrics.jsonl')) if context.is_main else None
        self.writer = None
        self.stop = StopSignal()
        # The sums of a step are read this many steps late on a GPU, when they are long there: the queue never drains.
        self.lag = 2 if context.on_gpu and config.TRAIN.NONFINITE == 'error' else 0

    # ------------------------------------------------------------------------------------------------ the run
    def fit(self) -> None:
        """Trains to the last epoch, from wherever the position is. Leaves by SystemExit when a signal asked it to."""
        config, position = self.config, self.position
        if self.metrics is not None:
            self._rewind_metrics()
        if position.epoch >= config.TRAIN.NUM_EPOCHS and position.validated:
            self._nothing_left()
            return
        self._open_writer()
        self._announce()
        self.parallel = self.context.parallel(self.model, getattr(self.model, 'leaves_parameters_out', False))
        try:
            if not position.validated:
                self._finish_epoch()
            while position.epoch < config.TRAIN.NUM_EPOCHS:
                row = self._train_epoch(position.epoch + 1)
                position.epoch, position.samples, position.totals = position.epoch + 1, 0, [0.0] * 6
                position.validated = not self._validation_due(position.epoch)
                self._report_epoch(row)
                self._finish_epoch()
        finally:
            if self.writer is not None:
                self.writer.close()
        self.log.master(f'----- Finished: {self._best()}')

    def _nothing_left(self) -> None:
        """Logs that the run is finished already. Raises UserError where there is no run, only weights."""
        done, wanted = self.position.epoch, self.config.TRAIN.NUM_EPOCHS
        text = f'epoch {done} of {wanted} is done, so nothing is left to train'
        more = f'set TRAIN.NUM_EPOCHS to more than {done}'
        if not self.position.step:
            raise UserError(f'{text}: {more}, or -last_epoch to less than {wanted}.')
        self.log.master(f'----- Finished already: {text}; to train on, {more}. So far: {self._best()}')

    def _best(self) -> str:
        """The best validation so far, and where its weights are."""
        position, measure = self.position, self.task.measure
        title = measure.titles[measure.best]
        if not math.isfinite(position.best_score):
            return f'no validation with a finite {title}, so there is no {BEST}'
        path = os.path.join(self.folder, BEST)
        place = path if os.path.exists(path) else 'the folder of the run that this one continues'
        return f'best Validation {title}: {abs(position.best_score):.4f} after epoch {position.best_epoch}, weights in {place}'

    def _announce(self) -> None:
        train, scale = self.config.TRAIN, lr_scale(self.config, self.global_batch)
        ends = scale if train.LR_SCHEDULER.SCALE_ENDS else 1.0
        self.log.master(f'----- Total # of train batch (single gpu): {self.train_loader.num_batches}')
        self.log.master(
            f'Base lr is scaled to: {train.BASE_LR * scale}, warmup start lr is scaled to: '
            f'{train.WARMUP_START_LR * ends}, end lr is scaled to: {train.END_LR * ends}'
        )
        if self.config.AMP and not self.context.on_gpu:
            self.log.master('AMP is asked for, but mixed precision needs a GPU: training in float32.')
        self.log.master(f'----- Start training from epoch {self.position.epoch + 1}.')

    def _train_epoch(self, epoch: int) -> dict:
        """Takes the steps of an epoch that are left. Returns its row of metrics.jsonl."""
        config, position = self.config, self.position
        accumulate = config.TRAIN.ACCUM_ITER
        num_batches = self.train_loader.num_batches
        steps = math.ceil(num_batches / accumulate)
        first = position.samples // self.global_batch
        self.log.master(f'Train epoch {epoch}. LR={self.lr(epoch, 0.0):.6e}')
        self.model.train()
        started = reported = time.time()
        totals = np.array(position.totals)
        local = paddle.zeros([6])
        images_before = totals[IMAGES]
        pending: deque = deque()
        batches = self.train_loader.epoch(epoch, start_batch=first * accumulate)
        try:
            for step in progress(range(first, steps), steps - first, f'epoch {epoch}', self.context.is_main):
                window = range(step * accumulate, min((step + 1) * accumulate, num_batches))
                lr = self.lr(epoch, step / steps)
                clock = self.task.set_time(self.model, epoch - 1 + step / steps)
                sums, norm = self._step(epoch, window, batches, lr, local)
                position.step += 1
                position.samples = min((step + 1) * self.global_batch, self.train_loader.num_samples)
                pending.append(sums)
                current = None
                report = self._due(window, num_batches)
                save = config.SAVE_STEPS and position.step % config.SAVE_STEPS == 0 and step + 1 < steps
                while len(pending) > (0 if report or save or step + 1 == steps else self.lag):
                    current = self._take(pending.popleft(), totals, epoch, lr)
                position.totals = totals.tolist()
                if report and current is not None:
                    speed = (totals[IMAGES] - images_before) / max(time.time() - reported, 1e-9)
                    reported, images_before = time.time(), totals[IMAGES]
                    left = (num_batches - window[-1] - 1) * config.DATA.BATCH_SIZE * self.context.world_size
                    eta = left / max(speed, 1e-9)
                    self._report(epoch, window[-1], num_batches, lr, current, totals, local, norm, speed, eta, clock)
                if current is not None and current[STOP] and step + 1 < steps:
                    self._leave()
                if save:
                    self._save()
        finally:
            batches.close()
        seconds = time.time() - started
        images = max(totals[IMAGES], 1)
        return {
            'lr': lr,
            'loss': totals[LOSS] / images,
            **({'acc1': totals[CORRECT] / images} if self._has_accuracy else {}),
            'images': int(totals[IMAGES]),
            'skipped': int(totals[SKIPPED]),
            'images_per_second': totals[IMAGES] / seconds,
            'seconds': seconds,
        }

    # ------------------------------------------------------------------------------------------------ one step
    def _step(self, epoch: int, window: range, batches, lr: float, local: paddle.Tensor):
        """Takes one optimiser step. Returns its sums over all processes and the gradient norm, both still on the device."""
        total = sum(self.train_loader.batch_size_at(index) for index in window)
        loss_sum, correct_sum, images_seen, skipped = paddle.zeros([]), paddle.zeros([]), 0, 0
        for index in window:
            batch = next(batches)
            draws = np.random.SeedSequence([self.config.SEED, epoch, index, self.context.rank])
            paddle.seed(int(draws.generate_state(1)[0]))
            images, labels = to_tensor(batch, self.config.DATA.IMAGENET_MEAN, self.config.DATA.IMAGENET_STD)
            waits = index != window[-1] and self.context.world_size > 1
            with self.parallel.no_sync() if waits else contextlib.nullcontext():
                with self._autocast():
                    loss, correct = self.task(self.parallel, images, labels, np.random.default_rng(draws))
                # gradients are summed over the window and averaged over the processes
                share = len(labels) * self.context.world_size / total
                self.scaler.scale(loss * share).backward()
            loss_sum += loss.detach() * len(labels)
            correct_sum += correct
            images_seen += len(labels)
            skipped += batch.skipped
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model.parameters(), self.config.TRAIN.GRAD_CLIP)
        finite = paddle.isfinite(loss_sum)
        if not self.scaler.is_enable():  # with loss scaling an overflowing gradient is the scaler's business
            finite = paddle.logical_and(finite, paddle.isfinite(norm))
        counts = paddle.to_tensor([images_seen, skipped, float(bool(self.stop))], 'float32').unbind()
        sums = paddle.stack([loss_sum, correct_sum, counts[0], counts[1], 1.0 - finite.astype('float32'), counts[2]])
        local.add_(sums)
        self.context.sum(sums)
        if self.lag or not sums[NONFINITE].item():
            self.optimizer.set_lr(lr)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update()
        self.optimizer.clear_grad(set_to_zero=False)
        return sums, norm

    def _autocast(self):
        return paddle.amp.auto_cast(enable=self.amp, level=self.config.AMP_LEVEL, dtype=self.config.AMP_DTYPE)

    def _evaluating(self):
        """Float32, unless the weights are in half precision."""
        return self._autocast() if self.config.AMP_LEVEL == 'O2' else contextlib.nullcontext()

    def _take(self, sums: paddle.Tensor, totals: np.ndarray, epoch: int, lr: float) -> list[float]:
        """Reads the sums of a step and adds them to the epoch's; ends the run, on every process alike, if they say so."""
        values = sums.tolist()
        if not values[NONFINITE]:
            totals += values
            return values
        where = f'step {self.position.step} (epoch {epoch}, lr {lr:.3g})'
        if self.config.TRAIN.NONFINITE == 'error':
            raise UserError(
                f'the loss or its gradient is not finite at {where}; the weights of the last save are untouched. Lower '
                "TRAIN.BASE_LR, set TRAIN.GRAD_CLIP, or drop such steps with TRAIN.NONFINITE 'skip'."
            )
        self.log.master(f'Skipped {where}: the loss or its gradient is not finite.')
        totals[SKIPPED] += values[IMAGES] + values[SKIPPED]
        return values

    # ------------------------------------------------------------------------------------------------ after an epoch
    def _validation_due(self, epoch: int) -> bool:
        return epoch % self.config.VALIDATE_FREQ == 0 or epoch == self.config.TRAIN.NUM_EPOCHS

    def _report_epoch(self, row: dict) -> None:
        """Logs and records a finished epoch. Where that fails, as on a full disk, the epoch is saved first."""
        epoch = self.position.epoch
        accuracy = f', Train Acc: {row["acc1"]:.4f}' if 'acc1' in row else ''
        try:
            self.log.master(
                f'----- Epoch[{epoch:03d}/{self.config.TRAIN.NUM_EPOCHS:03d}], Lr: {row["lr"]:.6f}, '
                f'time: {row["seconds"]:.2f}, Train Loss: {row["loss"]:.4f}{accuracy}'
            )
            self._record('train', epoch=epoch, **row)
        except UserError:
            self.position.unwritten = {'kind': 'train', 'epoch': epoch, 'step': self.position.step, **row}
            self._save()
            raise

    def _finish_epoch(self) -> None:
        """Saves. Where a validation is due, saves before it too: the epoch outlives a validation that fails."""
        position = self.position
        if not position.validated:
            self._save()
            self.context.barrier()  # a process that fails at once would end the one that still writes
            try:
                self._validate()
            except Interrupted:
                self._leave()
            position.validated = True
        self._save()
        due = self.config.SAVE_FREQ and position.epoch % self.config.SAVE_FREQ == 0
        if self.context.is_main and (due or position.epoch == self.config.TRAIN.NUM_EPOCHS):
            path = keep_epoch(self.folder, position.epoch, self.config.SAVE_KEEP)
            self.log.master(f'----- Save model: {path}')

    def _validate(self) -> None:
        self.log.master(f'----- Validation after Epoch: {self.position.epoch}')
        steps = math.ceil(self.train_loader.num_batches / self.config.TRAIN.ACCUM_ITER)
        last_step = self.position.epoch - 1 / steps  # the model as its last step had it
        self.task.set_time(self.model, last_step)
        counts = self.task.is_final(last_step) or self.position.epoch == self.config.TRAIN.NUM_EPOCHS
        self._validate_weights('val', self.model.state_dict, counts)
        if self.context.is_main:
            with self._evaluating():
                pictures = self.task.pictures(self.model)
            self._show(pictures)
        if self.ema is not None:
            with self.ema.applied():
                self._validate_weights('val_ema', self.ema.state_dict, counts)

    def _validate_weights(self, kind: str, weights, counts: bool) -> None:
        config, position, measure = self.config, self.position, self.task.measure
        with self._evaluating():
            stopping = lambda: bool(self.stop)  # noqa: E731
            result = evaluate(config, self.model, self.val_loader, self.context, self.log, stopping, measure)
        label = 'Validation' if kind == 'val' else 'EMA Validation'
        self.log.master(
            f'----- Epoch[{position.epoch:03d}/{config.TRAIN.NUM_EPOCHS:03d}], {measure.text(result, label)}, '
            f'time: {result["seconds"]:.2f}'
        )
        self._record(kind, epoch=position.epoch, **result, images_per_second=result['images'] / result['seconds'])
        if counts and measure.score(result) > position.best_score:
            position.best_score, position.best_epoch = measure.score(result), position.epoch
            if self.context.is_main:
                save_best(self.folder, {**weights(), **self._facts()})

    def _leave(self) -> None:
        """A signal came: every process is at the same step; the main one saves, then all leave."""
        self._save()
        self.log.master('----- Stopped by a signal; continue with -resume=' + self.folder)
        self.context.barrier()
        raise SystemExit(self.stop.exit_status)

    # ------------------------------------------------------------------------------------------------ state
    def _save(self) -> None:
        if self.context.is_main:
            save_last(self.folder, self.state_dict())

    def state_dict(self) -> dict:
        """Everything a run is, under PaddleViT's names where it has one."""
        position = asdict(self.position)
        state = {
            'model': self.model.state_dict(),
            'optimizer': optimizer_state(self.optimizer, self.model),
            'lr_scheduler': {'last_lr': self.optimizer.get_lr()},
            'amp_grad_scaler': self.scaler.state_dict(),
            'epoch': position.pop('epoch'),
            'step': position.pop('step'),
            'sampler': {'samples': position.pop('samples')},
            'progress': position,
            'rng': {'seed': self.config.SEED},
            'config': self.config.dump(),
            **self._facts(),
        }
        if self.ema is not None:
            state['model_ema'] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: dict, path: str) -> None:
        """Continues from a checkpoint of this suite, one of PaddleViT, or flat weights (position from TRAIN.LAST_EPOCH)."""
        if 'model' not in state:
            load_state(self.model, state, f"'{path}'", self.log.master, replace_head=False)
            self.position.epoch = self.config.TRAIN.LAST_EPOCH
            self.log.master(f'----- Resume: weights only from {path}; epoch {self.position.epoch} by -last_epoch.')
        else:
            weights = {**state['model'], FACTS: state.get(FACTS, {})}
            load_state(self.model, weights, f"'{path}'", self.log.master, replace_head=False)
            self._load_position(state)
            self._load_optimizer(state.get('optimizer') or {}, ours='progress' in state)
            if self.scaler.is_enable() and state.get('amp_grad_scaler'):
                self.scaler.load_state_dict(state['amp_grad_scaler'])
        if self.ema is not None:
            averages = state.get('model_ema')
            if averages is None:
                self.log.master('----- Resume: the checkpoint holds no EMA; it starts from the weights.')
            self.ema.set_state_dict(averages or self.model.state_dict())
        self.log.master(f'----- Resume: epoch {self.position.epoch}, step {self.position.step} from {path}')

    def _rewind_metrics(self) -> None:
        """metrics.jsonl as it is at this position."""
        row, self.position.unwritten = self.position.unwritten, None
        self.metrics.rewind(self.position.step, self.position.validated, trained=row is None)
        if row is not None:
            self.metrics.append(row)

    def _facts(self) -> dict:
        facts = self.model.facts()
        return {FACTS: facts} if facts else {}

    def _load_position(self, state: dict) -> None:
        position = self.position
        last_epoch = self.config.TRAIN.LAST_EPOCH
        position.epoch = int(state.get('epoch', last_epoch)) or last_epoch
        if last_epoch not in (0, position.epoch):
            self.log.master(
                f'----- Resume: the checkpoint is of epoch {position.epoch}, so -last_epoch={last_epoch} is ignored.'
            )
        if 'progress' not in state:  # PaddleViT: whole epochs
            position.step = position.epoch * math.ceil(self.train_loader.num_batches / self.config.TRAIN.ACCUM_ITER)
            return
        self.optimizer.set_lr(state['lr_scheduler']['last_lr'])  # for a save that comes before the next step
        position.step = state['step']
        position.samples = state['sampler']['samples']
        for name, value in state['progress'].items():
            setattr(position, name, value)
        if position.samples % self.global_batch:
            position.samples -= position.samples % self.global_batch
            self.log.master(
                f'----- Resume: the checkpoint was written with another global batch; going on after image '
                f'{position.samples} of epoch {position.epoch + 1}, so a few images are seen again.'
            )
        if state['rng']['seed'] != self.config.SEED:
            self.log.master(f'----- Resume: SEED was {state["rng"]["seed"]} and is {self.config.SEED} from here on.')

    def _load_optimizer(self, state: dict, ours: bool) -> None:
        if not ours:
            state = from_automatic_names(state, self.model)
        if not state:
            self.log.master('----- Resume: no optimiser state that fits; moments start at zero.')
            return
        set_optimizer_state(self.optimizer, self.model, state)

    # ------------------------------------------------------------------------------------------------ reports
    def _due(self, window: range, num_batches: int) -> bool:
        every = self.config.REPORT_FREQ
        return any(index % every == 0 or index == num_batches - 1 for index in window)

    def _report(self, epoch, index, num_batches, lr, current, totals, local, norm, speed, eta, clock) -> None:
        clock = {**clock, **self.task.notes()}
        head = f'Epoch[{epoch:03d}/{self.config.TRAIN.NUM_EPOCHS:03d}], Step[{index:04d}/{num_batches:04d}], Lr: {lr:.6f}, '
        mine = local.tolist()
        self.log.local(f'{head}Avg Loss: {mine[LOSS] / max(mine[IMAGES], 1):.4f}{self._accuracy(", Avg Acc: ", mine)}')
        loss = current[LOSS] / max(current[IMAGES], 1)
        memory = f', Memory: {paddle.device.cuda.max_memory_allocated() / 2**30:.1f} GiB' if self.context.on_gpu else ''
        images = max(totals[IMAGES], 1)
        self.log.master(
            f'{head}Loss: {loss:.4f} ({totals[LOSS] / images:.4f}){self._accuracy(", Avg Acc: ", totals)}, '
            f'Grad Norm: {norm.item():.3f}, Images/s: {speed:.0f}, ETA: {eta:.0f} s{memory}'
            + ''.join(f', {name}: {value:.4g}' for name, value in clock.items())
        )
        self._scalars('train', {'loss': loss, 'lr': lr, 'grad_norm': norm.item(), 'images_per_second': speed, **clock})
        if self.scaler.is_enable() and self.scaler.state_dict()['scale'].item() < 1.0:
            raise UserError('the loss scale fell below 1: float16 overflows at every step. Use AMP_DTYPE bfloat16.')

    @property
    def _has_accuracy(self) -> bool:
        return 'acc1' in self.task.measure.titles

    def _accuracy(self, title: str, sums) -> str:
        return f'{title}{sums[CORRECT] / max(sums[IMAGES], 1):.4f}' if self._has_accuracy else ''

    def _record(self, kind: str, epoch: int, **values) -> None:
        """A row of metrics.jsonl and VisualDL scalars, by the main process."""
        if self.metrics is not None:
            self.metrics.append({'kind': kind, 'epoch': epoch, 'step': self.position.step, **values})
            self._scalars(f'{kind}_epoch' if kind == 'train' else kind, values)

    def _show(self, pictures: dict[str, Image.Image]) -> None:
        """Pictures of a validation: PNG files in the run's folder, and VisualDL images."""
        for name, picture in pictures.items():
            with atomic_write(os.path.join(self.folder, f'{name}_{self.position.epoch:04d}.png')) as file:
                picture.save(file, 'PNG')
            self.writer.add_image(name, np.asarray(picture), self.position.step)

    def _open_writer(self) -> None:
        if self.context.is_main:
            self.writer = VisualDLFile(os.path.join(self.folder, 'vdl'))

    def _scalars(self, group: str, values: dict) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f'{group}/{name}', float(value), self.position.step)
