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

from engine.heartbeat import FILE, Heartbeat, Watch
from engine.supervise import GRACE, Supervisor, Worker
from utils.environment import (
    clear_launcher_variables,
    command_line,
    cpu_settings,
    import_paddle,
    is_gpu_build,
    launched,
)
from utils.errors import UserError
from utils.processes import Guard, die_with_parent
from utils.reports import CONSOLE, REPORTS, describe_handle
from utils.signals import SIGNALS, handle_signals


def is_worker() -> bool:
    """Return True if this launcher or Paddle's started this process."""
    return launched() is not None


def launch(processes: int | None = None, limit: float = 60.0) -> int:
    """Run the command line of this process in one process per device and wait for them.

    Args:
        processes: number of processes; None or -1: `NPROC`, else one per visible GPU, or two on the CPU.
        limit: seconds that the other processes wait for a stopped one; 0: no limit.

    Returns:
        Exit status: 0 if all processes succeed, 128 + n after signal n, else that of the first process that reported an
        error, or 1.
    """
    clear_launcher_variables()
    devices = _devices(processes)
    settings = {} if is_gpu_build() else cpu_settings(len(devices))
    endpoints = [f'127.0.0.1:{port}' for port in _free_ports(len(devices))]
    reports, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    reports.setblocking(False)
    handles = (sender.fileno(), os.dup(sys.stderr.fileno()), _memory_file())
    shared = {
        **settings,
        **os.environ,
        'PADDLE_TRAINERS_NUM': str(len(devices)),
        'PADDLE_LOCAL_SIZE': str(len(devices)),
        'PADDLE_TRAINER_ENDPOINTS': ','.join(endpoints),
        'PADDLE_MASTER': endpoints[0],
        REPORTS: describe_handle(sender.fileno()),
        CONSOLE: describe_handle(handles[1]),
        FILE: f'/dev/fd/{handles[2]}',
    }
    for name in ('MASTER_ADDR', 'MASTER_PORT'):  # set by other frameworks; Paddle prefers them to PADDLE_MASTER
        shared.pop(name, None)
    watch = Watch(Heartbeat.create(shared[FILE], len(devices)))
    workers: list[Worker] = []
    with reports, sender, Guard(GRACE) as guard:
        received = _forward_signals(workers)
        for rank, device in enumerate(devices):
            variables = {'PADDLE_TRAINER_ID': str(rank), 'PADDLE_CURRENT_ENDPOINT': endpoints[rank]}
            if device is not None:
                variables['FLAGS_selected_gpus'] = device
            if not received:
                _start_worker(workers, command_line(), {**shared, **variables}, handles)
                guard.watch(workers[-1].process.pid)
        return Supervisor(workers, received, reports, watch, limit).run()


def _memory_file() -> int:
    """Return the handle of a file without a name, which is freed where this process is killed."""
    if hasattr(os, 'memfd_create'):
        return os.memfd_create('leanvit')
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _start_worker(workers: list[Worker], command: list[str], variables: dict[str, str], handles: tuple) -> None:
    # A signal that arrives here is forwarded to this worker too.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    output, end = os.pipe()
    os.set_blocking(output, False)
    try:
        process = subprocess.Popen(command, env=variables, stderr=end, pass_fds=handles, preexec_fn=_set_up_worker)
        workers.append(Worker(len(workers), process, output))
    finally:
        os.close(end)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _set_up_worker() -> None:
    os.setsid()  # Ctrl-C reaches the workers once, through this process
    die_with_parent(signal.SIGTERM)
    handle_signals(signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _forward_signals(workers: list[Worker]) -> list[int]:
    """Forward signals to the workers: SIGTERM first, SIGKILL for a second one. Returns the list of received signals."""
    received: list[int] = []

    def forward(number: int, _frame) -> None:
        received.append(number)
        for worker in workers:
            worker.send(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    handle_signals(forward)
    return received


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
