# SPDX-License-Identifier: Apache-2.0
"""Loads weights into a model: all of them, or all but a classifier of another number of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import paddle
from paddle import nn

from models.base import Start
from models.port import port_state_dict, rename_arrays
from models.state import LISTED, REBUILT_SUFFIXES, count_classes, fit_state
from utils.errors import UserError
from utils.weights import (
    EMA_KEYS,
    FACTS,
    PADDLE,
    choose_state_dict,
    file_format,
    find_facts,
    read_file,
    resolve_weights_path,
)


class Weights(NamedTuple):
    """What a weight file holds.

    Attributes:
        path: the file.
        arrays: name -> array, in names and layouts of its kind.
        facts: see `utils.weights.FACTS`.
        averaged: they are averaged weights.
        kind: PADDLE or another kind of `file_format`.
    """

    path: str
    arrays: dict[str, np.ndarray]
    facts: dict
    averaged: bool = False
    kind: str = PADDLE

    @property
    def source(self) -> str:
        """What errors and the log call it."""
        return f"'{self.path}'"


def read_weights(path: str) -> Weights:
    """Reads a .pdparams file: flat weights, or a checkpoint, of which averaged weights are preferred (PaddleViT's rule).

    Args:
        path: the file, with or without .pdparams, or a run folder.

    Raises:
        UserError: no such file, or a damaged or foreign one.
    """
    weights = _read_any(path, prefer_ema=True)
    if weights.kind != PADDLE:
        raise foreign_weights(weights.path, weights.kind)
    return weights


def foreign_weights(path: str, kind: str) -> UserError:
    """The error about a weight file that must be converted first."""
    return UserError(
        f"'{path}' is a {kind} file; convert it first: "
        f'python tools/port_weights.py -cfg CFG -source {path} -output X.pdparams'
    )


def _read_any(path: str, prefer_ema: bool) -> Weights:
    path = resolve_weights_path(path)
    kind, content = file_format(path), read_file(path)
    where, arrays = choose_state_dict(content, prefer_ema or kind == PADDLE, source=f"'{path}'")
    averaged = bool(set(where.split('.')) & set(EMA_KEYS))
    return Weights(path, arrays, find_facts(content, where, f"'{path}'"), averaged, kind)


def load_pretrained(
    model: nn.Layer, path: str | Weights, log: Callable[[str], None] = print, replace_head: bool = True
) -> None:
    """Loads a weight file into a model, see `read_weights`.

    Args:
        model: not wrapped by DataParallel.
        path: the file, with or without .pdparams, or a run folder; or what `read_weights` returned.
        log: takes a line for each thing worth saying.
        replace_head: a training starts: leave the classifier as it is where the file's has another number of classes,
            and whatever else the model's hook `starting_from` names; False: those are errors, as for an evaluation.

    Raises:
        UserError: see `read_weights`; or weights that do not fit; the model is then unchanged.
    """
    weights = path if isinstance(path, Weights) else read_weights(path)
    averaged = ' (averaged weights, model_ema)' if weights.averaged else ''
    log(f'----- Pretrained: Load model state from {weights.path}{averaged}')
    load_state(model, {**weights.arrays, FACTS: weights.facts}, weights.source, log, replace_head)


def load_frozen(model: nn.Layer, path: str, log: Callable[[str], None] = print) -> None:
    """Makes a teacher of a model: all its weights from a .pdparams file or run folder, or from a published file, which is
    converted on the way; evaluation mode, no gradients. Its classifier becomes that of the file. Raises as
    `load_pretrained` does."""
    weights = _read_any(path, prefer_ema=False)
    if weights.kind == PADDLE:
        match_classes(model, weights.arrays)
        load_pretrained(model, weights, log=log, replace_head=False)
    else:
        match_classes(model, rename_arrays(model, weights.arrays, source=weights.source))
        arrays = port_state_dict(model, weights.arrays, source=weights.source)
        load_state(model, arrays, weights.source, log, replace_head=False)
        log(f'----- Pretrained: {weights.source} is converted and loaded')
    model.eval()
    for parameter in model.parameters():
        parameter.stop_gradient = True


def match_classes(model: nn.Layer, arrays: Mapping[str, np.ndarray]) -> None:
    """Gives a classifier as many classes as that of the weights has, where both have one."""
    classes = count_classes(model, arrays)
    if classes and model.num_classes and classes != model.num_classes:
        model.reset_classifier(classes)


def load_state(
    model: nn.Layer,
    arrays: Mapping[str, np.ndarray],
    source: str = 'the state dict',
    log: Callable[[str], None] = print,
    replace_head: bool = True,
) -> None:
    """Sets all weights of a model from arrays under its own names; see `load_pretrained`.

    Everything is checked before the first weight changes.
    """
    _check_facts(model, arrays.get(FACTS, {}), source)
    arrays = {name: array for name, array in arrays.items() if not name.endswith((*REBUILT_SUFFIXES, FACTS))}
    targets = model.state_dict()
    ours, theirs = count_classes(model, targets), count_classes(model, arrays)
    fresh: list[str] = []
    if ours != theirs and None not in (ours, theirs):
        if not replace_head:
            mend = f'set MODEL.NUM_CLASSES to {theirs}' if theirs else 'give weights that were trained with one'
            raise UserError(f'{source} has {_classifier(theirs)}, but the model {_classifier(ours)}; {mend}.')
        fresh = [name for name in targets if name.startswith(model.head_names())]
        arrays = {name: array for name, array in arrays.items() if not name.startswith(model.head_names())}
    start = model.starting_from(arrays) if replace_head and hasattr(model, 'starting_from') else Start()
    unused, anew = start.unused, start.anew
    arrays = {start.called.get(name, name): array for name, array in arrays.items() if name not in unused}
    fitted = fit_state(model, arrays, source, optional=[*fresh, *anew])
    fitted.unused.update(unused)
    if ours != theirs:
        begins = ', which starts anew' if fresh else ''
        log(f'----- Pretrained: {source} has {_classifier(theirs)} and the model {_classifier(ours)}{begins}')
    if unused or anew:
        log(f'----- Pretrained: {len(fitted.state)} arrays of {source} are used')
    for reason in dict.fromkeys(anew.values()):
        names = [name for name in anew if anew[name] == reason]
        log(f'----- Pretrained: {len(names)} arrays of the model start anew, {reason}: {", ".join(names[:LISTED])}')
    if fitted.unused:
        reasons = '; '.join(dict.fromkeys(fitted.unused.values()))
        log(f'----- Pretrained: {len(fitted.unused)} arrays of {source} are left out: {reasons}')
    for name in fitted.kept:
        if targets[name].is_floating_point():
            log(f'----- Pretrained: {source} does not say {name}; the model keeps {targets[name].tolist()}')
    for name, (old, new) in fitted.resized.items():
        log(f'----- Pretrained: {name} interpolated from {list(old)} to {list(new)}')
    values = {name: paddle.to_tensor(array).astype(targets[name].dtype) for name, array in fitted.state.items()}
    model.set_state_dict({**targets, **values})


def _check_facts(model: nn.Layer, theirs: Mapping, source: str) -> None:
    ours = model.facts() if hasattr(model, 'facts') else {}
    for key in ours:
        if theirs.get(key, ours[key]) != ours[key]:
            raise UserError(
                f'{source} was trained with {key} {theirs[key]}, but the model has {ours[key]}, which shapes do not show; '
                f'set {key} to {theirs[key]}.'
            )


def _classifier(classes: int) -> str:
    return f'a classifier of {classes} classes' if classes else 'no classifier'
