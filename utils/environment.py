# SPDX-License-Identifier: Apache-2.0
"""Environment variables that must be set before Paddle is imported, and that import.

Variables that the user set stay as they are, except a HOME that is not writable.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator

from utils.errors import UserError
from utils.reports import CONSOLE, REPORTS
from utils.signals import SIGNALS

OLDEST_PADDLE = (3, 3)
_CPU_BUILD, _GPU_BUILD = 'paddlepaddle', 'paddlepaddle-gpu'
_INSTALL = 'pip install -r requirements.txt, or -r requirements-gpu.txt with NVIDIA GPUs'
_ARGV = sys.argv[:]  # before `utils.cli.run_command` removes the name of the command

# Each training step frees and allocates the same large buffers. By default glibc returns them to the kernel, and page
# faults then make operations two to three times slower. glibc reads these variables at process start only.
_MALLOC = {
    'MALLOC_MMAP_THRESHOLD_': '4294967296',
    'MALLOC_TRIM_THRESHOLD_': '17179869184',
    'MALLOC_TOP_PAD_': '67108864',
}

# With TF32, which NVIDIA's libraries use by default, the inputs of float32 products have 10 bits of mantissa.
_GPU_SETTINGS = {'NVIDIA_TF32_OVERRIDE': '0'}

# Warnings for developers of Paddle, on compilation and on the export of a program.
_IGNORED_WARNINGS = ('No ccache found', "Tensor do not have 'place' interface")

# Variables that launchers set for each process; they may be left over from an earlier job.
_RANK, _SIZE = 'PADDLE_TRAINER_ID', 'PADDLE_TRAINERS_NUM'
_ENDPOINT, _ENDPOINTS = 'PADDLE_CURRENT_ENDPOINT', 'PADDLE_TRAINER_ENDPOINTS'
_LAUNCHER = (
    _RANK, _SIZE, _ENDPOINT, _ENDPOINTS, 'PADDLE_MASTER', 'PADDLE_GLOBAL_RANK', 'PADDLE_GLOBAL_SIZE', 'PADDLE_LOCAL_RANK',
    'PADDLE_LOCAL_SIZE', 'PADDLE_NNODES', 'PADDLE_RANK_IN_NODE', 'FLAGS_selected_gpus', REPORTS, CONSOLE,
    'LEANVIT_HEARTBEAT',
)  # fmt: skip


# Folders below HOME that Paddle, VisualDL and Matplotlib create on import; they fail or warn where HOME is not writable.
_HOME_FOLDERS = ('', '.cache', '.cache/paddle', '.config', '.visualdl')
_USERS_HOME = 'LEANVIT_HOME'  # the HOME that was replaced


def ensure_home() -> None:
    """Set HOME to a folder below LEANVIT_CACHE, or to a temporary one, if it is not writable."""
    home = os.path.expanduser('~')
    if os.path.isdir(home) and all(_is_writable(os.path.join(home, name)) for name in _HOME_FOLDERS):
        return
    os.environ.update({_USERS_HOME: home, 'HOME': _fallback_home()})


def _is_writable(path: str) -> bool:
    """Return True if a folder is writable or does not exist yet."""
    return not os.path.lexists(path) or (os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK))


def _fallback_home() -> str:
    """Return a folder of this user, where possible the same one in each run and process."""
    cache = os.environ.get('LEANVIT_CACHE')
    folders = [os.path.join(os.path.abspath(cache), 'home')] if cache else []
    for folder in [*folders, os.path.join(tempfile.gettempdir(), f'leanvit-home-{os.getuid()}')]:
        with contextlib.suppress(OSError):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if _is_writable(folder) and os.stat(folder).st_uid == os.getuid():
                return folder
    return tempfile.mkdtemp(prefix='leanvit-home-')


def expand_user(path: str) -> str:
    """Expand a leading `~` to the user's own home folder, also where `ensure_home` replaced HOME."""
    home = os.environ.get(_USERS_HOME)
    if home is not None and path.split('/')[0] == '~':
        return home + path[1:]
    return os.path.expanduser(path)


