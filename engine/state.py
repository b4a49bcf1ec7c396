# SPDX-License-Identifier: Apache-2.0
"""State of a training run, and its conversion to and from checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import paddle

from engine.checkpoint import from_automatic_names, optimizer_state, set_optimizer_state
from engine.checkpoint_schema import Checkpoint, validate_checkpoint
from engine.ema import ModelEma
from engine.paddle_private import accumulator_names
from engine.precision import MasterWeights
from engine.statistics import read_totals
from models.weights.load import load_state
from tasks import Task
from utils.errors import UserError
from utils.weights import METADATA


@dataclass
class TrainState:
    """Progress of a run, stored in checkpoints. Every random draw is a function of SEED and this state.

    Attributes:
        epoch: finished epochs.
        step: optimizer steps taken.
        samples: images of epoch `epoch + 1` that were trained on.
        validated: True if no validation of the last step is pending.
        best: best value of the task's metric so far; None: no evaluation counted yet.
        best_epoch: epoch of `best`.
        totals: sums over the unfinished epoch by name.
        unwritten: row of the finished epoch that could not be written to metrics.jsonl on a full disk.
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0
    validated: bool = True
    best: float | None = None
    best_epoch: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    unwritten: dict | None = None

    @property
    def last_epoch(self) -> int:
        """Epoch of the last step, counted from 1, finished or not."""
        return self.epoch + (self.samples > 0)

    def improves(self, value: float, direction: str) -> bool:
        """Return True if `value` is better than `best`; NaN is never better."""
        if math.isnan(value):
            return False
        return self.best is None or (value > self.best if direction == 'max' else value < self.best)


