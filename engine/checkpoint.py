# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the whole state of a run in one file, under names that do not depend on the process that wrote it.

last.pdparams        the full training state; a resumed run continues exactly
epoch_NNNN.pdparams  the same, every SAVE_FREQ epochs
best.pdparams        flat weights of the best evaluation, for `paddle.load` + `set_state_dict`
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable

import numpy as np
import paddle

from engine.paddle_private import accumulators, create_accumulators
from utils.errors import UserError
from utils.files import link_or_copy, writing
from utils.formats import PADDLE, file_format, read_file, write_pdparams
from utils.run_paths import follow_latest

LAST = 'last.pdparams'
BEST = 'best.pdparams'


# ---------------------------------------------------------------------------------------------------- writing
def to_arrays(state: dict) -> dict:
    """Convert the tensors of a (nested) state dict to numpy arrays; half precision becomes float32 without loss."""
    return {key: _to_array(value) for key, value in state.items()}


def _to_array(value):
    if isinstance(value, dict):
        return to_arrays(value)
    if isinstance(value, paddle.Tensor):
        half = value.dtype in (paddle.float16, paddle.bfloat16)
        return (value.astype('float32') if half else value).numpy()
    return value


def save_last(folder: str, state: dict) -> None:
    """Write last.pdparams atomically."""
    write_pdparams(to_arrays(state), os.path.join(folder, LAST))


def save_epoch(folder: str, epoch: int, keep: int) -> str:
    """Hard-link last.pdparams to epoch_NNNN.pdparams and delete all but the newest `keep` (0: keep all)."""
    path = os.path.join(folder, f'epoch_{epoch:04d}.pdparams')
    with writing(path):  # last.pdparams is replaced, never modified, so the link keeps this content
        link_or_copy(os.path.join(folder, LAST), path)
    for old in epoch_files(folder)[:-keep] if keep else []:
        os.unlink(old)
    return path


