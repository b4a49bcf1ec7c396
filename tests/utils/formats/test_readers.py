# SPDX-License-Identifier: Apache-2.0
"""The content decides the format of a file; a damaged or hostile one is one sentence."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.conftest import HERE
from tests.utils.formats.helpers import B, W, entry, safetensors_file, write
from utils import formats
from utils.errors import UserError
from utils.formats import file_format, read_file, write_pdparams
from utils.weights import find_state_dict


def test_the_content_decides_the_format(tmp_path):
    fixtures = os.path.join(HERE, 'fixtures', 'weights')
    np.savez(str(tmp_path / 'a.npz'), w=W)
    files = {
        os.path.join(fixtures, 'checkpoint.pth'): formats.TORCH,
        os.path.join(fixtures, 'checkpoint_protocol4.pt'): formats.TORCH,
        os.path.join(fixtures, 'checkpoint_legacy.pth.tar'): formats.OLD_TORCH,
        str(tmp_path / 'a.npz'): formats.NPZ,
        write(tmp_path / 'b', pickle.dumps({'w': W}, 4)): formats.PADDLE,
        write(tmp_path / 'c', safetensors_file({'w': entry(0, 4)}, bytes(4))): formats.SAFETENSORS,
    }
    for path, expected in files.items():
        assert file_format(path) == expected
        misnamed = tmp_path / 'misnamed.pth'
        with open(path, 'rb') as file:
            misnamed.write_bytes(file.read())
        assert file_format(str(misnamed)) == expected
        assert read_file(str(misnamed))


@pytest.mark.parametrize('suffix', ['pdparams', 'pth', 'safetensors', 'npz', 'txt'])
@pytest.mark.parametrize(
    'data', [b'', b'x', b'PK\x03\x04', b'\x80\x04', b'garbage ' * 100, b'<html>not found</html>', bytes(100)]
)
def test_what_is_no_weight_file_is_named_in_one_sentence(tmp_path, suffix, data):
    path = write(tmp_path / f'weights.{suffix}', data)
    for function in (read_file, file_format) if data == b'' else (read_file,):
        with pytest.raises(
            UserError, match=rf"weights\.{suffix}' is damaged, cut short, or not a weight file: ."
        ) as info:
            function(path)
        assert '\n' not in str(info.value)
        assert len(str(info.value)) < 250 + len(path)


def test_what_a_file_says_cannot_move_the_cursor(tmp_path):
    hostile = 'os\x1b[2J\n' + 'x' * 1000
    for data in (b'\x80\x04' + pickle.dumps(hostile, 4)[2:-1] * 2 + b'\x93.', pickle.dumps({hostile: W, 1: 2}, 4)):
        with pytest.raises(UserError) as info:
            find_state_dict(read_file(write(tmp_path / 'x.pdparams', data)))
        assert str(info.value).isprintable()
        assert len(str(info.value)) < 300 + len(str(tmp_path))


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"cannot read '.*/missing\.pdparams': No such file"):
        read_file(str(tmp_path / 'missing.pdparams'))
    with pytest.raises(UserError, match=f"cannot read '{tmp_path}': Is a directory"):
        read_file(str(tmp_path))


def test_code_is_refused_by_name_and_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path / "marker"}',)

    for protocol in range(6):
        path = write(tmp_path / 'x.pdparams', pickle.dumps({'model': {'w': W}, 'x': Payload()}, protocol))
        with pytest.raises(UserError, match=rf"x\.pdparams' is refused: it names '{os.name}\.system'"):
            read_file(path)
    assert not (tmp_path / 'marker').exists()


@given(st.floats(0, 1), st.sampled_from(['pdparams', 'safetensors', 'npz']))
@settings(deadline=None, max_examples=100)
def test_cut_short(tmp_path_factory, share, suffix):
    path = tmp_path_factory.getbasetemp() / f'cut.{suffix}'
    if suffix == 'pdparams':
        write_pdparams({'w': W, 'n': {'b': B, 'epoch': 3}}, str(path))
    elif suffix == 'npz':
        np.savez(str(path), w=W, b=B)
    else:
        save_file({'w': W, 'b': B}, str(path))
    data = path.read_bytes()
    cut = int(share * (len(data) - 1))
    assume(data[cut : cut + 9] != b'{"file": ')  # all but the checksums of a .pdparams is a whole file of Paddle's
    path.write_bytes(data[:cut])
    with pytest.raises(UserError, match=rf"cut\.{suffix}' is damaged"):
        read_file(str(path))
