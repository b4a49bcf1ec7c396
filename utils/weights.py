# SPDX-License-Identifier: Apache-2.0
"""Weight files: every format users bring, read without running anything in them, and the one format written."""

from __future__ import annotations

import contextlib
import difflib
import mmap
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import safetensors

from utils import bfloat16, torch_files
from utils.environment import expand_user
from utils.errors import UserError
from utils.files import atomic_write
from utils.foreign_files import foreign_kind
from utils.pickles import PickleReader, RefusedError
from utils.run_paths import follow_latest

SUFFIX = '.pdparams'
OTHER_SUFFIXES = ('.pdparams', '.pth', '.pt', '.pth.tar', '.bin', '.ckpt', '.safetensors', '.npz')
RUN_FILES = ('best.pdparams', 'last.pdparams')

PADDLE, TORCH, OLD_TORCH = 'PaddlePaddle', 'PyTorch', 'PyTorch (before 1.6)'
SAFETENSORS, NPZ = 'safetensors', 'npz'

WEIGHT_KEYS = ('state_dict', 'model', 'net', 'module', 'model_state_dict', 'params', 'weights')
EMA_KEYS = ('model_ema', 'state_dict_ema', 'ema_state_dict', 'params_ema', 'ema')
# Key of what shapes do not show, such as the number of heads: configuration key -> value, beside the weights.
METADATA = 'Facts@@'
WRAPPER_PREFIXES = ('module.', '_layers.', 'model.', 'backbone.', 'encoder.')
COMPILED = '_orig_mod.'  # torch.compile: before the names of what was compiled, also inside a name
COUNTER = 'n_averaged'  # torch.optim.swa_utils.AveragedModel: beside the averaged weights

# An archive of numpy arrays may be compressed: by no more than this, which arrays of zeros alone exceed.
MAX_COMPRESSION = 100
FREE_COMPRESSION = 64 << 20  # bytes that are never too many


# ---------------------------------------------------------------------------------------------------- reading
def read_file(path: str) -> Any:
    """Reads a weight file or checkpoint as plain data: containers, numbers, text and numpy arrays.

    The content decides what it is: .pdparams/.pdopt of Paddle, what torch.save wrote (any version, PyTorch is not
    needed), .safetensors, or .npz. bfloat16 becomes float32, but stays uint16 bits in Paddle's files, as Paddle has it.

    Raises:
        UserError: a file that cannot be read, is damaged, or asks for more than data; the text names it.
    """
    with _errors_of(path), open(path, 'rb') as file:
        return _READERS[_format_of(file, path)](file, os.path.getsize(path))


def file_format(path: str) -> str:
    """PADDLE, TORCH, OLD_TORCH, SAFETENSORS or NPZ: what the content says. Raises UserError as `read_file` does."""
    with _errors_of(path), open(path, 'rb') as file:
        return _format_of(file, path)


def _format_of(file: IO[bytes], path: str) -> str:
    foreign = foreign_kind(file, path)
    if foreign:
        raise UserError(f"'{path}' is damaged, cut short, or not a weight file: it is {foreign[0]}; {foreign[1]}.")
    file.seek(0)
    head, size = file.read(64), os.path.getsize(path)
    if head.startswith(b'PK'):
        with zipfile.ZipFile(file) as archive:
            return TORCH if any(map(torch_files.is_object, archive.namelist())) else NPZ
    if str(path).endswith('.safetensors') or (head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= size):
        return SAFETENSORS
    return OLD_TORCH if torch_files.LEGACY_MAGIC.to_bytes(10, 'little') in head[:32] else PADDLE


@contextlib.contextmanager
def _errors_of(path: str):
    """Turns what can go wrong with the file into one sentence; a damaged file can fail in any way whatever."""
    try:
        yield
    except UserError:
        raise
    except RefusedError as error:
        raise UserError(f"'{path}' is refused: {_one_line(error)}.") from None
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}.") from None
    except Exception as error:
        raise UserError(f"'{path}' is damaged, cut short, or not a weight file: {_one_line(error)}.") from None


def _one_line(error: Exception) -> str:
    """What an error says, which may quote the file: short, and without the power to move a terminal's cursor."""
    text = ' '.join(str(error).split())[:160].rstrip('.')
    return ''.join(c if c.isprintable() else '?' for c in text) or type(error).__name__


