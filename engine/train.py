# SPDX-License-Identifier: Apache-2.0
"""The training loop.

One optimizer step accumulates the gradients of ACCUM_ITER micro-batches, its window. Its gradient is that of the mean loss
over all images of the window on all ranks, also for incomplete windows and uneven batches. ACCUM_MODE ms_mlp is the other
accumulation, that of MS-MLP's code: gradients are clipped after each micro-batch, and there are no incomplete windows.

Every random draw is a function of (SEED, epoch, micro-batch, rank), so weights, optimizer state and `TrainState` define a run
completely.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import paddle

from datasets.batch import on_device
from engine.checkpoint import BEST, save_best, save_epoch, save_last
from engine.distributed import Context
from engine.evaluate import describe_metrics, evaluate
from engine.learning_rate import lr_schedule
from engine.length import RunLength, count_steps
from engine.precision import Precision
from engine.report import Reporter
from engine.signals import StopSignal
from engine.state import Snapshot, TrainState
from engine.statistics import StepSums, names_of
from engine.update import Updater
from tasks import Interrupted, Task, build_evaluator
from utils.device import Download
from utils.errors import UserError
from utils.runlog import RunLog, progress


class Trainer:
    """Trains a model on one rank; the Trainers of the other ranks take the same steps.

    Args:
        config: the resolved configuration.
        model: not wrapped in DataParallel, with pretrained weights loaded.
        task: attached to the model.
        train_loader, val_loader: loaders of this rank.
        folder: folder of the run.
    """

    def __init__(self, config, model, task: Task, train_loader, val_loader, context: Context, log: RunLog, folder: str):
        self.config = config
        self.model = model
        self.task = task
        self.evaluator = build_evaluator(task, val_loader.dataset)
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.context = context
        self.log = log
        self.folder = folder
        self.state = TrainState()
        self.global_batch = config.DATA.BATCH_SIZE * config.TRAIN.ACCUM_ITER * context.world_size
        self.clips_sums = config.TRAIN.ACCUM_MODE == 'ms_mlp' and bool(config.TRAIN.GRAD_CLIP)
        self.steps_per_epoch = count_steps(train_loader.num_batches, config.TRAIN)
        self.length = RunLength.from_config(config, self.steps_per_epoch)
        check_schedules(config, task)
        self.lr = lr_schedule(config, self.global_batch, self.steps_per_epoch)
        model.set_grad_checkpointing(config.TRAIN.RECOMPUTE)
        self.precision = Precision(config, context.on_gpu)
        self.updater = Updater(config, model, self.precision)
        self.weights, self.ema = self.updater.weights, self.updater.ema
        self.optimizer, self.scaler = self.updater.optimizer, self.updater.scaler
        self.reporter = Reporter(config, task, context, log, folder, train_loader.num_batches, self.length)
        self.snapshot = Snapshot(
            config,
            task,
            self.weights,
            self.optimizer,
            self.scaler,
            self.ema,
            self.state,
            steps_per_epoch=self.steps_per_epoch,
            global_batch=self.global_batch,
            log=log.master,
        )
        self.stop = StopSignal()
        self._elapsed = 0.0  # seconds spent on the unfinished epoch so far
        # Read the sums of a step `lag` steps late on a GPU, so that the host never waits for the device.
        self.lag = 2 if context.on_gpu and config.TRAIN.NONFINITE == 'error' else 0

    # ------------------------------------------------------------------------------------------------ the run
    def fit(self) -> None:
        """Train from the current state to the last step. Raises SystemExit after a signal."""
        state = self.state
        if self.finished:
            self._report_finished()
            return
        self.log.on_error = self.stop.fail
        self.reporter.open(state)
        self.reporter.start(state.epoch + 1, self.global_batch)
        unused = getattr(self.model, 'has_unused_parameters', False)
        self.parallel = self.model if self.weights.has_copies else self.context.parallel(self.model, unused)
        try:
            if not state.validated:
                self._finish_epoch()
            while not self._finished:
                self._train_epoch(state.epoch + 1)
                self._finish_epoch()
            if self.stop.error is not None:
                self.stop.end()
        finally:
            self.log.on_error = None
            self.reporter.close()
        self.log.master(f'----- Finished: {self._best()}')

    @property
    def _schedule_step(self) -> int:
        """Optimizer steps since the start of the schedules; `state.step` differs if only weights were resumed."""
        return self.state.epoch * self.steps_per_epoch + self.state.samples // self.global_batch

    @property
    def _finished(self) -> bool:
        return self._schedule_step >= self.length.num_steps

    @property
    def finished(self) -> bool:
        """True if the last step is taken and validated, so that `fit` has nothing to do."""
        return self._finished and self.state.validated

    def _train_epoch(self, epoch: int) -> None:
        """Take the steps of an epoch up to its end or to a validation within it."""
        state, accumulate, num_batches = self.state, self.config.TRAIN.ACCUM_ITER, self.train_loader.num_batches
        first = state.samples // self.global_batch
        end = self.length.next_stop(self._schedule_step) - state.epoch * self.steps_per_epoch
        totals = np.array([state.totals.get(name, 0.0) for name in names_of(self.task)])
        self.log.master(f'Train epoch {epoch}. LR={self.lr(epoch, 0.0):.6e}')
        self.model.train()
        own, pending, started = paddle.zeros([len(totals)]), deque(), time.time() - self._elapsed
        self.reporter.restart_timer(self._named(totals))
        data, loader = self.config.DATA, self.train_loader
        with contextlib.closing(loader.epoch(epoch, first * accumulate, borrow=True)) as arrays:
            batches = on_device(arrays, data.IMAGENET_MEAN, data.IMAGENET_STD)
            steps = range(first, end)
            for step in progress(steps, len(steps), f'epoch {epoch}', self.context.is_main):
                window = range(step * accumulate, min((step + 1) * accumulate, num_batches))
                lr = self.lr(epoch, step / self.steps_per_epoch)
                settings = self.task.update_schedules(self.model, epoch - 1 + step / self.steps_per_epoch)
                sums, norm = self._step(epoch, window, batches, lr, own)
                state.step += 1
                state.samples = min((step + 1) * self.global_batch, self.train_loader.num_samples)
                pending.append((Download(sums), f'step {state.step} (epoch {epoch}, lr {lr:.3g})'))
                last = step + 1 == end
                report, save = self.reporter.due(window), self._save_due() and not last
                current = self._read(pending, totals, keep=0 if report or save or last else self.lag)
                if report:
                    with self._saving():
                        self.reporter.step(
                            epoch, window[-1], state.step, lr=lr, norm=norm, own=self._named(own.tolist()),
                            current=current, totals=self._named(totals), settings=settings,
                        )  # fmt: skip
                    self.precision.check_loss_scale()
                if current is not None and current['stop'] and not last:
                    self._read(pending, totals, keep=0)
                    self._save_and_exit()
                if save:
                    self._save()
        complete, seconds = end == self.steps_per_epoch, time.time() - started
        if complete:
            state.epoch, state.samples, state.totals = epoch, 0, {}
        state.validated = not self.length.validation_due(self._schedule_step)
        self._elapsed = 0.0 if complete else seconds
        if complete or self._finished:
            with self._saving():
                self.reporter.epoch(self.state, lr, self._named(totals), seconds)

    # ------------------------------------------------------------------------------------------------ one step
    def _step(self, epoch: int, window: range, batches, lr: float, own: paddle.Tensor):
        """Take one optimizer step. Return its sums over all ranks and the gradient norm, both on the device."""
        total = sum(self.train_loader.batch_size_at(index) for index in window)
        sums = StepSums(self.task)
        for index in window:
            batch = next(batches)
            self.context.mark()
            draws = step_draws(self.config, epoch, index, self.context.rank)
            paddle.seed(int(draws.generate_state(1)[0]))
            inner = index != window[-1]
            waits = inner and not self.clips_sums and self.parallel is not self.model
            with self.parallel.no_sync() if waits else contextlib.nullcontext():
                with self.precision.autocast():
                    losses = self.task.loss(self.parallel, batch, np.random.default_rng(draws))
                self.context.mark()
                # Gradients are summed over the window and averaged over the ranks.
                share = len(batch) * self.context.world_size / total
                self.updater.backward(losses.total * share)
            if inner and self.clips_sums:
                self.updater.clip_sum(self.context)
            sums.add(losses, batch)
        norm = self.updater.clip(self.context)
        finite = paddle.isfinite(sums.loss)
        if not self.scaler.is_enable():  # with loss scaling, GradScaler handles overflow
            finite = paddle.logical_and(finite, paddle.isfinite(norm))
        vector = sums.vector(finite, bool(self.stop))
        own.add_(vector)
        self.context.sum(vector)
        if self.lag or not vector[names_of(self.task).index('nonfinite')].item():
            self.updater.step(lr)
        self.updater.clear_gradients()
        return vector, norm

    def _named(self, values) -> dict[str, float]:
        return dict(zip(names_of(self.task), map(float, values)))

    def _read(self, pending: deque, totals: np.ndarray, keep: int) -> dict[str, float] | None:
        """Read the sums of all but the last `keep` steps and add them to the totals. Return the sums read last.

        Raises:
            UserError: on every rank, if the loss or gradient is not finite (TRAIN.NONFINITE error).
        """
        current = None
        while len(pending) > keep:
            sums, where = pending.popleft()
            values = sums.numpy().astype('float64')
            current = self._named(values)
            if not current['nonfinite']:
                totals += values
                continue
            if self.config.TRAIN.NONFINITE == 'error':
                raise UserError(
                    f'the loss or its gradient is not finite at {where}; the weights of the last save are untouched. Lower '
                    "TRAIN.BASE_LR, set TRAIN.GRAD_CLIP, or drop such steps with TRAIN.NONFINITE 'skip'."
                )
            self.log.master(f'Skipped {where}: the loss or its gradient is not finite.')
            totals[names_of(self.task).index('skipped')] += current['images'] + current['skipped']
        self.state.totals = self._named(totals)
        return current

    # ------------------------------------------------------------------------------------------------ after an epoch
    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Save the run, if possible, when a report in this block cannot be written, as on a full disk."""
        try:
            yield
        except UserError:
            with contextlib.suppress(UserError):
                self._save()
            raise

    def _finish_epoch(self) -> None:
        """Save the run. If a validation is due, save before it too, so that a failing validation loses nothing."""
        state = self.state
        if not state.validated:
            self._save()
            self.context.barrier()  # a rank that fails early would end rank 0 during its write
            try:
                self._validate()
            except Interrupted:
                self._save_and_exit()
            state.validated = True
        self._save()
        due = self.config.SAVE_FREQ and state.samples == 0 and state.epoch % self.config.SAVE_FREQ == 0
        if self.context.is_main and (due or self._finished):
            path = save_epoch(self.folder, state.last_epoch, self.config.SAVE_KEEP)
            self.log.master(f'----- Save model: {path}')

    def _validate(self) -> None:
        state = self.state
        inside = f', step {state.step}' if state.samples else ''
        self.log.master(f'----- Validation after Epoch: {state.last_epoch}{inside}')
        taken = state.samples // self.global_batch
        last_step = state.epoch + (taken - 1) / self.steps_per_epoch  # same schedule values as in the last step
        self.task.update_schedules(self.model, last_step)
        counts = self.task.is_final(last_step) or self._finished
        self._validate_weights('val', self.weights.state_dict, counts)
        if self.context.is_main:
            with self.precision.evaluation():
                pictures = self.evaluator.pictures(self.model)
            self.reporter.pictures(pictures, state)
        if self.ema is not None:
            with self.ema.applied():
                self._validate_weights('val_ema', self.ema.state_dict, counts)

    def _validate_weights(self, kind: str, weights, counts: bool) -> None:
        config, state = self.config, self.state
        with self.precision.evaluation():
            result = evaluate(
                config, self.model, self.val_loader, self.context, self.log, self.task, self.evaluator,
                should_stop=lambda: bool(self.stop),
            )  # fmt: skip
        label = 'Validation' if kind == 'val' else 'EMA Validation'
        self.log.master(
            f'----- Epoch[{state.last_epoch:03d}/{self.length.num_epochs:03d}], '
            f'{describe_metrics(self.evaluator, result, label)}, time: {result["seconds"]:.2f}'
        )
        for line in self.evaluator.details():
            self.log.master(line)
        self.reporter.files(self.evaluator.files(), '' if kind == 'val' else 'ema_')
        speed = result['images'] / result['seconds']
        self.reporter.record(kind, state.last_epoch, state.step, **result, images_per_second=speed)
        name, direction = self.evaluator.best
        if counts and state.improves(result[name], direction):
            state.best, state.best_epoch = result[name], state.last_epoch
            if self.context.is_main:
                save_best(self.folder, {**weights(), **self.snapshot.metadata()})

    # ------------------------------------------------------------------------------------------------ saving and exit
    def _save_due(self) -> bool:
        return self.config.SAVE_STEPS > 0 and self.state.step % self.config.SAVE_STEPS == 0

    def _save(self) -> None:
        if self.context.is_main:
            save_last(self.folder, self.snapshot.state_dict())

    def _save_and_exit(self) -> None:
        """Save and exit after a signal or an error of the log; every rank is at the same step."""
        self._save()
        if self.stop.number is not None:
            self.log.master('----- Stopped by a signal; continue with -resume=' + self.folder)
        self.context.barrier()
        self.stop.end()

    def _report_finished(self) -> None:
        """Log that the run is finished already. Raises UserError if only weights were resumed."""
        if self.config.TRAIN.NUM_ITERS:
            unit, key, done, wanted = 'step', 'TRAIN.NUM_ITERS', self._schedule_step, self.length.num_steps
        else:
            unit, key, done, wanted = 'epoch', 'TRAIN.NUM_EPOCHS', self.state.epoch, self.length.num_epochs
        text = f'{unit} {done} of {wanted} is done, so nothing is left to train'
        more = f'set {key} to more than {done}'
        if not self.state.step:
            raise UserError(f'{text}: {more}, or -last_epoch to less than {self.length.num_epochs}.')
        self.log.master(f'----- Finished already: {text}; to train on, {more}. So far: {self._best()}')

    def _best(self) -> str:
        """Describe the best validation so far and the path of its weights."""
        state, title = self.state, self.evaluator.titles[self.evaluator.best[0]]
        if state.best is None:
            return f'no validation with a finite {title}, so there is no {BEST}'
        path = os.path.join(self.folder, BEST)
        place = path if os.path.exists(path) else 'the folder of the run that this one continues'
        return f'best Validation {title}: {state.best:.4f} after epoch {state.best_epoch}, weights in {place}'


def step_draws(config, epoch: int, index: int, rank: int) -> np.random.SeedSequence:
    """Return the seed of all random numbers of micro-batch `index` of an epoch, from 1, on a rank."""
    return np.random.SeedSequence([config.SEED, epoch, index, rank])


def check_schedules(config, task: Task) -> None:
    """Raise UserError if a schedule of the model follows TRAIN.NUM_EPOCHS while TRAIN.NUM_ITERS sets the length."""
    if config.TRAIN.NUM_ITERS and task.schedules:
        names = ', '.join(schedule.name for schedule in task.schedules)
        raise UserError(
            f'TRAIN.NUM_ITERS is set, but {names} of the model follows epochs: set TRAIN.NUM_EPOCHS instead.'
        )
