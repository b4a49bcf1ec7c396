# SPDX-License-Identifier: Apache-2.0
""".safetensors and .npz: content and refusals."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.utils.formats.helpers import B, W, entry, safetensors_file, write
from utils.errors import UserError
from utils.formats import array_files, read_file


def test_safetensors(tmp_path):
    arrays = {
        'w': W,
        'h': W.astype('float16'),
        'i': np.array([[1, -2]]),
        'b': np.array([True, False]),
        's': np.array(2.5),
    }
    path = str(tmp_path / 'model.safetensors')
    save_file(arrays, path, metadata={'format': 'np'})
    content = read_file(path)
    assert {k: (v.dtype, v.shape, v.tolist()) for k, v in content.items()} == {
        k: (v.dtype, v.shape, v.tolist()) for k, v in arrays.items()
    }
    os.rename(path, str(tmp_path / 'model.bin'))
    assert np.array_equal(read_file(str(tmp_path / 'model.bin'))['w'], W)


def test_safetensors_bfloat16_becomes_float32(tmp_path):
    data = safetensors_file({'w': entry(0, 4, (2,), 'BF16')}, b'\x80\x3f\x00\xc0')
    content = read_file(write(tmp_path / 'model.safetensors', data))
    assert content['w'].dtype == np.float32
    assert content['w'].tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    'data',
    [
        safetensors_file(b'{}', length=2**63),
        safetensors_file(b'{}', length=2**64 - 1),
        safetensors_file(b'{"a":'),
        safetensors_file(b'[]'),
        safetensors_file({'a': entry(0, 4), 'b': entry(2, 6)}, bytes(6)),
        safetensors_file({'a': entry(0, 4), 'b': entry(8, 12)}, bytes(12)),
        safetensors_file({'a': entry(0, 4)}, bytes(8)),
        safetensors_file({'a': entry(0, 8, (2,))}, bytes(4)),
        safetensors_file({'a': entry(0, 4, (2,))}, bytes(4)),
        safetensors_file({'a': entry(4, 0)}, bytes(4)),
        safetensors_file({'a': entry(0, 4, (2**40, 2**40))}, bytes(4)),
        safetensors_file({'a': entry(0, 4, (4,), 'F8_E4M3')}, bytes(4)),
        safetensors_file({'a': entry(0, 4, (1,), 'OBJECT')}, bytes(4)),
        b'\x01',
    ],
)
def test_safetensors_that_lie(tmp_path, data):
    with pytest.raises(UserError, match=r"model\.safetensors' is (damaged|refused)"):
        read_file(write(tmp_path / 'model.safetensors', data))


def test_npz(tmp_path):
    path = str(tmp_path / 'model.npz')
    for save in (np.savez, np.savez_compressed):
        save(path, w=W, **{'blocks.0.bias': B})
        content = read_file(path)
        assert np.array_equal(content['w'], W)
        assert np.array_equal(content['blocks.0.bias'], B)


def test_npz_holds_no_objects(tmp_path):
    path = str(tmp_path / 'model.npz')
    np.savez(path, w=np.array([{'a': 1}], dtype=object))
    with pytest.raises(UserError, match=r"model\.npz' is refused: it holds an array of something else than numbers"):
        read_file(path)


def test_npz_bombs(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('w.npy', bytes(array_files.FREE_COMPRESSION * 2))
    with pytest.raises(UserError, match='is refused: it is compressed'):
        read_file(write(tmp_path / 'bomb.npz', buffer.getvalue()))
