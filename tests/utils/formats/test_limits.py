# SPDX-License-Identifier: Apache-2.0
"""Small files that ask for much: refused within seconds, and within a few hundred megabytes."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.utils.formats.helpers import archive, entry, ops, safetensors_file, tensor, write
from utils.errors import UserError
from utils.formats import read_file
from utils.formats.limits import MAX_DEPTH
from utils.formats.pickles import KNOWN, DType

P = b'\x80\x02'
GET0, GET1, PUT0, PUT1 = b'h\xf0', b'h\xf1', b'q\xf0', b'q\xf1'  # `ops` uses the first places of the memo
TUPLE_OF_ITEMS = b'(' + b'K\x01' * 20000 + b't' + PUT0
BYTES = b'c_codecs\nencode\n' + ops(('x' * 20000, 'latin1')) + b'R' + PUT0


def copies(name: str, value: bytes, count: int = 20000) -> bytes:
    """A list of `count` copies of a value, each made by a call."""
    return (
        P
        + value
        + b'c'
        + name.replace('.', '\n').encode()
        + b'\n'
        + PUT1
        + b']('
        + (GET1 + GET0 + b'\x85R') * count
        + b'e.'
    )


def integer(value: int) -> bytes:
    return ops(value)


ARRAY = b'cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n' + ops((0,)) + ops('b') + b'tR'
F4 = b'cnumpy\ndtype\n' + ops(('f4', False, True)) + b'R'
LEGACY = b''.join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
DEEP = b')' + b'\x85' * 200_000
HUGE = b'\x8b' + struct.pack('<i', 1 << 20) + b'\xff' * ((1 << 20) - 1) + b'\x00'

DOUBLED = b']' + PUT0 + (b'0](' + GET0 * 2 + b'e' + PUT0) * 50 + b'0'  # 2^50 entries; GET0 pushes it


def shared_paths(depth: int, length: int) -> bytes:
    """Dicts that hold the next one twice, under long keys: 2^depth paths to one array."""
    value: object = np.zeros(1, 'f4')
    for _ in range(depth):
        value = {'a' * length: value, 'b' * length: value}
    return pickle.dumps(value, 4)


def checksummed(pickled: bytes, text: bytes = b'{"file": 1, "arrays": {}}') -> bytes:
    """A pickle with wrong checksums."""
    return pickled + text + struct.pack('<I', len(text)) + b'LeanViT-CRC-32-1'


# (name, words of the sentence): content
FILES = {
    ('lists', 'copies'): copies('builtins.list', TUPLE_OF_ITEMS),
    ('tuples of lists', 'copies'): copies('builtins.tuple', b'](' + b'K\x01' * 20000 + b'e' + PUT0),
    ('dicts', 'copies'): copies('builtins.dict', b'}(' + b''.join(ops(i) + b'N' for i in range(10000)) + b'u' + PUT0),
    ('sets', 'copies'): copies('builtins.set', b'(' + b''.join(ops(i) for i in range(10000)) + b't' + PUT0),
    ('bytearrays', 'copies'): copies('builtins.bytearray', BYTES),
    ('long argument lists', 'copies'): copies('argparse.Namespace', b'N' + TUPLE_OF_ITEMS).replace(b'\x85R', b'R'),
    ('array contents', 'copies'): P + b'c_codecs\nencode\n' + ops(('x' * 40000, 'latin1')) + b'R' + PUT0
    + (ARRAY + b'(K\x01' + ops((10000,)) + F4 + b'\x89' + GET0 + b'tb') * 3000 + b'.',
    ('doubled lists', 'repeated too often'): P + b']' + PUT0 + (b'0](' + GET0 * 2 + b'e' + PUT0) * 60 + b'.',
    ('type of doubled lists', 'no short text'): P + DOUBLED + b'cnumpy\ndtype\n' + GET0 + b'\x85R.',
    ('long paths to one array', 'beside the arrays'): checksummed(shared_paths(18, 1000)),
    ('deep list', 'nested too deeply'): P + b']' * 100_000 + b'a' * 99_999 + b'.',
    ('colliding integers', 'int as a key'): P + b'}(' + b''.join(integer(i * (2**61 - 1)) + b'N' for i in range(1, 30000)) + b'u.',
    ('colliding memo', 'memo index'): b''.join(b'Np%d\n0' % (i * (2**61 - 1)) for i in range(30000)) + b'N.',
    ('colliding tuples', 'tuple as a key'): P + b'\x8f(' + ops((2**59, 5)) + b'\x90.',
    ('huge shape', 'integer of'): P + ARRAY + b'(K\x01' + HUGE + b'2' * 31 + b't' + F4 + b'\x89' + ops('x') + b'tb.',
    ('huge integer', 'integer of'): P + HUGE + b'.',
    ('slices of one part', "'a'"): pickle.dumps(
        {'a': np.ones(50000, 'f4'), 'UnpackBigParamInfor@@': {'b': {'OriginShape': (1,), 'slices': ['a'] * 50000}}}, 2
    ),
    ('shape of doubled tuples', 'a side'): P + ARRAY + b'(K\x01)' + b'2\x86' * 60 + F4 + b'\x89' + ops('') + b'tb.',
    ('deep storage key', 'no storage'): archive(
        b'ctorch._utils\n_rebuild_tensor_v2\n((' + ops('storage') + b'ctorch\nFloatStorage\n' + DEEP + ops('cpu') + b'K\x04tQ'
        + ops(0) + ops((1,)) + ops((1,)) + b'tR'
    ),
    ('deep storage key in a legacy file', 'no storage'): LEGACY + P + b'(' + ops('storage') + b'ctorch\nFloatStorage\n' + DEEP + ops('cpu')
    + b'K\x04tQ.',
    ('deep list of legacy keys', 'nested too deeply'): LEGACY + P + b'N.' + P + b'](' + DEEP + b'e.',
    ('tensor of huge sides', 'a side'): archive(tensor(size=(1 << 70, 0), stride=(1, 1))),
    ('name of code', 'names code'): P + b'c' + b'x' * 100_000 + b'\ny\n.',
    ('stack of names', 'names code'): b'\x80\x04' + ops('x' * 50000) + PUT0 + (GET0 + GET0 + b'\x93') * 50000 + b'.',
    ('sparse header', 'a header of 0'): bytes(8) + b'{}',
    ('safetensors of zero sides', 'a side'): safetensors_file({'w': entry(0, 0, [0, 1 << 60])}),
}  # fmt: skip


def npz(shape, dtype='<f4', content=b'') -> bytes:
    buffer, header = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {'descr': dtype, 'fortran_order': False, 'shape': shape})
    with zipfile.ZipFile(buffer, 'w') as file:
        file.writestr('w.npy', header.getvalue() + content)
    return buffer.getvalue()


FILES['npz of a large shape', 'larger than its file'] = npz((1 << 38,))
FILES['npz of nothing', 'than numbers'] = npz((1 << 47,), '|S0')
FILES['npz of a huge shape', 'a side'] = npz((1 << 60, 0))


def limited(folder: str) -> None:
    """Reads all files of a folder in a process that may take 1 GB; prints the sentences."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    for name in sorted(os.listdir(folder)):
        try:
            print(f'{name}: read {type(read_file(os.path.join(folder, name)))}', flush=True)
        except UserError as error:
            print(f'{name}: {error}', flush=True)


