# SPDX-License-Identifier: Apache-2.0
"""What must be in the environment before Paddle is imported, and that import.

Nothing here overrides the user, but for a HOME that cannot be written to.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings

from utils.cli import SIGNALS
from utils.errors import UserError

OLDEST_PADDLE = (3, 3)
_ARGV = sys.argv[:]  # before `utils.cli.run_command` takes the name of a command

# A training step frees and takes back the same large buffers; glibc would hand them to the kernel and fault them in again
# each time, which makes operations on them two to three times slower. Read by glibc at process start only.
_MALLOC = {
    'MALLOC_MMAP_THRESHOLD_': '4294967296',
    'MALLOC_TRIM_THRESHOLD_': '17179869184',
    'MALLOC_TOP_PAD_': '67108864',
}

# Warnings that matter to those who work on Paddle: of compiling, and of exporting a program.
_REMARKS = ('No ccache found', "Tensor do not have 'place' interface")

# What launchers set for each process, and what may be left over from one.
_RANK, _SIZE = 'PADDLE_TRAINER_ID', 'PADDLE_TRAINERS_NUM'
_ENDPOINT, _ENDPOINTS = 'PADDLE_CURRENT_ENDPOINT', 'PADDLE_TRAINER_ENDPOINTS'
_LAUNCHER = (
    _RANK, _SIZE, _ENDPOINT, _ENDPOINTS, 'PADDLE_MASTER', 'PADDLE_GLOBAL_RANK', 'PADDLE_GLOBAL_SIZE', 'PADDLE_LOCAL_RANK',
    'PADDLE_LOCAL_SIZE', 'PADDLE_NNODES', 'PADDLE_RANK_IN_NODE', 'FLAGS_selected_gpus', 'LEANVIT_FIRST_ERROR',
)  # fmt: skip


# Paddle, VisualDL and Matplotlib make folders below HOME when they are imported, and fail or complain where they cannot.
_BELOW_HOME = ('', '.cache', '.cache/paddle', '.config', '.visualdl')
_USERS_HOME = 'LEANVIT_HOME'  # the HOME that was replaced


def ensure_home() -> None:
    """Points HOME to a folder below LEANVIT_CACHE, or a temporary one, where it cannot be written to."""
    home = os.path.expanduser('~')
    if os.path.isdir(home) and all(_is_writable(os.path.join(home, name)) for name in _BELOW_HOME):
        return
    os.environ.update({_USERS_HOME: home, 'HOME': _spare_home()})


def _is_writable(path: str) -> bool:
    """Whether a folder can be written to; one that is missing can be made."""
    return not os.path.lexists(path) or (os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK))


def _spare_home() -> str:
    """A folder of this user: the same one in each run and process, where that is possible."""
    cache = os.environ.get('LEANVIT_CACHE')
    folders = [os.path.join(os.path.abspath(cache), 'home')] if cache else []
    for folder in [*folders, os.path.join(tempfile.gettempdir(), f'leanvit-home-{os.getuid()}')]:
        with contextlib.suppress(OSError):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if _is_writable(folder) and os.stat(folder).st_uid == os.getuid():
                return folder
    return tempfile.mkdtemp(prefix='leanvit-home-')


def expand_user(path: str) -> str:
    """`path` with a leading `~` as the user means it, also where `ensure_home` replaced HOME."""
    home = os.environ.get(_USERS_HOME)
    if home is not None and path.split('/')[0] == '~':
        return home + path[1:]
    return os.path.expanduser(path)


def is_gpu_build() -> bool:
    """Whether the installed Paddle was built for GPUs."""
    try:
        importlib.metadata.version('paddlepaddle-gpu')
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def cpu_settings(processes: int) -> dict[str, str]:
    """Variables that make Paddle fast on the CPU, for one of `processes` processes that share this machine.

    Threads: Paddle's default is one. Stride kernels: lazy transposed views cost attention a factor of four on the CPU.
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
    """(rank, world size) in a process that a launcher started; None where the variables are missing or contradict."""
    rank, size = (os.environ.get(name, '') for name in (_RANK, _SIZE))
    endpoints = os.environ.get(_ENDPOINTS, '').split(',')
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size) == len(endpoints)):
        return None
    return (int(rank), int(size)) if os.environ.get(_ENDPOINT) == endpoints[int(rank)] else None


