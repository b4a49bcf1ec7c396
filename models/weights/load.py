# SPDX-License-Identifier: Apache-2.0
"""Load weights into a model, with or without the classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import paddle
from paddle import nn

from models.weights.channels import adapt_channels
from models.weights.classes import match_classes
from models.weights.convert import port_state_dict, rename_arrays
from models.weights.match import LISTED, REBUILT_SUFFIXES, MatchResult, match_state
from models.weights.published import fetch
from models.weights.rules import GRID, Start, rules_of
from utils.errors import UserError
from utils.formats import PADDLE, file_format, read_file
from utils.text import NAME, printable
from utils.weights import EMA_KEYS, METADATA, PUBLISHED, choose_state_dict, find_metadata, resolve_weights_path

MAX_LIST = 100  # entries of a list in the metadata; there are at most 5 anchor sizes


class Weights(NamedTuple):
    """Content of a weight file.

    Attributes:
        path: the file.
        arrays: name -> array, in the names and layouts of the file.
        metadata: see `utils.weights.METADATA`.
        averaged: True for averaged weights (EMA).
        kind: file format: PADDLE, or another result of `file_format`.
    """

    path: str
    arrays: dict[str, np.ndarray]
    metadata: dict
    averaged: bool = False
    kind: str = PADDLE

    @property
    def source(self) -> str:
        """Return the name of the file in errors and in the log."""
        return f"'{self.path}'"


def read_weights(path: str) -> Weights:
    """Read a .pdparams file: flat weights, or a checkpoint, from which EMA weights are preferred (as in PaddleViT).

    Args:
        path: the file, with or without .pdparams, or a run folder.

    Raises:
        UserError: a missing or damaged file, or one of another format.
    """
    weights = _read_any(path, prefer_ema=True)
    if weights.kind != PADDLE:
        raise foreign_weights(weights.path, weights.kind)
    return weights


def foreign_weights(path: str, kind: str) -> UserError:
    """Return the error for a weight file that must be converted first."""
    return UserError(
        f"'{path}' is a {kind} file; convert it first: "
        f'python tools/port_weights.py -cfg CFG -source {path} -output X.pdparams'
    )


def _read_any(path: str, prefer_ema: bool) -> Weights:
    if path.startswith(PUBLISHED):
        path = fetch(path[len(PUBLISHED) :])
    path = resolve_weights_path(path)
    kind, content = file_format(path), read_file(path)
    where, arrays = choose_state_dict(content, prefer_ema or kind == PADDLE, source=f"'{path}'")
    averaged = bool(set(where.split('.')) & set(EMA_KEYS))
    return Weights(path, arrays, find_metadata(content, where, f"'{path}'"), averaged, kind)


def load_pretrained(
    model: nn.Layer, path: str | Weights, log: Callable[[str], None] = print, replace_head: bool = True
) -> None:
    """Load a weight file into a model, see `read_weights`.

    Args:
        model: not wrapped by DataParallel.
        path: the file, with or without .pdparams, or a run folder; or what `read_weights` returned.
        log: called with each line of the report.
        replace_head: for training: keep the initial classifier if the number of classes differs, and apply
            `WeightRules.start`. False, for evaluation: these differences are errors.

    Raises:
        UserError: see `read_weights`; or weights that do not fit, which leave the model unchanged.
    """
    weights = path if isinstance(path, Weights) else read_weights(path)
    averaged = ' (averaged weights, model_ema)' if weights.averaged else ''
    log(f'----- Pretrained: Load model state from {weights.path}{averaged}')
    load_state(model, {**weights.arrays, METADATA: weights.metadata}, weights.source, log, replace_head)


def load_frozen(model: nn.Layer, path: str, log: Callable[[str], None] = print) -> None:
    """Load and freeze a teacher: all weights of a .pdparams file or run folder, or of a published file, which is converted.

    The model is set to evaluation mode without gradients. Its number of classes becomes that of the file. Raises as
    `load_pretrained` does.
    """
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


def load_state(
    model: nn.Layer,
    arrays: Mapping[str, np.ndarray],
    source: str = 'the state dict',
    log: Callable[[str], None] = print,
    replace_head: bool = True,
) -> dict[str, np.ndarray]:
    """Set all weights of a model from arrays under its names; see `load_pretrained`.

    All checks run before the first weight changes. Returns the arrays in the model's shapes, floats in float32.
    """
    rules, targets = rules_of(model), model.state_dict()
    arrays = rules.adopt(model, arrays)
    metadata = arrays.get(METADATA, {})
    _check_metadata(rules.metadata(model), metadata, source)
    arrays = {name: array for name, array in arrays.items() if not name.endswith((*REBUILT_SUFFIXES, METADATA))}
    ours, theirs = rules.count_classes(targets), rules.count_classes(arrays)
    replaced = ours != theirs and None not in (ours, theirs)
    if replaced and not replace_head:
        remedy = f'set MODEL.NUM_CLASSES to {theirs}' if theirs else 'use weights that were trained with one'
        raise UserError(f'{source} has {_classifier(theirs)}, but the model {_classifier(ours)}; {remedy}.')
    head = [name for name in targets if replaced and rules.is_head(name)]
    arrays = {name: array for name, array in arrays.items() if not (replaced and rules.is_head(name))}
    start = rules.start(model, arrays) if replace_head else Start()
    arrays = {start.renamed.get(name, name): array for name, array in arrays.items() if name not in start.unused}
    arrays, adapted = adapt_channels(rules, targets, arrays) if replace_head else (arrays, [])
    result = match_state(model, arrays, source, optional=[*head, *start.initial], metadata=metadata)
    result.unused.update(start.unused)
    if ours != theirs:
        ending = ', which is re-initialized' if head else ''
        log(f'----- Pretrained: {source} has {_classifier(theirs)} and the model {_classifier(ours)}{ending}')
    for line in (*adapted, *_report(result, start, targets, source)):
        log(f'----- Pretrained: {line}')
    values = {name: paddle.to_tensor(array).astype(targets[name].dtype) for name, array in result.state.items()}
    model.set_state_dict({**targets, **values})
    return result.state


def _report(result: MatchResult, start: Start, targets: Mapping[str, paddle.Tensor], source: str) -> Iterator[str]:
    """Yield log lines with the differences between file and model."""
    if start.unused or start.initial:
        yield f'{len(result.state)} arrays of {source} are used'
    for reason in dict.fromkeys(start.initial.values()):
        names = [name for name in start.initial if start.initial[name] == reason]
        yield f'{len(names)} arrays of the model keep their initial values, {reason}: {", ".join(names[:LISTED])}'
    if result.unused:
        reasons = '; '.join(dict.fromkeys(result.unused.values()))
        yield f'{len(result.unused)} arrays of {source} are not used: {reasons}'
    for name in result.kept:
        if targets[name].is_floating_point():
            yield f'{source} has no {name}; the model keeps {targets[name].tolist()}'
    for name, (old, new) in result.resized.items():
        yield f'{name} interpolated from {list(old)} to {list(new)}'


def _check_metadata(ours: Mapping, theirs: Mapping, source: str) -> None:
    for key in ours.keys() - {GRID}:
        value = theirs.get(key, ours[key])
        if not _is_setting(value) or value != ours[key]:
            shown = printable(value, NAME) if _is_setting(value) else f'a {type(value).__name__}'
            raise UserError(
                f'{source} was trained with {key} {shown}, but the model has {ours[key]} (shapes do not show this); '
                f'set {key} to {shown}.'
            )


def _is_setting(value: Any, depth: int = 2) -> bool:
    """Return True for a number, a short text, or a short list of them: other values of a file may take forever to print."""
    if isinstance(value, (list, tuple)):
        return depth > 0 and len(value) <= MAX_LIST and all(_is_setting(entry, depth - 1) for entry in value)
    return isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= NAME)


def _classifier(classes: int) -> str:
    return f'a classifier of {classes} classes' if classes else 'no classifier'
