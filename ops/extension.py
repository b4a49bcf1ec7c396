# SPDX-License-Identifier: Apache-2.0
"""Compile the operators of `ops/csrc` for this processor, and load them.

The library is compiled once and kept in `ops/build`, or below LEANVIT_CACHE if that folder is not writable. The name of its
folder depends on the sources, on Paddle and on the processor, so that another version or machine compiles its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import paddle
from paddle import Tensor

from utils.environment import cpu_flags, user_cache
from utils.errors import UserError
from utils.files import open_regular
from utils.locks import exclusive

SWITCH = 'LEANVIT_OPS'  # environment variable; 0: plain layers
LIMIT = 600.0  # seconds of a compilation at the first use, which takes 10 to 60; some compilers wait for a license
_NAME = 'leanvit_ops.so'
_SOURCES = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'csrc')
# Without -ffast-math, which would also flush denormal numbers in the whole process.
_FLAGS = [
    '-std=c++17',
    '-O3',
    '-march=native',
    '-fopenmp',
    '-fPIC',
    '-fno-math-errno',
    '-fno-trapping-math',
    '-D_GLIBCXX_USE_CXX11_ABI=1',
]


@functools.cache
def load() -> bool:
    """Load the operators into Paddle, and compile them before if needed. Return whether they can be used.

    They are for Paddle's CPU build. Without a compiler, or with one that takes longer than `LIMIT`, a line on stderr
    explains it, and False is returned.
    """
    if paddle.is_compiled_with_cuda() or os.environ.get(SWITCH) == '0':
        return False
    try:
        path = build(LIMIT)
        from paddle.utils.cpp_extension import extension_utils

        extension_utils.load_op_meta_info_and_register_op(path)
    except (UserError, OSError, RuntimeError) as error:
        if os.environ.get('PADDLE_TRAINER_ID', '0') == '0':
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]  # Paddle adds hints for CUDA
            _note(f'training on the CPU without the operators in C++, which is slower: {cause}')
        return False
    return True


def build(limit: float | None = None) -> str:
    """Compile the operators, unless it was done before, and return the path of the library.

    Args:
        limit: seconds until the compiler is stopped, with the time that another process compiles.

    Raises:
        UserError: there is no compiler, it fails or takes too long, or no folder can be written.
    """
    deadline = None if limit is None else time.monotonic() + limit
    folders = [os.path.join(folder, _key()) for folder in _folders()]
    paths = [os.path.join(folder, _NAME) for folder in folders]
    for path in filter(_is_safe, paths):
        return path
    for folder, path in zip(folders, paths):
        if not _can_write(folder):
            continue
        with exclusive(folder + '.lock', _note):  # ranks that start together
            if not _is_safe(path):
                _compile(path, deadline)
        return path
    raise UserError(
        f"cannot write to '{folders[0]}' or '{folders[1]}', or they belong to another user; make one of them your own."
    )


def _note(text: str) -> None:
    print(f'note: {text}', file=sys.stderr)


def _folders() -> Iterator[str]:
    yield os.path.join(os.path.dirname(_SOURCES), 'build')
    yield os.path.join(user_cache(), 'ops')


def _can_write(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK) and _is_own(folder)


def _is_safe(path: str) -> bool:
    """Return whether a whole library is there, and no other user can have written it: loading it runs its code."""
    return os.path.isfile(path) and _is_own(path) and _is_own(os.path.dirname(path)) and _is_whole(path)


def _is_whole(path: str) -> bool:
    """Return whether an ELF file reaches the end of its section headers; a truncated library ends the process with SIGBUS."""
    header = b''
    with contextlib.suppress(OSError), open_regular(path) as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b'\x7fELF'):
        return False
    (start,), (size, count) = struct.unpack_from('<Q', header, 40), struct.unpack_from('<HH', header, 58)
    return os.path.getsize(path) >= start + size * count


def _is_own(path: str) -> bool:
    """Return whether a path belongs to this user, to root, or to the owner of the sources, and not all users may change it."""
    found, user = os.stat(path), os.getuid() if hasattr(os, 'getuid') else 0
    return found.st_uid in (user, 0, os.stat(_SOURCES).st_uid) and not found.st_mode & stat.S_IWOTH


def _key() -> str:
    digest = hashlib.sha256()
    for name in sorted(os.listdir(_SOURCES)):
        with open_regular(os.path.join(_SOURCES, name)) as file:
            digest.update(file.read())
    versions = (paddle.__version__, paddle.version.commit, platform.machine(), *sorted(cpu_flags()), *_FLAGS)
    digest.update(' '.join(versions).encode())
    return digest.hexdigest()[:16]


def _compile(path: str, deadline: float | None) -> None:
    compiler = _compiler()
    _note(f"compiling the operators for the CPU, once, to '{path}'.")
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        objects = _compile_objects(compiler, folder, deadline)
        library = os.path.join(folder, _NAME)
        _run([[*compiler, '-shared', '-fopenmp', *objects, '-o', library, *_link_flags()]], deadline)
        os.replace(library, path)


def _compiler() -> list[str]:
    """Return the command of the C++ compiler; CXX may contain arguments, or start with ccache."""
    try:
        command = shlex.split(os.environ.get('CXX') or shutil.which('g++') or shutil.which('c++') or '')
    except ValueError as error:
        raise UserError(f"CXX is '{os.environ['CXX']}', which is no command ({error}).") from None
    if not command:
        raise UserError('there is no C++ compiler: install g++, or set CXX to the command of one.')
    return command


def _compile_objects(compiler: Sequence[str], folder: str, deadline: float | None) -> list[str]:
    include = paddle.sysconfig.get_include()
    flags = [*_FLAGS, f'-I{include}', f'-I{include}/third_party']
    sources = sorted(name for name in os.listdir(_SOURCES) if name.endswith('.cc'))
    objects = [os.path.join(folder, name.replace('.cc', '.o')) for name in sources]
    pairs = zip(sources, objects)
    _run([[*compiler, *flags, '-c', os.path.join(_SOURCES, name), '-o', target] for name, target in pairs], deadline)
    return objects


def _link_flags() -> list[str]:
    libraries = paddle.sysconfig.get_lib()
    base = os.path.join(os.path.dirname(libraries), 'base')
    flags = [f'-L{libraries}', '-l:libdnnl.so.3', f'-L{base}', '-l:libpaddle.so']
    return [*flags, f'-Wl,-rpath,{libraries}', f'-Wl,-rpath,{base}']


def _run(commands: Sequence[list[str]], deadline: float | None) -> None:
    """Run commands of the compiler side by side; none is left when this returns or raises."""
    with contextlib.ExitStack() as stack:
        processes = []
        for command in commands:
            processes.append(_start(command))
            stack.callback(_stop, processes[-1])
        for process in processes:
            _finish(process, deadline)


def _start(command: list[str]) -> subprocess.Popen:
    pipes = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
    try:
        return subprocess.Popen(command, **pipes, text=True, errors='replace', start_new_session=True)
    except OSError as error:
        raise UserError(f"the C++ compiler '{command[0]}' does not start: {error.strerror}.") from None


def _stop(process: subprocess.Popen) -> None:
    """Kill a compiler and the processes that it started, unless `_finish` read all of its output."""
    if process.stdout.closed:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def _finish(process: subprocess.Popen, deadline: float | None) -> None:
    remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        output, _ = process.communicate(timeout=remaining)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the C++ compiler '{process.args[0]}' took too long and was stopped: set CXX to another one, or compile without a "
            'limit of time by tools/build_ops.py.'
        ) from None
    if process.returncode:
        lines = output.splitlines()
        cause = next((line for line in lines if 'error' in line), lines[-1] if lines else 'no message')
        raise UserError(f"the C++ compiler '{process.args[0]}' failed: {cause.strip()}")


def run_operator(name: str, *arguments) -> list[Tensor]:
    """Call an operator with its inputs and attributes, in order, and return all outputs."""
    return paddle._C_ops._run_custom_op(name, *arguments)