def forget_launcher() -> None:
    """Drop the variables of a launcher that did not start this process; said in one line, since somebody set them."""
    names = [name for name in _LAUNCHER if os.environ.pop(name, None) is not None]
    if names:
        print(f'note: {", ".join(names)} are left over from another job and ignored.', file=sys.stderr)


def _stay_alone() -> None:
    """Make this the only process of its job.

    Raises:
        UserError: Paddle's launcher started several.
    """
    rank_and_size = launched()
    if rank_and_size is not None and rank_and_size[1] > 1 and _is_child_of_launcher():
        raise UserError(
            f"a launcher started {rank_and_size[1]} processes of '{sys.argv[0]}', which works in one: start it with "
            'python alone; main_multi_gpu.py trains in several.'
        )
    forget_launcher()


def _is_child_of_launcher() -> bool:
    """Whether the parent process is Paddle's launcher, as far as /proc says so."""
    try:
        with open(f'/proc/{os.getppid()}/cmdline', 'rb') as file:
            command = file.read()
    except OSError:
        return False
    return b'paddle.distributed' in command or b'paddle/distributed' in command or b'fleetrun' in command


# ---------------------------------------------------------------------------------------------------- start
def start_paddle(alone: bool = True) -> None:
    """Called by a command before anything that imports Paddle; restarts the process once so that glibc sees its variables.

    On a GPU build, whose defaults are right, no variable is set, and nowhere one that is set already.

    Args:
        alone: False where a launcher may have started several processes, which work together.
    """
    if alone:
        _stay_alone()
    if not is_gpu_build():
        _tune()
    import_paddle()


def _tune() -> None:
    processes = os.environ.get('PADDLE_LOCAL_SIZE', '') if launched() else ''
    settings = cpu_settings(max(1, int(processes)) if processes.isdecimal() else 1)
    missing = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(missing)
    if sys.platform == 'linux' and _MALLOC.keys() & missing.keys():
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until `begin`
        os.execv(sys.executable, command_line())


def command_line() -> list[str]:
    """This process's command, with the interpreter's flags, and `-m NAME` where it was started so."""
    if hasattr(sys, 'orig_argv'):  # Python 3.10
        return [sys.executable, *sys.orig_argv[1:]]
    spec = sys.modules['__main__'].__spec__
    script = _ARGV[:1] if spec is None else ['-m', spec.name.removesuffix('.__main__')]
    return [sys.executable, *subprocess._args_from_interpreter_flags(), *script, *_ARGV[1:]]


def import_paddle() -> None:
    """Import Paddle without its remarks on threads and compilers, and without its own handler of SIGTERM.

    Raises:
        UserError: it is too old.
    """
    ensure_home()
    for remark in _REMARKS:
        warnings.filterwarnings('ignore', message=remark)
    os.environ.setdefault('GLOG_minloglevel', '2')  # of Paddle's C++: errors
    remarks = io.StringIO()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stderr(remarks):
            paddle = importlib.import_module('paddle')
    finally:
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        lines = remarks.getvalue().splitlines(keepends=True)
        sys.stderr.writelines(line for line in lines if 'OMP_NUM_THREADS' not in line)
    version = re.match(r'(\d+)\.(\d+)', str(getattr(paddle, '__version__', '')))
    release = tuple(map(int, version.groups())) if version else OLDEST_PADDLE
    if (0, 0) < release < OLDEST_PADDLE:  # 0.0.0 is a build from source
        raise UserError(
            f'this is Paddle {paddle.__version__}, but LeanViT needs {".".join(map(str, OLDEST_PADDLE))} or newer: '
            'pip install -r requirements.txt, or requirements-gpu.txt.'
        )
