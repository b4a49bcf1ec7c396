# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save, read without PyTorch. The fixtures were written by PyTorch 2.13, expected.npz by its numpy()."""

import io
import os
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import HERE
from tests.utils.formats.helpers import archive, ops, tensor
from utils.errors import UserError
from utils.formats import read_file, torch_files

FOLDER = os.path.join(HERE, 'fixtures', 'weights')
CHECKPOINTS = ('checkpoint.pth', 'checkpoint_legacy.pth.tar', 'checkpoint_protocol4.pt')


def fixture(name: str) -> str:
    return os.path.join(FOLDER, name)


def content(name: str) -> bytes:
    with open(fixture(name), 'rb') as file:
        return file.read()


# ---------------------------------------------------------------------------------------------------- content
@pytest.mark.parametrize('name', CHECKPOINTS)
def test_every_tensor(name):
    checkpoint = read_file(fixture(name))
    with np.load(fixture('expected.npz')) as expected:
        assert {f'model/{key}' for key in checkpoint['model']} == {key for key in expected if key.startswith('model/')}
        for key in expected:
            group, _, tensor = key.partition('/')
            array = checkpoint[group][tensor] if tensor else checkpoint['optimizer']['state'][0]['exp_avg']
            assert array.dtype == expected[key].dtype, key
            assert array.shape == expected[key].shape, key
            assert np.array_equal(array, expected[key]), key


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_all_that_is_not_a_tensor(name):
    checkpoint = read_file(fixture(name))
    assert checkpoint['epoch'] == 299
    assert checkpoint['best'] == 79.5
    assert checkpoint['history'].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert checkpoint['counts'] == {'a': 1}
    assert checkpoint['flags'] == {True, None}
    assert checkpoint['text'] == 'größe'
    assert checkpoint['big'] == 2**70
    assert checkpoint['lr_scheduler']['milestones'] == {3: 1, 5: 1}
    args = checkpoint['args'].state
    assert args['lr'] == 5e-4
    assert args['size'] == (2, 3)
    assert args['dtype'] == 'torch.float32'
    assert args['nested'].state == {'a': 1}
    assert args['output_dir'].args == ('/', 'x')


def test_a_conjugated_view_is_refused_since_its_numbers_are_not_stored():
    with pytest.raises(UserError, match=r'conjugate\.pt.*refused.*clone'):
        read_file(fixture('conjugate.pt'))


# ---------------------------------------------------------------------------------------------------- made by hand
def read(data: bytes):
    return torch_files.read_archive(io.BytesIO(data), len(data))


@pytest.mark.parametrize(
    'view, expected',
    [
        ({}, [0, 1]),
        ({'offset': 3, 'size': (1,)}, [3]),
        ({'size': (2, 2), 'stride': (1, 2)}, [[0, 2], [1, 3]]),
        ({'size': (2, 2), 'stride': (1, 1)}, [[0, 1], [1, 2]]),
        ({'size': (3,), 'stride': (0,), 'offset': 2}, [2, 2, 2]),
        ({'size': (), 'stride': (), 'offset': 1}, 1),
        ({'size': (0, 5), 'stride': (5, 1)}, []),
        ({'size': (0,), 'offset': 4}, []),
    ],
)
def test_views(view, expected):
    assert read(archive(tensor(**view))).tolist() == expected


@pytest.mark.parametrize(
    'view',
    [
        {'offset': 3},
        {'offset': -1},
        {'offset': 1 << 62},
        {'size': (5,)},
        {'size': (2,), 'stride': (4,)},
        {'size': (2,), 'stride': (-1,), 'offset': 1},
        {'size': (-2,)},
        {'size': (2, 2)},
        {'size': (1 << 40,), 'stride': (0,)},
        {'size': (1 << 40, 1 << 40), 'stride': (0, 0)},
        {'size': (True,)},
        {'size': ('2',)},
        {'size': (1,) * 100, 'stride': (1,) * 100},
        {'stored': 3},
        {'stored': 5},
        {'stored': -4},
        {'stored': 1 << 60},
        {'key': '1'},
        {'key': '../data.pkl'},
        {'storage': 'HalfStorage'},
        {'storage': 'QInt8Storage'},
        {'storage': 'Size'},
        {'function': '_rebuild_sparse_tensor'},
    ],
)
def test_views_beyond_their_storage(view):
    with pytest.raises(Exception) as info:
        read(archive(tensor(**view)))
    assert not isinstance(info.value, (SystemError, MemoryError))


