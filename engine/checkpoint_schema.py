# SPDX-License-Identifier: Apache-2.0
"""Validation of checkpoints before any part is used; errors name the file, the part and the value found."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from paddle import nn

from models.weights.match import LISTED, REBUILT_SUFFIXES, MatchResult, check_finite, match_state
from models.weights.rules import rules_of
from utils.errors import UserError
from utils.text import NAME, printable
from utils.weights import choose_state_dict, find_metadata

MAX_COUNT = 1 << 53  # of steps, epochs and images: float64 holds all integers below
MAX_SEED = 1 << 64
_SCALAR_KIND = '_pow_acc'  # accumulators of one number, in Paddle's names
_OTHER_MODEL = 'set MODEL and DATA.IMAGE_SIZE as in the run that wrote it, or start from the weights with -pretrained'
MASTER_WEIGHT = 'master_weight'  # optimizer state of version 0.1.0 at AMP_LEVEL O2: the weights in float32
TOTALS = 6  # sums over the unfinished epoch
FIELDS = ('validated', 'best', 'best_score', 'best_epoch', 'totals', 'unwritten')  # of `progress`, in all versions
SCALER = (
    'scale', 'incr_ratio', 'decr_ratio', 'incr_every_n_steps', 'decr_every_n_nan_or_inf', 'incr_count', 'decr_count',
    'use_dynamic_loss_scaling',
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint of this suite or of PaddleViT, or of a file with weights alone.

    Attributes:
        path: the file.
        weights: name -> array.
        metadata: see `utils.weights.METADATA`.
        average: EMA of the weights, or None.
        complete: True if the file holds a training state, not weights alone.
        ours: True if this suite wrote the file, so that training state, optimizer names and seed are known.
        optimizer: this suite: {kind: {parameter: array}}; PaddleViT: {automatic name: array}.
        scaler: state of the loss scaling; empty if it was off.
        epoch: finished epochs; None: unknown.
        step: optimizer steps taken.
        samples: images of the next epoch that were trained on.
        progress: the other fields of `engine.state.TrainState`.
        seed: SEED of the run; None: unknown.
        lr: learning rate of the last step; 0: unknown.
    """

    path: str
    weights: dict[str, np.ndarray]
    metadata: dict = field(default_factory=dict)
    average: dict[str, np.ndarray] | None = None
    complete: bool = False
    ours: bool = False
    optimizer: dict = field(default_factory=dict)
    scaler: dict = field(default_factory=dict)
    epoch: int | None = None
    step: int = 0
    samples: int = 0
    progress: dict = field(default_factory=dict)
    seed: int | None = None
    lr: float = 0.0

    @property
    def source(self) -> str:
        """Name of the checkpoint in error messages."""
        return f"'{self.path}'"

    def match_average(self, model: nn.Layer) -> MatchResult | None:
        """Match the EMA weights to the model's shapes. Raises UserError if they do not fit."""
        if self.average is None:
            return None
        average = rules_of(model).adopt(model, self.average)
        arrays = {name: array for name, array in average.items() if not name.endswith(REBUILT_SUFFIXES)}
        return match_state(model, arrays, f'{self.source}: model_ema', metadata=self.metadata)

    def check_optimizer(self, model: nn.Layer, kinds: Collection[str], name: str) -> None:
        """Raise UserError if the optimizer state, written by this suite, does not fit model and optimizer.

        Args:
            kinds: names of the optimizer's accumulators.
            name: TRAIN.OPTIMIZER.NAME.
        """
        shapes = {parameter: tuple(value.shape) for parameter, value in model.named_parameters()}
        for kind, entries in self.optimizer.items() if self.ours else ():
            if kind not in kinds:
                raise UserError(
                    f"{self.source}: optimizer holds '{kind}', which TRAIN.OPTIMIZER.NAME {name} does not have; set it to "
                    'the optimizer of that run, or start from the weights with -pretrained.'
                )
            unknown = sorted(entries.keys() - shapes.keys())
            if unknown:
                names = ', '.join(unknown[:LISTED])
                raise UserError(
                    f'{self.source}: optimizer.{kind} names parameters the model lacks: {names}; {_OTHER_MODEL}.'
                )
            for parameter, value in entries.items():
                if np.shape(value) != ((1,) if _SCALAR_KIND in kind else shapes[parameter]):
                    raise UserError(
                        f'{self.source}: optimizer.{kind}.{parameter} has shape {list(np.shape(value))}, but the parameter '
                        f'{list(shapes[parameter])}; {_OTHER_MODEL}.'
                    )


