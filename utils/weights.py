# SPDX-License-Identifier: Apache-2.0
"""Weights in a file: which file a path means, and which state dict of a checkpoint."""

from __future__ import annotations

import difflib
import os
from typing import Any

import numpy as np

from utils.environment import expand_user
from utils.errors import UserError
from utils.formats import read_file, write_pdparams
from utils.run_paths import follow_latest
from utils.text import printable

__all__ = [
    'METADATA',
    'SUFFIX',
    'choose_state_dict',
    'find_metadata',
    'find_state_dict',
    'read_file',
    'resolve_weights_path',
    'state_dicts',
    'write_pdparams',
]

SUFFIX = '.pdparams'
OTHER_SUFFIXES = ('.pdparams', '.pth', '.pt', '.pth.tar', '.bin', '.ckpt', '.safetensors', '.npz')
RUN_FILES = ('best.pdparams', 'last.pdparams')

WEIGHT_KEYS = ('state_dict', 'model', 'net', 'module', 'model_state_dict', 'params', 'weights')
EMA_KEYS = ('model_ema', 'state_dict_ema', 'ema_state_dict', 'params_ema', 'ema')
# Key of what shapes do not show, such as the number of heads: configuration key -> value, beside the weights.
METADATA = 'Facts@@'
WRAPPER_PREFIXES = ('module.', '_layers.', 'model.', 'backbone.', 'encoder.')
MAX_WRAPPERS = 8  # prefixes that are removed, one after the other; four are known to come together
COMPILED = '_orig_mod.'  # torch.compile: before the names of what was compiled, also inside a name
COUNTER = 'n_averaged'  # torch.optim.swa_utils.AveragedModel: beside the averaged weights


# ---------------------------------------------------------------------------------------------------- unwrapping
def state_dicts(content: Any, where: str = '', depth: int = 4) -> dict[str, dict[str, np.ndarray]]:
    """Every state dict (name -> array) of a checkpoint, by the key it stands under; '' where the file itself is one."""
    if not isinstance(content, dict) or not depth:
        return {}
    content = {key: value for key, value in content.items() if key != METADATA}
    if content and all(_is_weight(name, value) for name, value in content.items()):
        return {where: _without_prefix({name: np.asarray(array) for name, array in content.items()})}
    found = {}
    for key in (*WEIGHT_KEYS, *EMA_KEYS):
        found.update(state_dicts(content.get(key), f'{where}.{key}'.lstrip('.'), depth - 1))
    return found


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and isinstance(value, (np.ndarray, np.number))


def _without_prefix(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Wrappers such as those of data parallelism, torch.compile and averaging put their own name before every parameter."""
    plain = {name.replace(COMPILED, ''): array for name, array in state.items()}
    if len(plain) < len(state):
        return state
    for _ in range(MAX_WRAPPERS):
        names = [name for name in plain if name != COUNTER]
        prefix = next((prefix for prefix in WRAPPER_PREFIXES if names and _all_have(names, prefix)), None)
        if prefix is None:
            break
        plain = {name[len(prefix) :]: plain[name] for name in names}
    return plain


def _all_have(names: list[str], prefix: str) -> bool:
    return all(name.startswith(prefix) and name != prefix for name in names)


def find_state_dict(content: Any, prefer_ema: bool = False, source: str = 'the file') -> dict[str, np.ndarray]:
    """The one state dict of a checkpoint as `read_file` gives it.

    Args:
        content: a state dict, or a dict that holds one under a name of WEIGHT_KEYS, and perhaps averaged weights under
            one of EMA_KEYS, both perhaps nested; WRAPPER_PREFIXES before all names are removed, and COMPILED in any.
        prefer_ema: take the averaged weights where there are any; they are taken anyway where there are no others.
        source: what to call the content in an error.

    Raises:
        UserError: no state dict, or several that may be meant.
    """
    return choose_state_dict(content, prefer_ema, source)[1]


def choose_state_dict(
    content: Any, prefer_ema: bool = False, source: str = 'the file'
) -> tuple[str, dict[str, np.ndarray]]:
    """`find_state_dict`, preceded by the key that the state dict stands under."""
    found = state_dicts(content)
    averaged = {where: state for where, state in found.items() if set(where.split('.')) & set(EMA_KEYS)}
    current = {where: state for where, state in found.items() if where not in averaged}
    first, second = (averaged, current) if prefer_ema else (current, averaged)
    chosen = first or second
    if len(chosen) > 1:
        listing = ', '.join(f"'{where}' ({len(state)} arrays)" for where, state in chosen.items())
        raise UserError(f'{source} holds several sets of weights and it is not clear which is meant: {listing}.')
    if not chosen:
        raise UserError(f'{source} holds no weights (name -> array), but {_describe(content)}.')
    return next(iter(chosen.items()))


def find_metadata(content: Any, where: str, source: str) -> dict:
    """The METADATA beside the state dict under the key `where` of a checkpoint, or beside what holds it."""
    for key in ['', *filter(None, where.split('.'))]:
        content = content[key] if key else content
        if content.get(METADATA) is not None:
            if not isinstance(content[METADATA], dict):
                raise UserError(
                    f"{source} holds a {type(content[METADATA]).__name__} as '{METADATA}', which must be a dict."
                )
            return content[METADATA]
    return {}


def _describe(content: Any) -> str:
    if not isinstance(content, dict):
        return f'one {type(content).__name__}'
    entries = [f'{printable(repr(key), 60)} ({type(value).__name__})' for key, value in list(content.items())[:12]]
    return f'{", ".join(entries) or "nothing"}{", ..." if len(content) > 12 else ""}'


# ---------------------------------------------------------------------------------------------------- finding
def resolve_weights_path(path: str) -> str:
    """The file that `path` means: itself, with `.pdparams` added, or the best (else last) weights of a run folder.

    Raises:
        UserError: no such file; the text says what was tried and which files lie near.
    """
    path = follow_latest(expand_user(path))
    if os.path.isdir(path) and not os.path.isfile(path + SUFFIX):
        tried = [os.path.join(path, name) for name in RUN_FILES]
        folder = path
    else:
        tried = [path, path + SUFFIX] if not path.endswith(SUFFIX) else [path]
        folder = os.path.dirname(path) or '.'
    for candidate in tried:
        if os.path.isfile(candidate):
            return candidate
    names = ' nor '.join(f"'{candidate}'" for candidate in tried)
    raise UserError(f'no weights: there is {"neither " if len(tried) > 1 else "no "}{names}; {_near(folder, path)}.')


def _near(folder: str, path: str) -> str:
    if not os.path.isdir(folder):
        return f"the folder '{folder}' does not exist"
    files = sorted(os.listdir(folder))
    ours = [name for name in files if name.endswith(SUFFIX)]
    others = [name for name in files if name.lower().endswith(OTHER_SUFFIXES)]
    near = _alike(os.path.basename(path), [*ours, *others]) or ours[:5] or others[:5]
    return f"'{folder}' holds {', '.join(near)}" if near else f"'{folder}' holds no {SUFFIX} file"


def _alike(name: str, files: list[str]) -> list[str]:
    """The files whose names are nearest to `name`, whatever the case of their letters."""
    lower = {file.lower(): file for file in files}
    return [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.3)]
