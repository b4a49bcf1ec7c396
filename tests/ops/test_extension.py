# SPDX-License-Identifier: Apache-2.0
"""The operators are compiled once; without a compiler a sentence explains it, and plain layers are used."""

import os
import subprocess
import sys
import time

import pytest

import ops
from ops import extension
from tests.conftest import ROOT
from tools import build_ops
from utils.errors import UserError

compiled = pytest.mark.skipif(not ops.load(), reason='no C++ compiler')


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two empty folders for the library."""
    paths = [str(tmp_path / 'build'), str(tmp_path / 'cache')]
    monkeypatch.setattr(extension, '_folders', lambda: iter(paths))
    return paths


def write(path: str, deadline=None) -> None:
    with open(path, 'wb') as file:
        file.write(b'\x7fELF'.ljust(64, b'\0'))


@pytest.mark.parametrize('compiler', ['no-such-command', '/bin/false', '/etc/passwd', '/bin/false --with arguments'])
def test_without_a_compiler(folders, compiler, monkeypatch, capsys):
    monkeypatch.setenv('CXX', compiler)
    assert not extension.load.__wrapped__()
    note = capsys.readouterr().err.splitlines()[-1]
    assert note.startswith('note: training on the CPU without the operators in C++, which is slower: the C++ compiler')
    assert compiler.split()[0] in note
    assert [name for _, _, names in os.walk(os.path.dirname(folders[0])) for name in names] == []


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='no /proc')
@pytest.mark.parametrize('end', ['wait', 'exit 0'])
def test_a_compiler_that_never_ends(folders, end, tmp_path, monkeypatch, capsys):
    """It is stopped with the processes that it started, and plain layers are used."""
    compiler, pids = tmp_path / 'compiler', tmp_path / 'pids'
    compiler.write_text(f'#!/bin/sh\nsleep 60 &\necho $$ $! >> {pids}\n{end}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv('CXX', str(compiler))
    monkeypatch.setattr(extension, 'LIMIT', 1.0)
    start = time.monotonic()
    assert not extension.load.__wrapped__()
    note = capsys.readouterr().err.splitlines()[-1]
    assert note.startswith('note: training on the CPU without the operators') and 'took too long' in note
    started = list(map(int, pids.read_text().split()))
    while any(map(is_running, started)) and time.monotonic() < start + 30:
        time.sleep(0.01)
    assert started and not any(map(is_running, started))
    assert [name for _, _, names in os.walk(os.path.dirname(folders[0])) for name in names if name.endswith('.o')] == []


def test_no_compiler_at_all(folders, monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(extension.shutil, 'which', lambda name: None)
    with pytest.raises(UserError, match='there is no C.. compiler: install g.., or set CXX'):
        extension.build()


def test_a_command_with_an_open_quote(folders, monkeypatch):
    monkeypatch.setenv('CXX', "g++ '-O2")
    with pytest.raises(UserError, match='which is no command'):
        extension.build()


def test_a_broken_library_is_a_note(folders, monkeypatch, capsys):
    monkeypatch.setattr(extension, '_compile', write)
    assert not extension.load.__wrapped__()
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith('note: training on the CPU without the operators') and folders[0] in note


def test_the_switch_and_the_gpu_build(monkeypatch):
    monkeypatch.setattr(extension, 'build', lambda _: pytest.fail('compiled'))
    monkeypatch.setenv(extension.SWITCH, '0')
    assert not extension.load.__wrapped__()
    monkeypatch.delenv(extension.SWITCH)
    monkeypatch.setattr(extension.paddle, 'is_compiled_with_cuda', lambda: True)
    assert not extension.load.__wrapped__()
    with pytest.raises(UserError, match='GPU build'):
        build_ops.main([])


def test_it_is_compiled_once(folders, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(extension, '_compile', lambda path, _: calls.append(path) or write(path))
    assert extension.build() == extension.build() == calls[0]
    assert len(calls) == 1 and calls[0].startswith(folders[0])
    assert not os.path.exists(os.path.dirname(calls[0]) + '.lock')
    build_ops.main([])
    assert capsys.readouterr().out.strip() == calls[0]


def test_a_read_only_tree_uses_the_cache(folders, monkeypatch):
    write(folders[0])  # a file in the place of the folder
    monkeypatch.setattr(extension, '_compile', write)
    assert extension.build().startswith(folders[1])
    os.rename(folders[1], folders[1] + '-moved')
    write(folders[1])
    with pytest.raises(UserError, match='make one of them your own'):
        extension.build()


def test_a_library_that_others_may_have_written_is_not_loaded(folders, monkeypatch):
    calls = []
    monkeypatch.setattr(extension, '_compile', lambda path, _: calls.append(path) or write(path))
    path = extension.build()
    os.chmod(path, 0o666)
    assert extension.build() == path and len(calls) == 2  # compiled again
    os.chmod(path, 0o644)
    os.chmod(os.path.dirname(path), 0o777)
    assert extension.build().startswith(folders[1])
    monkeypatch.setattr(extension, '_is_own', lambda place: False)
    with pytest.raises(UserError, match='belong to another user'):
        extension.build()


def test_other_sources_and_processors_have_libraries_of_their_own(tmp_path, monkeypatch):
    key = extension._key()
    assert key == extension._key()
    monkeypatch.setattr(extension, 'cpu_flags', lambda: frozenset({'sse'}))
    other = extension._key()
    write(str(tmp_path / 'x.cc'))
    monkeypatch.setattr(extension, '_SOURCES', str(tmp_path))
    assert len({key, other, extension._key()}) == 3


@compiled
def test_a_truncated_library_is_not_loaded(tmp_path):
    """Loading it would end the process with SIGBUS."""
    with open(extension.build(), 'rb') as file:
        content = file.read()
    path = str(tmp_path / 'library.so')
    for size in (0, 63, 20000, len(content) - 1, len(content)):
        with open(path, 'wb') as file:
            file.write(content[:size])
        assert extension._is_whole(path) == (size == len(content))


@compiled
def test_all_operators_are_registered():
    """A model that runs before Paddle's own OpenMP runtime is loaded by `start_paddle` works, too."""
    code = (
        'import paddle, ops; x = paddle.ones([2, 3]); '
        'print(ops.usable(x), ops.linear(x, paddle.ones([3, 2]), None).numpy().tolist())'
    )
    environment = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == 'True [[3.0, 3.0], [3.0, 3.0]]\n', done.stderr