@pytest.mark.parametrize('raw', [b'', bytes(4), bytes(12), bytes(20)])
def test_a_storage_of_another_length(raw):
    with pytest.raises(ValueError, match='a storage of'):
        read(archive(tensor(), {'0': raw}))


def test_big_endian_archives():
    storages = {'0': struct.pack('>4f', 0, 1, 2, 3), '1': struct.pack('>2H', 0x3F80, 0xC000)}
    pair = tensor(size=(4,)) + tensor(key='1', stored=2, storage='BFloat16Storage') + b'\x86'
    first, second = read(archive(pair, storages, byteorder=b'big'))
    assert first.tolist() == [0, 1, 2, 3]
    assert second.tolist() == [1, -2]
    assert first.dtype == second.dtype == np.dtype('float32')


@pytest.mark.parametrize('root', ['', 'archive/', 'gmlp s16/'])
def test_any_name_of_the_root_and_no_byteorder(root):
    assert read(archive(tensor(), byteorder=None, root=root)).tolist() == [0, 1]


def test_archives_that_are_not_torchs(tmp_path):
    bomb = archive(tensor(stored=1 << 24), {'0': bytes(4 << 24)}, compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 20
    with pytest.raises(torch_files.RefusedError, match='compressed'):
        read(bomb)
    with pytest.raises(KeyError):
        read(archive(tensor(), byteorder=b'middle'))
    script = archive(b'c__torch__\nNet\n)R')
    path = tmp_path / 'script.pt'
    path.write_bytes(script)
    with pytest.raises(UserError, match=r"script\.pt' is refused: it names '__torch__\.Net'"):
        read_file(str(path))


def test_overlapping_members():
    """Two entries of the directory that point to the same bytes would multiply what a small file holds."""
    data = archive(tensor(), {'0': bytes(16), '1': bytes(5000)})
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        start = file.start_dir
    end = data.rindex(b'PK\x05\x06')
    entries = data[start:end].split(b'PK\x01\x02')[1:]
    big = next(entry for entry in entries if entry.endswith(b'data/1'))
    directory = b''.join(b'PK\x01\x02' + entry for entry in (*entries, big[:-1] + b'2', big[:-1] + b'3'))
    tail = struct.pack('<4s4H2LH', b'PK\x05\x06', 0, 0, 6, 6, len(directory), start, 0)
    with pytest.raises(ValueError, match='its members overlap'):
        read(data[:start] + directory + tail)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    marker = tmp_path / 'marker'
    call = b'cposix\nsystem\n' + ops((f'touch {marker}',)) + b'R'
    legacy = content('checkpoint_legacy.pth.tar')
    third = legacy.index(b'little_endian')
    head = legacy[: legacy.index(b'.\x80\x02', third) + 1]
    for name, data in {
        'zip.pth': archive(b'}' + ops('model') + call + b's'),
        'old.pth': head + b'\x80\x02' + call + b'.',
    }.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"refused: it names 'posix\.system'"):
            read_file(str(path))
    assert not marker.exists()


# ---------------------------------------------------------------------------------------------------- damage
@given(st.sampled_from(CHECKPOINTS), st.floats(0, 1))
@settings(deadline=None, max_examples=150)
def test_cut_short(tmp_path_factory, name, share):
    data = content(name)
    path = tmp_path_factory.getbasetemp() / f'cut_{name}'
    path.write_bytes(data[: int(share * (len(data) - 1))])
    with pytest.raises(UserError, match=rf"cut_{name}' is damaged|cut_{name}' is refused"):
        read_file(str(path))


@given(
    st.sampled_from(CHECKPOINTS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3),
)
@settings(deadline=None, max_examples=300)
def test_overwritten(tmp_path_factory, name, changes):
    data = bytearray(content(name))
    for share, byte in changes:
        data[int(share * len(data))] = byte
    path = tmp_path_factory.getbasetemp() / f'over_{name}'
    path.write_bytes(data)
    try:
        read_file(str(path))
    except UserError as error:
        assert f'over_{name}' in str(error)
