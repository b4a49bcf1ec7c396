# SPDX-License-Identifier: Apache-2.0
"""Readers of arrays by name: .safetensors and .npz."""

from __future__ import annotations

import math
import zipfile
from typing import IO

import numpy as np
import safetensors

from utils.formats import bfloat16
from utils.formats.limits import RefusedError, check_key, check_shape

# Limit of the compression ratio of .npz, against decompression bombs. Only arrays of zeros exceed it.
MAX_COMPRESSION = 100
FREE_COMPRESSION = 64 << 20  # unpacked bytes that are always allowed
_LENGTH = 8  # bytes of the length of a safetensors header
MAX_HEADER = 16 << 20  # bytes; 100 for each of the 1000 arrays of a large model

_SAFETENSORS_TYPES = {
    'F64': 'f8', 'F32': 'f4', 'F16': 'f2', 'BF16': 'u2', 'I64': 'i8', 'U64': 'u8', 'I32': 'i4', 'U32': 'u4', 'I16': 'i2',
    'U16': 'u2', 'I8': 'i1', 'U8': 'u1', 'BOOL': '?', 'C64': 'c8',
}  # fmt: skip


def read_safetensors(file: IO[bytes], size: int) -> dict[str, np.ndarray]:
    """Read a .safetensors file; `size`: of the file in bytes.

    The library checks header, names and offsets. Its numpy API lacks bfloat16, so the bytes are decoded here.
    """
    file.seek(0)
    header = int.from_bytes(file.read(_LENGTH), 'little')
    if not 0 < header <= min(size - _LENGTH, MAX_HEADER):  # before all of the file is read
        raise ValueError(f'a header of {header} bytes')
    file.seek(0)
    arrays = {}
    for name, tensor in safetensors.deserialize(file.read()):
        check_key(name), check_shape(tuple(tensor['shape']))
        if tensor['dtype'] not in _SAFETENSORS_TYPES:
            raise RefusedError(f"it holds '{name}' as {tensor['dtype']}, which numpy cannot; store it as float32")
        numbers = np.frombuffer(tensor['data'], '<' + _SAFETENSORS_TYPES[tensor['dtype']]).reshape(tensor['shape'])
        arrays[name] = bfloat16.to_float32(numbers) if tensor['dtype'] == 'BF16' else numbers
    return arrays


def read_npz(file: IO[bytes], size: int) -> dict[str, np.ndarray]:
    """Read the arrays of `numpy.savez` by name; `size`: of the file in bytes."""
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > FREE_COMPRESSION + MAX_COMPRESSION * size:
            raise RefusedError(f'it is compressed more than {MAX_COMPRESSION} times, as no weights are')
        for member in archive.infolist():
            check_key(member.filename)
            with archive.open(member) as stream:
                check_header(stream, member.file_size)
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def check_header(stream: IO[bytes], size: int) -> None:
    """Check that an array of a .npz holds numbers, and no more than `size` bytes: numpy would allocate what it announces."""
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = reader[np.lib.format.read_magic(stream)](stream)
    if dtype.kind not in 'biufc':
        raise RefusedError('it holds an array of something else than numbers')
    if math.prod(check_shape(shape)) * dtype.itemsize > size:
        raise ValueError('an array larger than its file')