def user_cache() -> str:
    """Return LEANVIT_CACHE, by default ~/.cache/leanvit."""
    return os.environ.get('LEANVIT_CACHE') or os.path.join(os.path.expanduser('~'), '.cache', 'leanvit')


def is_gpu_build() -> bool:
    """Return True if the installed Paddle was built for GPUs."""
    return _GPU_BUILD in _installed_builds()


def _installed_builds() -> dict[str, str]:
    """Return the versions of the installed builds of Paddle by the name of their package."""
    versions = {}
    for name in (_CPU_BUILD, _GPU_BUILD):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def processor_name() -> str:
    """Return the model name of the processor."""
    return _cpu_info('model name') or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Return the names of the instruction sets of an x86 processor under Linux; elsewhere an empty set."""
    return frozenset(_cpu_info('flags').split())


def has_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16 (x86 under Linux)."""
    return bool({'avx512_bf16', 'amx_bf16'} & cpu_flags())


def _cpu_info(field: str) -> str:
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return next((line.partition(':')[2].strip() for line in file if line.startswith(field)), '')
    except OSError:
        return ''


def _check_builds() -> None:
    """Raise UserError if Paddle is too old, or its CPU and GPU builds are installed side by side.

    The check comes before the import, since an old Paddle fails there: PyPI's paddlepaddle-gpu is 2.6.2.
    """
    builds = _installed_builds()
    if len(builds) > 1:
        raise UserError(
            f'{_CPU_BUILD} {builds[_CPU_BUILD]} and {_GPU_BUILD} {builds[_GPU_BUILD]} are installed together and overwrite '
            f'one another: pip uninstall -y {_CPU_BUILD} {_GPU_BUILD}, then {_INSTALL}.'
        )
    for version in builds.values():
        _check_version(version)


def _check_version(version: str) -> None:
    numbers = re.match(r'(\d+)\.(\d+)', version)
    release = tuple(map(int, numbers.groups())) if numbers else OLDEST_PADDLE
    if (0, 0) < release < OLDEST_PADDLE:  # 0.0.0 is a build from source
        oldest = '.'.join(map(str, OLDEST_PADDLE))
        raise UserError(f'this is Paddle {version}, but LeanViT needs {oldest} or newer: {_INSTALL}.')


def cpu_settings(processes: int) -> dict[str, str]:
    """Return variables that make Paddle fast on the CPU, for one of `processes` processes that share this machine.

    Paddle uses one thread by default. Its stride kernels make attention four times slower on the CPU (lazy transposes).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    threads = str(max(1, cores // processes))
    return {
        'FLAGS_paddle_num_threads': threads,
        'OMP_NUM_THREADS': threads,
        'FLAGS_use_stride_kernel': '0',
        'PADDLE_DISTRI_BACKEND': 'gloo',
        **_MALLOC,
    }


# ---------------------------------------------------------------------------------------------------- launchers
def launched() -> tuple[int, int] | None:
    """Return (rank, world size) if a launcher started this process; None if its variables are missing or inconsistent."""
    rank, size = (os.environ.get(name, '') for name in (_RANK, _SIZE))
    endpoints = os.environ.get(_ENDPOINTS, '').split(',')
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size) == len(endpoints)):
        return None
    return (int(rank), int(size)) if os.environ.get(_ENDPOINT) == endpoints[int(rank)] else None


def clear_launcher_variables() -> None:
    """Remove the variables of a launcher that did not start this process, and print their names."""
    names = [name for name in _LAUNCHER if os.environ.pop(name, None) is not None]
    if names:
        print(f'note: {", ".join(names)} are left over from another job and ignored.', file=sys.stderr)


def _require_single_process() -> None:
    """Check that no launcher started several processes of this command, and remove leftover launcher variables.

    Raises:
        UserError: Paddle's launcher started several processes.
    """
    rank_and_size = launched()
    if rank_and_size is not None and rank_and_size[1] > 1 and _is_child_of_launcher():
        raise UserError(
            f"a launcher started {rank_and_size[1]} processes of '{sys.argv[0]}', which works in one: start it with "
            'python alone; main_multi_gpu.py trains in several.'
        )
    clear_launcher_variables()


def _is_child_of_launcher() -> bool:
    """Return True if /proc names Paddle's launcher as the parent process."""
    try:
        with open(f'/proc/{os.getppid()}/cmdline', 'rb') as file:
            command = file.read()
    except OSError:
        return False
    return b'paddle.distributed' in command or b'paddle/distributed' in command or b'fleetrun' in command


