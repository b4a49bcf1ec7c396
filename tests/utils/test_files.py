# SPDX-License-Identifier: Apache-2.0
"""Writing files."""

import errno
import os

import pytest

from utils.errors import UserError
from utils.files import atomic_write, writing


@pytest.mark.parametrize(
    ('number', 'text'),
    [
        (
            errno.ENOSPC,
            r"cannot write 'a': No space left on device; free space there, or write elsewhere \(-output\)\.",
        ),
        (errno.EDQUOT, r'quota exceeded; free space there'),
        (errno.EROFS, r"cannot write 'a': Read-only file system; write elsewhere \(-output\)\."),
    ],
)
def test_the_error_says_what_to_do(number, text):
    with pytest.raises(UserError, match=text), writing('a'):
        raise OSError(number, os.strerror(number))


def test_a_reader_that_left_is_no_error_of_the_file(tmp_path):
    with pytest.raises(BrokenPipeError), writing('a'):
        raise BrokenPipeError
    with pytest.raises(BrokenPipeError), atomic_write(str(tmp_path / 'a')):
        raise BrokenPipeError
    assert not os.listdir(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'a'
    path.write_text('old')
    with (
        pytest.raises(UserError, match=r'No space left.*what it held is untouched'),
        atomic_write(str(path), 'w') as file,
    ):
        file.write('new')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['a']


def test_text_takes_any_name(tmp_path):
    path = tmp_path / 'dat\udce9'
    with atomic_write(str(path), 'w') as file:
        file.write(str(path))
    assert path.read_text(encoding='utf-8') == f'{tmp_path}/dat\\udce9'
