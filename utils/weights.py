# SPDX-License-Identifier: Apache-2.0
"""Find weights: the file that a path names, and the state dict inside a checkpoint."""

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

PUBLISHED = 'auto:'  # -pretrained=auto:NAME, the published weights of a configuration
SUFFIX = '.pdparams'
OTHER_SUFFIXES = ('.pdparams', '.pth', '.pt', '.pth.tar', '.bin', '.ckpt', '.safetensors', '.npz')
RUN_FILES = ('best.pdparams', 'last.pdparams')

WEIGHT_KEYS = ('state_dict', 'model', 'net', 'module', 'model_state_dict', 'params', 'weights')
EMA_KEYS = ('model_ema', 'state_dict_ema', 'ema_state_dict', 'params_ema', 'ema')
# Key of the metadata beside the weights: configuration key -> value, for what shapes do not show (number of heads).
METADATA = 'Facts@@'
WRAPPER_PREFIXES = ('module.', '_layers.', 'model.', 'backbone.', 'encoder.')
MAX_WRAPPERS = 8  # prefixes that are removed, one after the other; four are known to come together
COMPILED = '_orig_mod.'  # torch.compile inserts it before the names of a compiled module
COUNTER = 'n_averaged'  # torch.optim.swa_utils.AveragedModel stores it beside the averaged weights


# ---------------------------------------------------------------------------------------------------- unwrapping
def state_dicts(content: Any, where: str = '', depth: int = 4) -> dict[str, dict[str, np.ndarray]]:
    """Return every state dict (name -> array) of a checkpoint by its dotted key; '' if the file itself is one."""
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
    """Remove prefixes that data parallelism, torch.compile and weight averaging put before every parameter name."""
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
    """Return the state dict of a checkpoint that `read_file` returned.

    Args:
        content: a state dict, or a dict with one under a key of WEIGHT_KEYS and optionally averaged weights under a key
            of EMA_KEYS, both possibly nested. Prefixes of WRAPPER_PREFIXES and COMPILED are removed from the names.
        prefer_ema: take the averaged weights if there are any. They are also taken if there are no other weights.
        source: name of the content in error messages.

    Raises:
        UserError: there is no state dict, or more than one candidate.
    """
    return choose_state_dict(content, prefer_ema, source)[1]


def choose_state_dict(
    content: Any, prefer_ema: bool = False, source: str = 'the file'
) -> tuple[str, dict[str, np.ndarray]]:
    """Return the dotted key of the state dict, and the state dict itself; see `find_state_dict`."""
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
    """Return the METADATA beside the state dict at the dotted key `where`, or at a level above it."""
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
    """Return the weight file that `path` names: `path`, `path`.pdparams, or the best, else last, weights of a run folder.

    Raises:
        UserError: no such file; the text lists the paths that were tried and similar files in the folder.
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
    """Return the files with the most similar names, case-insensitively."""
    lower = {file.lower(): file for file in files}
    return [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.3)]
