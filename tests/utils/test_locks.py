# SPDX-License-Identifier: Apache-2.0
"""Locks between processes."""

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils import locks
from utils.locks import LockedError, file_lock

HOLD = 'import sys; from utils.locks import file_lock\nwith file_lock(sys.argv[1]): print(flush=True); sys.stdin.read()'


@contextlib.contextmanager
def held(path):
    """Another process that holds the lock."""
    command = [sys.executable, '-c', HOLD, str(path)]
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline()
        yield process
        process.stdin.close()


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / '.lock'
    with held(path) as process:
        with pytest.raises(LockedError, match=f'process {process.pid} on {socket.gethostname()}'), file_lock(path):
            pass
        assert path.exists()
    assert not path.exists()
    with file_lock(path):
        assert path.read_text() == f'process {os.getpid()} on {socket.gethostname()}\n'
    assert not path.exists()


def test_a_killed_process_leaves_no_lock(tmp_path):
    path = tmp_path / '.lock'
    with held(path) as process:
        process.kill()
        process.wait()
        assert path.exists()
        with file_lock(path):
            pass
    assert not path.exists()


@pytest.mark.parametrize('content', [b'', b'\xff\xfe', b'process %d on elsewhere\n', b'x' * 5000], ids=range(4))
def test_a_file_that_nobody_locks_is_no_lock(tmp_path, content):
    path = tmp_path / '.lock'
    path.write_bytes(content.replace(b'%d', str(os.getpid()).encode()))
    with file_lock(path):
        assert path.read_text().startswith(f'process {os.getpid()} on ')


def test_an_owner_that_cannot_be_read(tmp_path):
    path = tmp_path / '.lock'
    with held(path):
        path.write_bytes(b'\x1b[2J')
        with pytest.raises(LockedError, match='^another process$'), file_lock(path):
            pass


def test_a_file_removed_before_it_is_locked_is_no_lock(tmp_path, monkeypatch):
    """Its last owner removed it after this process had opened it: others would lock another file."""
    path = tmp_path / '.lock'
    removals = [True]

    def lock(handle):
        if removals:
            removals.pop()
            os.unlink(path)

    monkeypatch.setattr(locks, '_lock', lock)
    with file_lock(path):
        assert path.exists()


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks(tmp_path, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, 'no locks')

    monkeypatch.setattr(fcntl, 'lockf', refuse)
    with file_lock(tmp_path / '.lock'):
        pass
    assert not os.listdir(tmp_path)
