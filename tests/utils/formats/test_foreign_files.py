# SPDX-License-Identifier: Apache-2.0
"""What people take for a weight file by mistake is named for what it is."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pytest

from tests.conftest import HERE
from utils.errors import UserError
from utils.formats import file_format, read_file


def zip_of(**members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tar_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'
INDEX = {
    'metadata': {},
    'weight_map': {'a': 'model-00001-of-00002.safetensors', 'b': 'model-00002-of-00002.safetensors'},
}
FOREIGN = {
    'pointer.pth': (POINTER, 'a git-lfs pointer.*git lfs pull'),
    'annex.pth': (b'/annex/objects/SHA256E-s5--4d7a.pth', 'a git-annex pointer.*git annex get'),
    'pointer.safetensors': (POINTER, 'a git-lfs pointer'),
    'page.pdparams': (b'\n <!DOCTYPE html><html>Sign in</html>', 'a web page and not the file itself; download'),
    'page.safetensors': (b'\xef\xbb\xbf<html>', 'a web page'),
    'model.safetensors.index.json': (
        json.dumps(INDEX).encode(),
        r'the index of weights in 2 files \(model-00001-of-00002\.safetensors, .*; join',
    ),
    'error.pdparams': (b'{"error": "Invalid username or password."}', r"a server \('Invalid username or password\.'\)"),
    'list.pth': (b'[1, 2]', 'a JSON document'),
    'exported.json': (b'{"base_code": {"magic": "pir"}, "program": {}}', 'an exported program; give the .pdparams'),
    'exported.pdiparams': (b'\0' * 16 + b'\x04\0\0\0\x08\x05\x10\x03' + bytes(12), 'weights of an exported program'),
    'renamed.pdparams': (b'\0' * 16 + b'\x04\0\0\0\x08\x05\x10\x03' + bytes(12), 'weights of an exported program'),
    'empty.npz': (b'', 'it is empty; copy or download it again'),
    'weights.zip': (zip_of(**{'a/b.pth': b'x', 'readme.txt': b''}), r'a zip archive of other files \(a/b\.pth, readme'),
    'script.pt': (
        zip_of(**{'m/data.pkl': b'', 'm/code/__torch__.py': b''}),
        'a TorchScript program; save the state dict',
    ),
    'keras.keras': (zip_of(**{'model.weights.h5': b'', 'config.json': b''}), 'a Keras model'),
    'none.zip': (zip_of(), 'an empty zip archive'),
    'weights.tar': (tar_of('w.pth'), 'a tar archive; unpack it'),
    'weights.pth.gz': (gzip.compress(b'x'), 'a gzip archive; unpack it'),
    'keras.h5': (b'\x89HDF\r\n\x1a\n' + bytes(9), 'an HDF5 file'),
    'model.onnx': (b'\x08\x08\x12\x07pytorch', 'an ONNX model'),
    'renamed.pth': (b'\x08\x08\x12\x07pytorch', 'an ONNX model'),
    'saved_model.pb': (b'\x08\x01\x12\xb0\xfa', 'a TensorFlow graph'),
    'checkpoint': (b'model_checkpoint_path: "model.ckpt-1"\n', 'the index of TensorFlow checkpoints'),
    'model.ckpt-1.data-00000-of-00001': (bytes(50), 'a part of a TensorFlow checkpoint'),
    'model.ckpt-1.index': (bytes(40) + b'\x57\xfb\x80\x8b\x24\x75\x47\xdb', 'a part of a TensorFlow checkpoint'),
    'array.npy': (npy(), 'a single numpy array'),
    'photo.pth': (b'\x89PNG\r\n\x1a\n', 'a picture'),
}


@pytest.mark.parametrize('name', FOREIGN)
def test_what_a_file_is_and_what_to_do(tmp_path, name):
    data, words = FOREIGN[name]
    path = tmp_path / name
    path.write_bytes(data)
    for function in (read_file, file_format):
        with pytest.raises(UserError, match=words) as info:
            function(str(path))
        assert str(path) in str(info.value) and str(info.value).isprintable() and str(info.value).endswith('.')


@pytest.mark.parametrize('name', ['checkpoint.pth', 'checkpoint_protocol4.pt', 'checkpoint_legacy.pth.tar'])
def test_weight_files_are_not_foreign(name):
    assert read_file(os.path.join(HERE, 'fixtures', 'weights', name))
