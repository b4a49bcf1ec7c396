# SPDX-License-Identifier: Apache-2.0
"""Flipped bits in files of this suite are reported with the name of the array; files without checksums are accepted."""

from __future__ import annotations

import pickle

import numpy as np
import paddle
import pytest

from utils.errors import UserError
from utils.formats import read_file, write_pdparams
from utils.formats.checksums import MAGIC

RNG = np.random.default_rng(0)
STATE = {
    'model': {f'layer{i}.weight': RNG.standard_normal((40, 30)).astype('float32') for i in range(5)},
    'optimizer': {'moment1': {'layer0.weight': RNG.standard_normal((40, 30))}},
    'epoch': 3,
    'empty': np.zeros((0, 3)),
    'scalar': np.array(2.5),
    'mask': np.array([True, False]),
    'list': [np.arange(3), {'x': np.arange(4)}],
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / 'last.pdparams'
    write_pdparams(STATE, str(path))
    return path


def flipped(path, place: int, bit: int) -> str:
    """The sentence of a file with one flipped bit; empty where it is read."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    other = path.with_name('flipped.pdparams')
    other.write_bytes(bytes(data))
    try:
        content = read_file(str(other))
    except UserError as error:
        return str(error)
    np.testing.assert_equal(content, read_file(str(path)))
    return ''


@pytest.mark.parametrize('name', ['model/layer3.weight', 'optimizer/moment1/layer0.weight'])
def test_the_array_is_named(path, name):
    group, *inner, last = name.split('/')
    array = STATE[group][inner[0]][last] if inner else STATE[group][last]
    start = path.read_bytes().index(array.tobytes())
    for place in (0, 999, array.nbytes - 1):
        text = flipped(path, start + place, place % 8)
        assert f"flipped.pdparams' is damaged, cut short, or not a weight file: bits of {name} are flipped" in text


def test_no_flipped_bit_is_read(path):
    """Where a bit of the checksums themselves is flipped, the content may be read, and is what was written."""
    data = path.read_bytes()
    end = data.index(b'{"file": ')
    for place in [*range(200), *range(200, end, 97), end - 1]:
        assert flipped(path, place, place % 8), place
    for place in range(end, len(data), 3):
        flipped(path, place, place % 8)


def test_paddle_and_pickle_stop_before_the_checksums(path):
    assert path.read_bytes().endswith(MAGIC)
    for content in (paddle.load(str(path), return_numpy=True), pickle.loads(path.read_bytes())):
        np.testing.assert_equal(content, STATE)


def test_files_without_checksums_are_accepted(tmp_path):
    path = tmp_path / 'old.pdparams'
    path.write_bytes(pickle.dumps(STATE, 4))
    np.testing.assert_equal(read_file(str(path))['model'], STATE['model'])


def test_checksums_of_others(tmp_path):
    """A trailer that is no JSON, of another length, or of other kinds."""
    path = tmp_path / 'x.pdparams'
    for text in (
        b'',
        b'{}',
        b'[1]',
        b'[' * 10_000,
        b'{"file": 1, "arrays": [1]}',
        b'{"file": 1, "arrays": {"x": "y"}}',
        b'\xff',
    ):
        for length in (len(text), 0, 2**32 - 1):
            path.write_bytes(pickle.dumps(STATE, 4) + text + length.to_bytes(4, 'little') + MAGIC)
            with pytest.raises(UserError, match="is damaged, cut short, or not a weight file: [^']*"):
                read_file(str(path))