def _mapped(file: IO[bytes]) -> mmap.mmap:
    """The whole file as a stream, of which a read never asks for more memory than there is left in the file."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_paddle(file: IO[bytes], size: int) -> Any:
    with _mapped(file) as stream:
        content = PickleReader().load(stream)
    if isinstance(content, dict):
        content.pop('StructuredToParameterName@@', None)  # automatic names, which mean nothing in another process
        _join_slices(content)
    return _without_names(content, {})


def _join_slices(state: dict) -> None:
    """Protocols 2 and 3 cut arrays beyond 1 GiB into several entries."""
    for name, parts in state.pop('UnpackBigParamInfor@@', {}).items():
        state[name] = np.concatenate([state[part] for part in parts['slices']]).reshape(parts['OriginShape'])
        for part in parts['slices']:
            del state[part]


def _without_names(value: Any, seen: dict[int, Any]) -> Any:
    """Inside nested objects Paddle writes a tensor as (automatic name, array). `seen`: containers already visited."""
    if id(value) in seen or not isinstance(value, (dict, list, tuple)):
        return seen.get(id(value), value)
    if isinstance(value, tuple):
        named = len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], np.ndarray)
        seen[id(value)] = value[1] if named else tuple([_without_names(item, seen) for item in value])
        return seen[id(value)]
    seen[id(value)] = value
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        value[key] = _without_names(value[key], seen)
    return value


def _read_old_torch(file: IO[bytes], size: int) -> Any:
    with _mapped(file) as stream:
        return torch_files.read_legacy(stream, size)


_SAFETENSORS_TYPES = {
    'F64': 'f8', 'F32': 'f4', 'F16': 'f2', 'BF16': 'u2', 'I64': 'i8', 'U64': 'u8', 'I32': 'i4', 'U32': 'u4', 'I16': 'i2',
    'U16': 'u2', 'I8': 'i1', 'U8': 'u1', 'BOOL': '?', 'C64': 'c8',
}  # fmt: skip


def _read_safetensors(file: IO[bytes], size: int) -> dict[str, np.ndarray]:
    """The library checks header, names and offsets; its numpy front end does not know bfloat16."""
    file.seek(0)
    arrays = {}
    for name, tensor in safetensors.deserialize(file.read()):
        if tensor['dtype'] not in _SAFETENSORS_TYPES:
            raise RefusedError(f"it holds '{name}' as {tensor['dtype']}, which numpy cannot; store it as float32")
        numbers = np.frombuffer(tensor['data'], '<' + _SAFETENSORS_TYPES[tensor['dtype']]).reshape(tensor['shape'])
        arrays[name] = bfloat16.to_float32(numbers) if tensor['dtype'] == 'BF16' else numbers
    return arrays


def _read_npz(file: IO[bytes], size: int) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > FREE_COMPRESSION + MAX_COMPRESSION * size:
            raise RefusedError(f'it is compressed more than {MAX_COMPRESSION} times, as no weights are')
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


_READERS: dict[str, Callable[[IO[bytes], int], Any]] = {
    PADDLE: _read_paddle,
    TORCH: torch_files.read_archive,
    OLD_TORCH: _read_old_torch,
    SAFETENSORS: _read_safetensors,
    NPZ: _read_npz,
}


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
    names = [name for name in plain if name != COUNTER]
    for prefix in WRAPPER_PREFIXES:
        if names and all(name.startswith(prefix) and name != prefix for name in names):
            return _without_prefix({name[len(prefix) :]: plain[name] for name in names})
    return plain


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
    entries = [f'{key!r:.60} ({type(value).__name__})' for key, value in list(content.items())[:12]]
    return f'{", ".join(entries) or "nothing"}{", ..." if len(content) > 12 else ""}'


# ---------------------------------------------------------------------------------------------------- writing
def write_pdparams(state: dict, path: str) -> None:
    """Writes a (nested) dict of arrays, numbers, text and lists, so that `paddle.load` and `read_file` take it.

    The file is complete or not there at all. Paddle tensors are stored as arrays.

    Raises:
        TypeError: something that `read_file` would refuse; nothing is written.
        UserError: a full or read-only disk.
    """
    plain = _plain(state, os.path.basename(path))
    with atomic_write(path) as file:
        pickle.dump(plain, file, protocol=4)


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, bytes, bool, int, float)):
        return value
    if isinstance(value, dict):
        return {key: _plain(item, f'{where}: {key}') for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, where) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if hasattr(value, '__array__'):
        array = np.asarray(value, order='C')
        if array.dtype.kind in 'biufc':
            return array
    raise TypeError(f'{where} is a {type(value).__name__}, which is not stored')


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
