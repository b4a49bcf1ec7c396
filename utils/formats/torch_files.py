# SPDX-License-Identifier: Apache-2.0
"""Reader of files of `torch.save` without PyTorch: zip archives of PyTorch 1.6 and later, and the older format.

Both hold a pickle of the saved object and the storages as raw numbers. In the pickle, a tensor is a view (offset, size,
strides) of a numbered storage. Several tensors may share a storage.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from utils.formats import bfloat16
from utils.formats.limits import MAX_KEY, MAX_SIDE, check_shape
from utils.formats.pickles import KNOWN, Inert, PickleReader, RefusedError, mapped

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
BFLOAT16 = 'bfloat16'
# Limit of the elements of a tensor that repeats numbers (stride 0): it takes no memory until it is copied.
MAX_REPEATED = 1 << 24


@dataclass(frozen=True)
class StorageType:
    """Type of a storage, such as `torch.FloatStorage`: the numpy code of its numbers, or BFLOAT16."""

    code: str

    @property
    def stored(self) -> np.dtype:
        """Type of a number in the file, without its byte order."""
        return np.dtype('u2' if self.code == BFLOAT16 else self.code)

    @property
    def loaded(self) -> np.dtype:
        """Type of a number in the array."""
        return np.dtype('f4' if self.code == BFLOAT16 else self.code)


@dataclass(frozen=True)
class Storage:
    """A flat array that tensors are views of."""

    type: StorageType
    array: np.ndarray

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return self.array.size * self.type.stored.itemsize

    def fill(self, raw: bytes, byteorder: str) -> None:
        """Copy the numbers from the bytes of the file."""
        if len(raw) != self.nbytes:
            raise ValueError(f'a storage of {len(raw)} bytes instead of {self.nbytes}')
        numbers = np.frombuffer(raw, self.type.stored.newbyteorder(byteorder))
        self.array[:] = bfloat16.to_float32(numbers) if self.type.code == BFLOAT16 else numbers


def _tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *rest: Any) -> np.ndarray:
    """Build a tensor (`torch._utils._rebuild_tensor`; `_v2` adds requires_grad, hooks and metadata)."""
    if rest[2:] and rest[2]:
        raise RefusedError('it holds a conjugated or negated view of a tensor; store its clone()')
    numbers = (offset, *check_shape(size), *check_shape(stride))
    if len(size) != len(stride) or not isinstance(storage, Storage) or not all(map(_is_count, numbers)):
        raise ValueError('a tensor whose size and strides do not belong together')
    count = math.prod(size)
    if not count:
        return np.empty(size, storage.array.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if last >= storage.array.size or count > max(storage.array.size, MAX_REPEATED):
        raise ValueError(f'a tensor of size {size} beyond its {storage.array.size} stored numbers')
    steps = [step * storage.array.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage.array[offset:], size, steps)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_SIDE


_STORAGES = {
    'Double': 'f8', 'Float': 'f4', 'Half': 'f2', 'BFloat16': BFLOAT16, 'Long': 'i8', 'Int': 'i4', 'Short': 'i2',
    'Char': 'i1', 'Byte': 'u1', 'Bool': '?', 'ComplexFloat': 'c8', 'ComplexDouble': 'c16',
}  # fmt: skip
_DTYPES = (
    'float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'bool', 'complex64',
    'complex128',
)  # fmt: skip

TORCH_KNOWN = {
    **KNOWN,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_parameter': lambda data, requires_grad, hooks: data,
    'torch.Size': lambda items=(): check_shape(tuple(items)),
    'torch.device': Inert,
    **{f'torch.{name}Storage': StorageType(code) for name, code in _STORAGES.items()},
    **{f'torch.{name}': f'torch.{name}' for name in _DTYPES},
}


class _Storages(dict):
    """Storages by key, created when the pickle first refers to them.

    Args:
        limit: bytes that all storages may take together: the size of the file.
        fill: called once with the key and the new storage.
    """

    def __init__(self, limit: int, fill: Callable[[str, Storage], None] = lambda key, storage: None):
        super().__init__()
        self._left = limit
        self._fill = fill

    def refer(self, reference: tuple) -> Storage:
        """Return the storage of a persistent id.

        Args:
            reference: ('storage', type, key, device, count), in old files also (view key, offset, count) or None.
        """
        kind, type_, key, _, count, *view = reference
        if kind != 'storage' or not isinstance(type_, StorageType) or not _is_count(count) or not _is_key(key):
            raise ValueError('a reference that is no storage')
        if key not in self:
            self._left -= count * type_.stored.itemsize
            if self._left < 0:
                raise ValueError('storages larger than the file')
            self[key] = Storage(type_, np.zeros(count, type_.loaded))
            self._fill(key, self[key])
        if not view or view[0] is None:
            return self[key]
        _, offset, length = view[0]
        if not _is_count(offset) or not _is_count(length) or not 0 <= offset <= offset + length <= self[key].array.size:
            raise ValueError('a view beyond its storage')
        return Storage(type_, self[key].array[offset : offset + length])


def _is_key(key: Any) -> bool:
    """Storages are called by numbers, as text. Hashing a nested tuple instead overflows the stack."""
    return isinstance(key, str) and len(key) <= MAX_KEY


def read_archive(stream: IO[bytes], size: int) -> Any:
    """Read the object in a zip archive of `torch.save`; `size`: of the file in bytes."""
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise RefusedError('it is a compressed archive, which torch.save does not write')
        if sum(member.file_size for member in members) > size or len(members) != len(set(archive.namelist())):
            raise ValueError('its members overlap')
        (root,) = (name[: -len('data.pkl')] for name in archive.namelist() if is_object(name))
        byteorder = archive.read(f'{root}byteorder') if f'{root}byteorder' in archive.namelist() else b'little'

        def fill(key: str, storage: Storage) -> None:
            storage.fill(archive.read(f'{root}data/{key}'), {b'little': '<', b'big': '>'}[byteorder])

        reader = PickleReader(TORCH_KNOWN, _Storages(size, fill).refer)
        return reader.load(io.BytesIO(archive.read(f'{root}data.pkl')))


def is_object(name: str) -> bool:
    """Return True if a member of an archive is the pickle of the saved object."""
    return name == 'data.pkl' or (name.endswith('/data.pkl') and name.count('/') == 1)


def read_legacy(file: IO[bytes], size: int) -> Any:
    """Read the object in a file of `torch.save` before PyTorch 1.6; `size`: of the file in bytes."""
    with mapped(file) as stream:
        return _legacy_object(stream, size)


def _legacy_object(stream: IO[bytes], size: int) -> Any:
    """Read the object from a stream: several pickles, then the storages one by one."""
    plain = PickleReader()
    magic, _, _ = plain.load(stream), plain.load(stream), plain.load(stream)  # then protocol and machine
    if magic != LEGACY_MAGIC:
        raise ValueError('a wrong magic number')
    storages = _Storages(size)
    result = PickleReader(TORCH_KNOWN, storages.refer).load(stream)
    keys = plain.load(stream)
    if not isinstance(keys, list) or not all(map(_is_key, keys)) or sorted(keys) != sorted(storages):
        raise ValueError('storages are missing')
    for key in keys:  # tensors are views, so they are complete once their storages are
        storage = storages[key]
        (count,) = struct.unpack('<Q', stream.read(8))
        if count != storage.array.size:
            raise ValueError('a storage of another length than announced')
        storage.fill(stream.read(storage.nbytes), '<')
    return result