def test_every_attack_is_one_sentence(tmp_path):
    for number, data in enumerate(FILES.values()):
        write(tmp_path / f'{number:02d}.safetensors' if b'{' in data[:12] else tmp_path / f'{number:02d}', data)
    program = f'from tests.utils.formats.test_limits import limited; limited({str(tmp_path)!r})'
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    for (name, reason), line in zip(FILES, lines):
        assert ("' is refused: " in line or "' is damaged" in line) and reason in line and len(line) < 500, (name, line)
    assert len(lines) == len(FILES)


def test_arrays_are_not_copied_from_arrays():
    copy = KNOWN['numpy.core.numeric._frombuffer']
    assert copy(bytearray(8), DType('f4'), (2,), 'C').tolist() == [0, 0]
    with pytest.raises(ValueError, match='without its content'):
        copy(np.zeros(2, 'f4'), DType('f4'), (2,), 'C')


def test_large_parameters_are_read(tmp_path):
    """Their numbers are not in the pickle; wrapping them as parameters copies nothing."""
    count = 1 << 22
    parameter = b'ctorch._utils\n_rebuild_parameter\n(' + tensor(size=(count,), stored=count) + b'\x88}tR'
    numbers = np.arange(count, dtype='<f4')
    path = write(tmp_path / 'x.pth', archive(b'}' + ops('w') + parameter + b's', {'0': numbers.tobytes()}))
    assert np.array_equal(read_file(path)['w'], numbers)


@pytest.mark.parametrize('protocol', range(6))
def test_large_arrays_are_read(tmp_path, protocol):
    state = {str(number): np.arange(1 << 19, dtype='f4') for number in range(4)}
    path = write(tmp_path / 'x.pdparams', pickle.dumps(state, protocol))
    np.testing.assert_equal(read_file(path), state)


def test_depth_that_is_read(tmp_path):
    value: object = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    assert read_file(write(tmp_path / 'x.pdparams', pickle.dumps(value, 4))) == value
    with pytest.raises(UserError, match='nested too deeply'):
        read_file(write(tmp_path / 'x.pdparams', pickle.dumps([value], 4)))
