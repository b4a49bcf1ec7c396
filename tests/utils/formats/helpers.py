# SPDX-License-Identifier: Apache-2.0
"""Weight files written byte by byte; PyTorch is not needed to run the tests."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile

import numpy as np

W, B = np.arange(6, dtype='float32').reshape(2, 3), np.array([0.5, -1.5, 2.5], 'float32')

STORAGE = {'0': struct.pack('<4f', 0, 1, 2, 3)}


def write(path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def safetensors_file(header, data: bytes = b'', length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, 'little') + text + data


def entry(begin: int, end: int, shape=(1,), dtype='F32') -> dict:
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


def ops(value) -> bytes:
    """The opcodes that put a plain value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(
    offset=0, size=(2,), stride=(1,), stored=4, key='0', storage='FloatStorage', function='_rebuild_tensor_v2'
) -> bytes:
    """The opcodes of one tensor: a view of a storage of `stored` numbers."""
    reference = b''.join([ops('storage'), b'ctorch\n', storage.encode(), b'\n', *map(ops, (key, 'cpu', stored))])
    arguments = b''.join(map(ops, (offset, size, stride, False, {})))
    return b'ctorch._utils\n' + function.encode() + b'\n((' + reference + b'tQ' + arguments + b'tR'


def archive(
    pickled: bytes, storages=STORAGE, byteorder=b'little', compression=zipfile.ZIP_STORED, root='archive/'
) -> bytes:
    """A file of torch.save around an object's opcodes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compression) as file:
        file.writestr(f'{root}data.pkl', b'\x80\x02' + pickled + b'.')
        if byteorder:
            file.writestr(f'{root}byteorder', byteorder)
        for key, raw in storages.items():
            file.writestr(f'{root}data/{key}', raw)
    return buffer.getvalue()


def torch_file(state: dict[str, np.ndarray], wrapper: str | None = None) -> bytes:
    """torch.save(state) or torch.save({wrapper: state}) of float32 arrays."""
    items, storages = b'}', {}
    for number, (name, array) in enumerate(state.items()):
        strides = tuple(step // 4 for step in np.empty(array.shape, 'float32').strides)
        storages[str(number)] = array.astype('<f4').tobytes()
        items += ops(name) + tensor(0, array.shape, strides, array.size, str(number)) + b's'
    return archive(items if wrapper is None else b'}' + ops(wrapper) + items + b's', storages)
