# SPDX-License-Identifier: Apache-2.0
"""Readers of arrays by name: .safetensors and .npz."""

from __future__ import annotations

import zipfile
from typing import IO

import numpy as np
import safetensors

from utils.formats import bfloat16
from utils.formats.pickles import RefusedError

# Limit of the compression ratio of .npz, against decompression bombs. Only arrays of zeros exceed it.
MAX_COMPRESSION = 100
FREE_COMPRESSION = 64 << 20  # unpacked bytes that are always allowed

_SAFETENSORS_TYPES = {
    'F64': 'f8', 'F32': 'f4', 'F16': 'f2', 'BF16': 'u2', 'I64': 'i8', 'U64': 'u8', 'I32': 'i4', 'U32': 'u4', 'I16': 'i2',
    'U16': 'u2', 'I8': 'i1', 'U8': 'u1', 'BOOL': '?', 'C64': 'c8',
}  # fmt: skip


def read_safetensors(file: IO[bytes], size: int) -> dict[str, np.ndarray]:
    """Read a .safetensors file; `size`: of the file in bytes.

    The library checks header, names and offsets. Its numpy API lacks bfloat16, so the bytes are decoded here.
    """
    file.seek(0)
    arrays = {}
    for name, tensor in safetensors.deserialize(file.read()):
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
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