def validate_checkpoint(content: dict, path: str) -> Checkpoint:
    """Validate the content that `read_checkpoint` returned.

    Args:
        content: a checkpoint of this suite or of PaddleViT, or weights alone.
        path: the file it was read from.

    Raises:
        UserError: a part is missing, has a wrong type, or holds NaN.
    """
    source = f"'{path}'"
    if 'model' not in content:
        where, weights = choose_state_dict(content, source=source)
        return Checkpoint(path, weights, find_metadata(content, where, source))
    part = _Parts(content, source)
    scheduler = part.get('lr_scheduler', dict, {}, optional='progress' not in content)
    part.get('config', (str, dict), optional=True)
    ours = 'progress' in content
    where, weights = choose_state_dict({'model': content['model']}, source=f'{source}: model')
    optimizer = dict(part.get('optimizer', dict, {}, optional=not ours))
    (_check_optimizer if ours else _check_flat)(optimizer, f'{source}: optimizer')
    if ours:
        weights = {**weights, **optimizer.pop(MASTER_WEIGHT, {})}
    progress = _progress(part.get('progress', dict), source) if ours else {}
    return Checkpoint(
        path,
        weights,
        find_metadata(content, where, source),
        average=_average(content, source),
        complete=True,
        ours=ours,
        optimizer=optimizer,
        scaler=_scaler(part.get('amp_grad_scaler', dict, {}, optional=True), source),
        epoch=part.get('epoch', int, optional=not ours and 'epoch' not in content),
        step=part.get('step', int) if ours else 0,
        samples=_Parts(part.get('sampler', dict), source, 'sampler.').get('samples', int) if ours else 0,
        progress=progress,
        seed=_Parts(part.get('rng', dict), source, 'rng.').get('seed', int, limit=MAX_SEED) if ours else None,
        lr=_learning_rate(scheduler, source) if ours else 0.0,
    )


class _Parts:
    """Looks up entries of a dict and checks their types; error messages put `prefix` before the names."""

    def __init__(self, content: dict, source: str, prefix: str = ''):
        self.content, self.source, self.prefix = content, source, prefix

    def get(
        self, name: str, kind: type | tuple, default: Any = None, optional: bool = False, limit: int = MAX_COUNT
    ) -> Any:
        """Return an entry, or `default` if it is optional and missing or None. Integers must be in [0, limit)."""
        value = self.content.get(name)
        if value is None and optional:
            return default
        if kind is int:
            fits = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < limit
            if not fits:
                raise self.error(name, 'a whole number of 0 or more')
            return int(value)
        if not isinstance(value, kind):
            raise self.error(name, 'a dict' if kind is dict else 'text')
        return value

    def error(self, name: str, wanted: str) -> UserError:
        found = found_value(self.content[name]) if name in self.content else 'missing'
        return UserError(
            f'{self.source}: {self.prefix}{name} is {found}, but must be {wanted}; the checkpoint is damaged, use an '
            'earlier one, or its weights with -pretrained.'
        )


def found_value(value: Any) -> str:
    """Describe a value in a few characters."""
    if isinstance(value, np.ndarray):
        return f'an array of shape {list(value.shape)}'
    if isinstance(value, (dict, list, tuple)):
        return f'a {type(value).__name__} of {len(value)} entries'
    text = printable(repr(value))
    return text if len(text) <= 40 else f'a {type(value).__name__}'


def _learning_rate(scheduler: dict, source: str) -> float:
    value = scheduler.get('last_lr')
    if not _is_scalar(value) or not 0 <= value < math.inf:
        raise _Parts(scheduler, source, 'lr_scheduler.').error('last_lr', 'a number of 0 or more')
    return float(value)


def _average(content: dict, source: str) -> dict | None:
    average = content.get('model_ema')
    if average is None or (isinstance(average, dict) and not average):
        return None
    return choose_state_dict({'model_ema': average}, prefer_ema=True, source=f'{source}: model_ema')[1]