def test_paddle_ships_the_library_that_the_operators_call():
    """Version 3 of oneDNN, whose C interface `onednn.h` declares."""
    import ctypes

    import paddle

    class Version(ctypes.Structure):
        _fields_ = [(name, ctypes.c_int) for name in ('major', 'minor', 'patch')]

    path = os.path.join(paddle.sysconfig.get_lib(), 'libdnnl.so.3')
    if not os.path.isfile(path):
        pytest.skip('this build of Paddle has no oneDNN')
    version = ctypes.CDLL(path).dnnl_version
    version.restype = ctypes.POINTER(Version)
    assert version().contents.major == 3


@compiled
def test_a_forked_process_computes():
    """Without the launchers, which load Intel's OpenMP runtime; GNU's waits for threads that fork() does not copy."""
    code = (
        'import os, signal, paddle, ops; x = paddle.ones([64, 32]); assert ops.usable(x)\n'
        'run = lambda: ops.layer_norm(ops.linear(x, paddle.ones([32, 32]), None), None, None, 1e-6)\n'
        'y = run(); child = os.fork(); child or signal.alarm(20)\n'
        'assert paddle.equal_all(run(), y)\n'
        'child or os._exit(0)\n'
        'print(os.waitpid(child, 0)[1])'
    )
    environment = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '2'}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == '0\n', done.stderr
