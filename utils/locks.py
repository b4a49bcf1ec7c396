# SPDX-License-Identifier: Apache-2.0
"""Locks of files: one process at a time, on this machine or, over NFS, on several."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class LockedError(Exception):
    """Another process holds the lock; the text says which, as far as it is known."""


@contextlib.contextmanager
def file_lock(path: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; remove it afterwards.

    The lock is the kernel's (POSIX record lock), not the presence of the file: a killed process leaves no lock, and what
    the file holds only names the owner. Where the file system has no locks, nothing is locked.

    Raises:
        LockedError: another process holds it.
        OSError: the file cannot be written.
    """
    handle = _open_locked(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while the lock is held, so that this is our file
        os.close(handle)


def _open_locked(path: str) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
            if _is_at(handle, path):  # else the last owner removed the file after it was opened here
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
    except OSError:  # no locks here
        pass


def _is_at(handle: int, path: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False