def _check_optimizer(state: dict, source: str) -> None:
    """Check an optimizer state {kind: {parameter: array}}."""
    for kind in state:
        entries = _Parts(state, source, '').get(kind, dict)
        for name, value in entries.items():
            if not isinstance(value, np.ndarray) or value.dtype.kind != 'f':
                raise _Parts(entries, source, f'{kind}.').error(name, 'an array of floating-point numbers')
        _check_flat(entries, f'{source}.{kind}')
    moments = [kind for kind in state if kind != MASTER_WEIGHT and _SCALAR_KIND not in kind]
    kinds = {kind: state[kind].keys() for kind in moments if state[kind]}
    for kind, names in kinds.items():
        missing = sorted(set().union(*kinds.values()) - names)
        if missing:
            raise UserError(
                f'{source}.{kind} lacks {printable(", ".join(missing[:LISTED]), NAME)}, which other parts of the optimizer '
                'state have; the checkpoint is damaged, use an earlier one, or its weights with -pretrained.'
            )


def _check_flat(state: dict, source: str) -> None:
    """Check a flat state {name: array}; PaddleViT's files hold other entries beside the arrays."""
    for name in state:
        if not isinstance(name, str):
            raise UserError(f'{source} has the key {found_value(name)}, but keys must be text.')
    check_finite({name: np.asarray(value) for name, value in state.items() if _is_number(value)}, source)


def _is_number(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.number, int, float)) and np.asarray(value).dtype.kind in 'iuf'


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    'validated': (lambda value: isinstance(value, (bool, np.bool_)), 'True or False'),
    'best_epoch': (
        lambda value: _is_scalar(value) and 0 <= value < MAX_COUNT and float(value).is_integer(),
        'a whole number of 0 or more',
    ),
    'totals': (lambda value: _are_totals(value), f'numbers by name, or a list of {TOTALS} numbers'),
}


def _are_totals(value: Any) -> bool:
    """Return True for sums by name, or for a list of sums, as version 0.1.0 wrote them."""
    if isinstance(value, dict):
        numbers = list(value.values()) if all(isinstance(name, str) for name in value) else [None]
    else:
        numbers = value if isinstance(value, (list, tuple)) and len(value) == TOTALS else [None]
    return all(_is_scalar(entry) and math.isfinite(entry) for entry in numbers)


def _is_scalar(value: Any) -> bool:
    """Return True for a number; larger integers than counts can be have no float."""
    if isinstance(value, (int, np.integer)):
        return not isinstance(value, bool) and abs(int(value)) < MAX_SEED
    return isinstance(value, (float, np.floating))


def _is_row(row: dict) -> bool:
    """Return True for a row of metrics.jsonl: its kind and numbers by name."""
    names = all(isinstance(name, str) for name in row) and {'kind', 'epoch', 'step'} <= row.keys()
    return names and all(_is_scalar(value) or name == 'kind' for name, value in row.items()) and row['kind'] == 'train'


def _progress(progress: dict, source: str) -> dict:
    part = _Parts(progress, source, 'progress.')
    for name, (fits, wanted) in _FIELDS.items():
        if name not in progress or not fits(progress[name]):
            raise part.error(name, wanted)
    row = part.get('unwritten', dict, optional=True)
    if row is not None and not _is_row(row):
        raise part.error('unwritten', 'a row of metrics.jsonl')
    name = 'best_score' if 'best_score' in progress else 'best'  # version 0.1.0: negative loss if lower is better
    best = progress.get(name)
    if name not in progress or not (_is_scalar(best) and not math.isnan(best) or (best is None and name == 'best')):
        raise part.error(name, 'a number')
    unknown = [name for name in progress if name not in FIELDS]
    if unknown:
        raise UserError(
            f'{source}: progress has the unknown field {found_value(unknown[0])}; the checkpoint is of a newer version or '
            'damaged.'
        )
    return progress


def _scaler(state: dict, source: str) -> dict:
    part = _Parts(state, source, 'amp_grad_scaler.')
    for name in SCALER if state else ():
        value = state.get(name)
        size = np.size(value) if _is_number(value) and name != 'use_dynamic_loss_scaling' else 0
        if name == 'scale' and not (size == 1 and np.ndim(value) == 1 and 0 < np.asarray(value).item() < math.inf):
            raise part.error(name, 'an array of one positive number')
        if size != 1 and not (name == 'use_dynamic_loss_scaling' and isinstance(value, (bool, np.bool_))):
            raise part.error(name, 'a number')
    return state
