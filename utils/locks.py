# SPDX-License-Identifier: Apache-2.0
"""File locks: one process at a time, on this machine or, over NFS, on several machines."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class LockedError(Exception):
    """Another process holds the lock; the text names the process if it is known."""


@contextlib.contextmanager
def file_lock(path: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; remove it afterwards.

    The lock is a POSIX record lock of the kernel, not the presence of the file, so a killed process releases it. The
    content of the file only names the owner. File systems without locks lock nothing.

    Raises:
        LockedError: another process holds it.
        OSError: the file cannot be written.
    """
    handle = _open_locked(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while the lock is held, so that no other process owns the file
        os.close(handle)


@contextlib.contextmanager
def exclusive(path: str, log: Callable[[str], None], pause: float = 0.5) -> Iterator[None]:
    """Hold the lock file `path`; wait while another process, here or on another machine, holds it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    said = False
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(file_lock(path))
            except LockedError as error:
                if not said:
                    log(f'----- Waiting for {error}, which holds {path!r}.')
                said = True
            else:
                yield
                return
        time.sleep(pause)


def _open_locked(path: str) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
            if _is_at(handle, path):  # otherwise the last owner removed the file after this process opened it
                os.ftruncate(handle, 0)
                os.write(handle, f'process {os.getpid()} on {socket.gethostname()}\n'.encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows both
        owner = os.read(handle, 1000).decode(errors='replace').strip()
        raise LockedError(owner if owner and owner.isprintable() else 'another process') from None
    except OSError:  # the file system has no locks
        pass


def _is_at(handle: int, path: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False
