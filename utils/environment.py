# SPDX-License-Identifier: Apache-2.0
"""What must be in the environment before Paddle is imported. Nothing here imports Paddle, and nothing overrides the user."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import warnings

# A training step frees and takes back the same large buffers; glibc would hand them to the kernel and fault them in again
# each time, which makes operations on them two to three times slower. Read by glibc at process start only.
_MALLOC = {
    'MALLOC_MMAP_THRESHOLD_': '4294967296',
    'MALLOC_TRIM_THRESHOLD_': '17179869184',
    'MALLOC_TOP_PAD_': '67108864',
}


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

    Does nothing on a GPU build, whose defaults are right, and nothing to variables that are set already.
    """
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
