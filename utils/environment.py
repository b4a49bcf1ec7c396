# SPDX-License-Identifier: Apache-2.0
"""What must be in the environment before Paddle is imported. Nothing here imports Paddle.

Nothing overrides the user, but for a HOME that cannot be written to.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import tempfile
import warnings

# A training step frees and takes back the same large buffers; glibc would hand them to the kernel and fault them in again
# each time, which makes operations on them two to three times slower. Read by glibc at process start only.
_MALLOC = {
    'MALLOC_MMAP_THRESHOLD_': '4294967296',
    'MALLOC_TRIM_THRESHOLD_': '17179869184',
    'MALLOC_TOP_PAD_': '67108864',
}


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


def tune_process() -> None:
    """Called by a launcher before it imports Paddle; restarts the process once so that glibc sees its variables.

    A GPU build has the right defaults, and what is set already stays; only a HOME that cannot be written to is replaced.
    """
    ensure_home()
    warnings.filterwarnings('ignore', message='No ccache found')  # Paddle tells users who compile nothing
    if is_gpu_build():
        return
    processes = int(os.environ.get('PADDLE_LOCAL_SIZE', '1'))
    settings = cpu_settings(processes)
    missing = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(missing)
    if sys.platform == 'linux' and _MALLOC.keys() & missing.keys():
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv])