# ---------------------------------------------------------------------------------------------------- start
def start_paddle(single_process: bool = True) -> None:
    """Set variables for the device and import Paddle; for the CPU restart the process once, so that glibc reads them.

    A command calls it before any module that imports Paddle. Variables that are set already are never changed.

    Args:
        single_process: False where a launcher may have started several ranks of this command.
    """
    if single_process:
        _require_single_process()
    if is_gpu_build():
        os.environ.update({**_GPU_SETTINGS, **os.environ})
    else:
        _set_cpu_variables()
    import_paddle()


def _set_cpu_variables() -> None:
    processes = os.environ.get('PADDLE_LOCAL_SIZE', '') if launched() else ''
    settings = cpu_settings(max(1, int(processes)) if processes.isdecimal() else 1)
    missing = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(missing)
    if sys.platform == 'linux' and _MALLOC.keys() & missing.keys():
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until `utils.cli.begin` unblocks them
        os.execv(sys.executable, command_line())


def command_line() -> list[str]:
    """Return the command of this process, with the interpreter's flags, and `-m NAME` if it runs a module."""
    if hasattr(sys, 'orig_argv'):  # Python 3.10
        return [sys.executable, *sys.orig_argv[1:]]
    spec = sys.modules['__main__'].__spec__
    script = _ARGV[:1] if spec is None else ['-m', spec.name.removesuffix('.__main__')]
    return [sys.executable, *subprocess._args_from_interpreter_flags(), *script, *_ARGV[1:]]


@functools.cache
def _load_openmp() -> ctypes.CDLL | None:
    """Load Intel's OpenMP runtime of the Paddle package before any other, so that all its libraries share one thread pool.

    MKL needs this runtime, and oneDNN GNU's, whose functions Intel's offers, too. The waiting threads of two pools take
    each other's cores: a training step is up to twice as slow.

    Returns:
        The library; None if the package has none.
    """
    spec = importlib.util.find_spec('paddle')
    for folder in (spec and spec.submodule_search_locations) or ():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(os.path.join(folder, 'libs', 'libiomp5.so'), mode=ctypes.RTLD_GLOBAL)
    return None


@contextlib.contextmanager
def kept_openmp_threads() -> Iterator[None]:
    """Restore the number of OpenMP threads of this Python thread after the block, in Paddle's CPU build."""
    library = None if is_gpu_build() else _load_openmp()
    count = library.omp_get_max_threads() if library else 0
    try:
        yield
    finally:
        if library:
            library.omp_set_num_threads(count)


def import_paddle() -> None:
    """Import Paddle without its warnings on threads and compilers, and without its signal handlers.

    Raises:
        UserError: Paddle is too old, or installed twice.
    """
    _check_builds()
    ensure_home()
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings('ignore', message=message)
    os.environ.setdefault('GLOG_minloglevel', '2')  # Paddle's C++ code logs errors only
    if not is_gpu_build():
        _load_openmp()
    output = io.StringIO()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stderr(output):
            paddle = importlib.import_module('paddle')
            # The report of a crash by Paddle's handlers would follow the sentence that explains it.
            getattr(paddle, 'disable_signal_handler', bool)()
    finally:
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        lines = output.getvalue().splitlines(keepends=True)
        sys.stderr.writelines(line for line in lines if 'OMP_NUM_THREADS' not in line)
    _check_version(str(getattr(paddle, '__version__', '')))