class Snapshot:
    """Converts a run to a checkpoint and back; keys are PaddleViT's where it has them.

    Args:
        config: the resolved configuration.
        weights: of the model, in float32.
        steps_per_epoch: optimizer steps per epoch.
        global_batch: images per optimizer step over all ranks.
    """

    def __init__(
        self,
        config,
        task: Task,
        weights: MasterWeights,
        optimizer: paddle.optimizer.Optimizer,
        scaler: paddle.amp.GradScaler,
        ema: ModelEma | None,
        state: TrainState,
        *,
        steps_per_epoch: int,
        global_batch: int,
        log: Callable[[str], None],
    ):
        self.config = config
        self.task = task
        self.weights = weights
        self.model = weights.model
        self.optimizer = optimizer
        self.scaler = scaler
        self.ema = ema
        self.state = state
        self.steps_per_epoch = steps_per_epoch
        self.global_batch = global_batch
        self.log = log

    # ------------------------------------------------------------------------------------------------ writing
    def state_dict(self) -> dict:
        """Return the content of last.pdparams."""
        progress = asdict(self.state)
        content = {
            'model': self.weights.state_dict(),
            'optimizer': optimizer_state(self.optimizer, self.model),
            'lr_scheduler': {'last_lr': self.optimizer.get_lr()},
            'amp_grad_scaler': self.scaler.state_dict(),
            'epoch': progress.pop('epoch'),
            'step': progress.pop('step'),
            'sampler': {'samples': progress.pop('samples')},
            'progress': progress,
            'rng': {'seed': self.config.SEED},
            'config': self.config.dump(),
            **self.metadata(),
        }
        if self.ema is not None:
            content['model_ema'] = self.ema.state_dict()
        return content

    def metadata(self) -> dict:
        """Return the metadata that is stored beside the weights, see `utils.weights.METADATA`."""
        metadata = self.model.weight_rules.metadata(self.model)
        return {METADATA: metadata} if metadata else {}

    # ------------------------------------------------------------------------------------------------ reading
    def load_state_dict(self, content: dict, path: str) -> None:
        """Load a checkpoint of this suite or of PaddleViT, or flat weights (with the epoch from TRAIN.LAST_EPOCH).

        The whole checkpoint is checked before anything changes.

        Raises:
            UserError: the checkpoint does not fit the run.
        """
        checkpoint = validate_checkpoint(content, path)
        checkpoint.check_optimizer(self.model, accumulator_names(self.optimizer), self.config.TRAIN.OPTIMIZER.NAME)
        average = checkpoint.match_average(self.model) if self.ema is not None else None
        self._check_samples(checkpoint)
        weights = {**checkpoint.weights, METADATA: checkpoint.metadata}
        self.weights.load(load_state(self.model, weights, checkpoint.source, self.log, replace_head=False))
        if not checkpoint.complete:
            self.state.epoch = self.config.TRAIN.LAST_EPOCH
            self.log(f'----- Resume: weights only from {path}; epoch {self.state.epoch} by -last_epoch.')
        else:
            self._load_progress(checkpoint)
            self._load_optimizer(checkpoint)
            if self.scaler.is_enable() and checkpoint.scaler:
                self.scaler.load_state_dict(checkpoint.scaler)
        if self.ema is not None:
            if average is None:
                self.log('----- Resume: the checkpoint holds no EMA; it starts from the weights.')
            self.ema.set_state_dict(self.weights.state_dict() if average is None else average.state)
        self.log(f'----- Resume: epoch {self.state.epoch}, step {self.state.step} from {path}')

    def _check_samples(self, checkpoint: Checkpoint) -> None:
        """Raise UserError if the checkpoint continues after an image that the data do not have."""
        images = self.steps_per_epoch * self.global_batch
        if checkpoint.samples > images:
            raise UserError(
                f'{checkpoint.source}: sampler.samples is {checkpoint.samples}, but an epoch has at most {images} images; give '
                'the data of that run, or start from the weights with -pretrained.'
            )

    def _load_progress(self, checkpoint: Checkpoint) -> None:
        state, last_epoch = self.state, self.config.TRAIN.LAST_EPOCH
        state.epoch = checkpoint.epoch or last_epoch
        if last_epoch not in (0, state.epoch):
            self.log(f'----- Resume: the checkpoint is of epoch {state.epoch}, so -last_epoch={last_epoch} is ignored.')
        if not checkpoint.ours:  # PaddleViT: whole epochs
            state.step = state.epoch * self.steps_per_epoch
            return
        self.optimizer.set_lr(checkpoint.lr)  # for a save before the next step
        progress = checkpoint.progress
        state.step, state.samples = checkpoint.step, checkpoint.samples
        state.validated, state.best_epoch = progress['validated'], progress['best_epoch']
        state.best = _read_best(progress, self.task)
        state.totals = read_totals(self.task, progress['totals'])
        state.unwritten = progress.get('unwritten')
        if state.samples % self.global_batch:
            state.samples -= state.samples % self.global_batch
            self.log(
                f'----- Resume: the checkpoint was written with another global batch size; training continues after image '
                f'{state.samples} of epoch {state.epoch + 1}, so a few images are repeated.'
            )
        if checkpoint.seed != self.config.SEED:
            self.log(f'----- Resume: SEED was {checkpoint.seed} and is {self.config.SEED} from here on.')

    def _load_optimizer(self, checkpoint: Checkpoint) -> None:
        stored = checkpoint.optimizer
        if not checkpoint.ours:
            stored = from_automatic_names(stored, self.model) or {}
            stored = {} if stored.keys() - accumulator_names(self.optimizer) else stored
        if not stored:
            self.log('----- Resume: no optimizer state that fits; moments start at zero.')
            return
        set_optimizer_state(self.optimizer, self.model, stored)


def _read_best(progress: dict, task: Task) -> float | None:
    """Return the best value. Version 0.1.0 stored `best_score`: the negative of a loss, and -inf for no value."""
    if 'best_score' not in progress:
        return progress['best']
    score = progress['best_score']
    if not math.isfinite(score):
        return None
    return score if task.evaluator().best[1] == 'max' else -score
