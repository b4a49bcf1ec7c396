# SPDX-License-Identifier: Apache-2.0
"""Temporary folders; those of killed processes are removed later."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_PREFIX = 'leanvit-'
_YOUNG = 60.0  # seconds in which a folder may not be locked yet


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[str]:
    """Create a temporary folder for the block; remove those of the same name that killed processes left.

    The folder is locked while its process lives, so that processes in other containers are recognized, too.
    """
    _remove_stale(os.path.join(tempfile.gettempdir(), f'{_PREFIX}{name}-'))
    with tempfile.TemporaryDirectory(prefix=f'{_PREFIX}{name}-') as folder:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _lock(handle)
            yield folder
        finally:
            os.close(handle)


def _remove_stale(prefix: str) -> None:
    for path in glob.glob(glob.escape(prefix) + '?' * 8):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                found = os.fstat(handle)
                if found.st_uid == os.getuid() and time.time() - found.st_mtime > _YOUNG and _lock(handle):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open folder until the handle is closed. Return False if another process holds the lock."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # also where the file system has no locks
        return False
    return True
