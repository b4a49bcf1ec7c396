# SPDX-License-Identifier: Apache-2.0
"""Reader and writer of Paddle's files (.pdparams, .pdopt) without Paddle."""

from __future__ import annotations

import os
import pickle
from typing import IO, Any

import numpy as np

from utils.files import atomic_write
from utils.formats import checksums
from utils.formats.limits import check_key, check_shape
from utils.formats.pickles import PickleReader, mapped


def read(file: IO[bytes], size: int) -> Any:
    """Read a file of `paddle.save`; `size`: of the file in bytes."""
    with mapped(file) as stream:
        content = PickleReader().load(stream)
        checksums.verify(stream, content)
    if isinstance(content, dict):
        content.pop('StructuredToParameterName@@', None)  # automatic names, valid in the writing process only
        _join_slices(content)
    return _without_names(content, {})


def _join_slices(state: dict) -> None:
    """Join arrays larger than 1 GiB, which `paddle.save` splits into several entries under pickle protocols 2 and 3."""
    for name, parts in state.pop('UnpackBigParamInfor@@', {}).items():
        slices = [state.pop(check_key(part)) for part in parts['slices']]
        if not all(isinstance(part, np.ndarray) and part.ndim == 1 for part in slices):
            raise ValueError('slices that are no arrays')
        state[name] = np.concatenate(slices).reshape(check_shape(tuple(parts['OriginShape'])))


def _without_names(value: Any, seen: dict[int, Any]) -> Any:
    """Replace (automatic name, array), Paddle's form of a nested tensor, by the array. `seen`: visited containers."""
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


# ---------------------------------------------------------------------------------------------------- writing
def write_pdparams(state: dict, path: str) -> None:
    """Write a (nested) dict of arrays, numbers, text and lists for `paddle.load` and `read_file`.

    The write is atomic. Paddle tensors are stored as arrays.

    Raises:
        TypeError: a value that `read_file` would refuse; nothing is written.
        UserError: a full or read-only disk.
    """
    plain = _plain(state, os.path.basename(path))
    with atomic_write(path) as file:
        summed = checksums.SummedFile(file)
        pickle.dump(plain, summed, protocol=4)
        file.write(checksums.trailer(plain, summed.checksum))


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