def epoch_files(folder: str) -> list[str]:
    """Return the periodic checkpoints of a run, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), 'epoch_[0-9]*.pdparams')))


def save_best(folder: str, weights: dict) -> None:
    """Write best.pdparams."""
    write_pdparams(to_arrays(weights), os.path.join(folder, BEST))


# ---------------------------------------------------------------------------------------------------- reading
def checkpoint_files(path: str) -> list[str]:
    """Return the file that `-resume` names, or the checkpoints of the run folder, in the order in which they are tried.

    Raises:
        UserError: there is none.
    """
    path = follow_latest(path)
    if not os.path.isdir(path):
        file = path if os.path.isfile(path) else f'{path}.pdparams'
        if not os.path.isfile(file):
            raise UserError(
                f"-resume: there is neither '{path}' nor '{file}' in '{os.getcwd()}'; name a run folder or a checkpoint."
            )
        return [file]
    candidates = [os.path.join(path, LAST), *reversed(epoch_files(path))]
    candidates = [file for file in candidates if os.path.isfile(file)]
    if not candidates:
        raise UserError(f"-resume: the folder '{path}' holds no {LAST}; the run was ended before its first save.")
    return candidates


def read_checkpoint(path: str, log: Callable[[str], None]) -> tuple[str, dict]:
    """Read the checkpoint that `-resume` names.

    Args:
        path: a run folder, or a file with or without `.pdparams`. In a folder, a damaged last.pdparams falls back to the
            newest periodic checkpoint.

    Returns:
        The path of the file and its content: a checkpoint of this suite or of PaddleViT, or flat weights. A `.pdopt` file
        beside PaddleViT weights becomes the entry `optimizer`.
    """
    candidates = checkpoint_files(path)
    if not os.path.isdir(follow_latest(path)):
        return candidates[0], _with_pdopt(candidates[0], _as_dict(candidates[0]))
    for file in candidates[:-1]:
        try:
            return file, _as_dict(file)
        except UserError as error:
            log(f'----- Resume: {error} Trying the previous checkpoint.')
    return candidates[-1], _as_dict(candidates[-1])


def _as_dict(path: str) -> dict:
    kind = file_format(path)
    if kind != PADDLE:
        raise UserError(
            f"-resume: '{path}' is a {kind} file, which holds no training state of this suite; convert it with "
            'tools/port_weights.py and start from the result with -pretrained.'
        )
    content = read_file(path)
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds a {type(content).__name__}, not a checkpoint.")
    return content


def _with_pdopt(path: str, content: dict) -> dict:
    optimizer = f'{os.path.splitext(path)[0]}.pdopt'
    if 'model' in content or not os.path.isfile(optimizer):
        return content
    return {'model': content, 'optimizer': _as_dict(optimizer)}


# ---------------------------------------------------------------------------------------------------- optimizer state
def optimizer_state(optimizer: paddle.optimizer.Optimizer, model: paddle.nn.Layer) -> dict[str, dict]:
    """Return the optimizer state, such as moments, as {kind: {structured parameter name: tensor}}.

    Paddle uses automatic names such as `linear_3.w_0`, which depend on how many layers the process has built before.
    """
    names = {parameter.name: name for name, parameter in model.named_parameters()}
    return {kind: _by_name(entries, names) for kind, entries in accumulators(optimizer).items()}


def _by_name(entries: dict, names: dict[str, str]) -> dict:
    return {names[key]: tensor for key, tensor in entries.items() if key in names}


def set_optimizer_state(optimizer: paddle.optimizer.Optimizer, model: paddle.nn.Layer, state: dict[str, dict]) -> None:
    """Load the state of `optimizer_state` into a new optimizer. Raises UserError if it does not fit the model."""
    names = {parameter.name: name for name, parameter in model.named_parameters()}
    known = set().union(*state.values()) if state else set()
    unknown = sorted(known - set(names.values()))
    if unknown:
        raise UserError(f"the checkpoint's optimizer state names parameters the model lacks: {', '.join(unknown[:8])}.")
    create_accumulators(optimizer, lambda parameter: names[parameter.name] in known)
    present = accumulators(optimizer)
    for kind, entries in state.items():
        targets = _by_name(present.get(kind, {}), names)
        if not entries.keys() <= targets.keys():
            raise UserError(
                f"the checkpoint's optimizer state holds {kind}, which {type(optimizer).__name__} does not have here; set "
                'TRAIN.OPTIMIZER as in the run that wrote it.'
            )
        for name, value in entries.items():
            if tuple(targets[name].shape) != tuple(np.shape(value)):
                raise UserError(
                    f"the checkpoint's {kind} of {name} has shape {np.shape(value)}, not {targets[name].shape}."
                )
            value = np.asarray(value).astype('float32')  # from any precision and byte order; Paddle takes only a few
            # AdamW keeps the powers of its betas on the CPU, also on a machine with a GPU.
            targets[name].set_value(paddle.to_tensor(value, targets[name].dtype, place=targets[name].place))


_AUTOMATIC = re.compile(r'^(?P<parameter>(?P<layer>.+)_(?P<number>\d+)\.(?P<slot>[wb]_\d+))(_(?P<kind>.+)_\d+)?$')


def from_automatic_names(state: dict, model: paddle.nn.Layer) -> dict[str, dict] | None:
    """Convert the optimizer state of a PaddleViT file from automatic names to this model's structured names.

    Automatic names number the layers of one kind in the order of their construction, in both processes. So the n-th layer
    of each kind is the same, provided that counts and shapes agree.

    Returns:
        Input of `set_optimizer_state`, or None if the layers cannot be matched.
    """
    entries = {key: _AUTOMATIC.match(key) for key in state if not key.startswith(('LR_Scheduler', 'master_weights'))}
    if not entries or not all(match and match['kind'] for match in entries.values()):
        return None
    parameters = {parameter.name: (name, parameter) for name, parameter in model.named_parameters()}
    ours, theirs = _in_order(parameters), _in_order({match['parameter'] for match in entries.values()})
    if {kind: len(names) for kind, names in ours.items()} != {kind: len(names) for kind, names in theirs.items()}:
        return None
    renamed = {old: parameters[new] for kind in ours for old, new in zip(theirs[kind], ours[kind])}
    result: dict[str, dict] = {}
    for key, match in entries.items():
        name, parameter = renamed[match['parameter']]
        value = np.asarray(state[key])
        wanted = (1,) if '_pow_acc' in match['kind'] else tuple(parameter.shape)
        if value.dtype.kind != 'f' or value.shape != wanted:
            return None
        result.setdefault(match['kind'], {})[name] = value
    return result


def _in_order(names) -> dict[tuple[str, str], list[str]]:
    """Group automatic parameter names by (kind of layer, weight or bias), in the order of construction."""
    groups: dict[tuple[str, str], list] = {}
    for name in names:
        match = _AUTOMATIC.match(name)
        groups.setdefault((match['layer'], match['slot']), []).append((int(match['number']), name))
    return {kind: [name for _, name in sorted(entries)] for kind, entries in groups.items()}
