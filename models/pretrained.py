# SPDX-License-Identifier: Apache-2.0
"""Loads weights into a model: all of them, or all but a classifier of another number of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import paddle
from paddle import nn

from models.base import Start
from models.port import port_state_dict
from models.state import LISTED, REBUILT_SUFFIXES, count_classes, fit_state
from utils.errors import UserError
from utils.weights import EMA_KEYS, FACTS, PADDLE, choose_state_dict, file_format, read_file, resolve_weights_path


def load_pretrained(model: nn.Layer, path: str, log: Callable[[str], None] = print, replace_head: bool = True) -> None:
    """Loads a .pdparams file: flat weights, or a checkpoint, of which averaged weights are preferred (PaddleViT's rule).

    Args:
        model: not wrapped by DataParallel.
        path: the file, with or without .pdparams, or a run folder.
        log: takes a line for each thing worth saying.
        replace_head: a training starts: leave the classifier as it is where the file's has another number of classes,
            and whatever else the model's hook `starting_from` names; False: those are errors, as for an evaluation.

    Raises:
        UserError: no such file, a damaged or foreign one, or weights that do not fit; the model is then unchanged.
    """
    path = resolve_weights_path(path)
    kind = file_format(path)
    if kind != PADDLE:
        raise UserError(
            f"'{path}' is a {kind} file; convert it first: "
            f'python tools/port_weights.py -cfg CFG -source {path} -output X.pdparams'
        )
    content = read_file(path)
    where, arrays = choose_state_dict(content, prefer_ema=True, source=f"'{path}'")
    facts = content.get(FACTS, {})
    averaged = ' (averaged weights, model_ema)' if set(where.split('.')) & set(EMA_KEYS) else ''
    log(f'----- Pretrained: Load model state from {path}{averaged}')
    load_state(model, {**arrays, FACTS: facts}, source=f"'{path}'", log=log, replace_head=replace_head)


def load_frozen(model: nn.Layer, path: str, log: Callable[[str], None] = print) -> None:
    """Makes a teacher of a model: all its weights from a .pdparams file or run folder, or from a published file, which is
    converted on the way; evaluation mode, no gradients. Raises as `load_pretrained` does."""
    path = resolve_weights_path(path)
    if file_format(path) == PADDLE:
        load_pretrained(model, path, log=log, replace_head=False)
    else:
        source = f"'{path}'"
        _, arrays = choose_state_dict(read_file(path), source=source)
        load_state(model, port_state_dict(model, arrays, source=source), source, log, replace_head=False)
        log(f'----- Pretrained: {source} is converted and loaded')
    model.eval()
    for parameter in model.parameters():
        parameter.stop_gradient = True


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
