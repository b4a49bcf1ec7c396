# SPDX-License-Identifier: Apache-2.0
"""Launcher for one machine: start one process per device, forward signals, and stop all processes if one fails.

Workers get the same variables as from `paddle.distributed.launch`. For several machines use Paddle's own launcher.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

from engine.heartbeat import FILE, Heartbeat, Watch
from utils.cli import SIGNALS, handle_signals
from utils.environment import (
    clear_launcher_variables,
    command_line,
    cpu_settings,
    import_paddle,
    is_gpu_build,
    launched,
)
from utils.errors import UserError
from utils.processes import die_with_parent

GRACE = 30.0  # seconds for a process to finish its step and save, as under Paddle's launcher


def is_worker() -> bool:
    """Return True if this launcher or Paddle's started this process."""
    return launched() is not None


def launch(processes: int | None = None) -> int:
    """Run the command line of this process in one process per device and wait for them.

    Args:
        processes: number of processes; None or -1: `NPROC`, else one per visible GPU, or two on the CPU.

    Returns:
        Exit status: 0 if all processes succeed, 128 + n after signal n, else that of the first process that failed.
    """
    clear_launcher_variables()
    devices = _devices(processes)
    settings = {} if is_gpu_build() else cpu_settings(len(devices))
    endpoints = [f'127.0.0.1:{port}' for port in _free_ports(len(devices))]
    with tempfile.TemporaryDirectory(prefix='leanvit-') as folder:
        shared = {
            **settings,
            **os.environ,
            'PADDLE_TRAINERS_NUM': str(len(devices)),
            'PADDLE_LOCAL_SIZE': str(len(devices)),
            'PADDLE_TRAINER_ENDPOINTS': ','.join(endpoints),
            'PADDLE_MASTER': endpoints[0],
            'LEANVIT_FIRST_ERROR': os.path.join(folder, 'error'),
            FILE: os.path.join(folder, 'heartbeat'),
        }
        for name in ('MASTER_ADDR', 'MASTER_PORT'):  # set by other frameworks; Paddle prefers them to PADDLE_MASTER
            shared.pop(name, None)
        watch = Watch(Heartbeat.create(shared[FILE], len(devices)))
        workers: list[subprocess.Popen] = []
        received = _forward_signals(workers)
        for rank, device in enumerate(devices):
            variables = {'PADDLE_TRAINER_ID': str(rank), 'PADDLE_CURRENT_ENDPOINT': endpoints[rank]}
            if device is not None:
                variables['FLAGS_selected_gpus'] = device
            if not received:
                _start_worker(workers, command_line(), {**shared, **variables})
        return _supervise(workers, received, watch)


def _start_worker(workers: list[subprocess.Popen], command: list[str], variables: dict[str, str]) -> None:
    mask = signal.pthread_sigmask(
        signal.SIG_BLOCK, SIGNALS
    )  # a signal that arrives here is forwarded to this worker too
    try:
        workers.append(subprocess.Popen(command, env=variables, preexec_fn=_set_up_worker))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _set_up_worker() -> None:
    os.setsid()  # Ctrl-C reaches the workers once, through this process
    die_with_parent(signal.SIGTERM)
    handle_signals(signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _forward_signals(workers: list[subprocess.Popen]) -> list[int]:
    """Forward signals to the workers: SIGTERM first, SIGKILL for a second one. Returns the list of received signals."""
    received: list[int] = []

    def forward(number: int, _frame) -> None:
        received.append(number)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    handle_signals(forward)
    return received


def _supervise(workers: list[subprocess.Popen], received: list[int], watch: Watch) -> int:
    deadline = None
    status = 0
    while any(worker.poll() is None for worker in workers):
        failed = [worker.returncode for worker in workers if worker.returncode]
        problem = None if failed or received or deadline else watch.problem()
        if problem:
            print(f'error: {problem}', file=sys.stderr, flush=True)
            failed = [1]
        if (failed or received) and deadline is None:
            deadline = time.monotonic() + GRACE
            if failed and not received:  # the other ranks wait for it in a collective, or fail there
                status = failed[0]
                deadline = time.monotonic() + 5.0
                for worker in workers:
                    if worker.poll() is None:
                        worker.terminate()
        if deadline is not None and time.monotonic() > deadline:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
        time.sleep(0.05)
    if received:
        return 128 + received[0]
    status = status or next((worker.returncode for worker in workers if worker.returncode), 0)
    return 128 - status if status < 0 else status


def _devices(processes: int | None) -> list[str | None]:
    """Return the local ids of the devices to use, one per process; None stands for the CPU."""
    if not is_gpu_build():
        count = _count(processes, 'NPROC', default=2)
        return [None] * count
    import_paddle()
    import paddle  # counts the visible GPUs without creating a context on any

    visible = paddle.device.cuda.device_count()
    if visible == 0:
        raise UserError(
            'this Paddle was built for GPUs, but no GPU is visible; set CUDA_VISIBLE_DEVICES or install paddlepaddle.'
        )
    count = _count(processes, 'NPROC', default=visible)
    if count > visible:
        raise UserError(f'{count} processes are requested, but only {visible} GPUs are visible; lower -ngpus or NPROC.')
    return [str(index) for index in range(count)]


def _count(processes: int | None, variable: str, default: int) -> int:
    text = os.environ.get(variable, '')
    if processes in (None, -1):
        try:
            processes = int(text) if text else default
        except ValueError:
            raise UserError(f"{variable} is '{text}', but must be a number of processes.") from None
    if processes < 1:
        raise UserError(f'{processes} processes are requested; give at least 1 with -ngpus or {variable}.')
    return processes


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for handle in sockets:
            handle.bind(('127.0.0.1', 0))
        return [handle.getsockname()[1] for handle in sockets]
    finally:
        for handle in sockets:
            handle.close()
