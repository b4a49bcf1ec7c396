# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file holds either its old or its new content, and a full disk gives one clear sentence."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from utils.errors import UserError

# File names may hold bytes that are not UTF-8. Python decodes them to surrogates, which UTF-8 cannot encode.
TEXT = {'encoding': 'utf-8', 'errors': 'backslashreplace'}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# A large file with fewer blocks on disk than one in so many is not data but holes, which read as gigabytes of zeros.
SPARSE, SPARSE_FROM = 32, 64 << 20  # one block in 32; bytes


def open_regular(path: str | os.PathLike, limit: int | None = None, **text: Any) -> IO:
    """Open a regular file for reading; refuse pipes and devices, which may block or have no end.

    Args:
        limit: maximum size in bytes; None: no limit.
        text: options of `io.TextIOWrapper`, such as the encoding; none: the file is binary.

    Raises:
        OSError: the file cannot be opened, is not regular, exceeds the limit, or consists of holes; `strerror` says which.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            kind = 'pipe' if stat.S_ISFIFO(found.st_mode) else 'device'
            raise OSError(errno.EINVAL, f'it is a {kind} and not a regular file')
        if limit is not None and found.st_size > limit:
            raise OSError(errno.EFBIG, f'it has {found.st_size} bytes, more than the {limit} that are read')
        stored = getattr(found, 'st_blocks', 0) * 512  # some file systems do not count blocks
        if found.st_size > SPARSE_FROM and 0 < stored < found.st_size // SPARSE:
            raise OSError(errno.EINVAL, f'it has holes: {stored} of {found.st_size} bytes are on disk')
        binary = os.fdopen(handle, 'rb')
    except BaseException:
        os.close(handle)
        raise
    return io.TextIOWrapper(binary, **text) if text else binary


def read_regular(path: str | os.PathLike, limit: int) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes. Raises as `open_regular` does."""
    with open_regular(path, limit) as file:
        return file.read()


def cannot_write(path: str, error: OSError, note: str = '') -> UserError:
    """Return the error for a file that cannot be written: which file, why, and what to do."""
    free = 'free space there, or ' if error.errno in NO_SPACE else ''
    return UserError(f"cannot write '{path}': {error.strerror or error}{note}; {free}write elsewhere (-output).")


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn an OSError of the block, which writes to `path`, into a UserError.

    BrokenPipeError passes: the reader of a pipe exited, so nothing is wrong with the file.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def atomic_write(path: str, mode: str = 'wb') -> Iterator[IO]:
    """Open a temporary file beside `path`; if the block succeeds, sync the file and rename it to `path`.

    After an error or a kill, `path` keeps its old content. An error removes the temporary file.

    Raises:
        UserError: a full or read-only disk.
    """
    folder = os.path.dirname(os.path.abspath(path))
    temporary = None
    try:
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f'.{os.path.basename(path)}.', suffix='.tmp', dir=folder)
        text = {} if 'b' in mode else TEXT
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # exFAT and many network file systems have no file modes
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            _remove(temporary)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise cannot_write(path, error, ' (what it held is untouched)') from error
        raise
    _sync_folder(folder)


def link_or_copy(source: str, path: str) -> None:
    """Give the file `source` the name `path` too, or copy it where the file system has no hard links.

    Raises:
        UserError: a full or read-only disk.
    """
    temporary = os.path.join(os.path.dirname(path), f'.{os.path.basename(path)}.link.tmp')
    try:
        os.link(source, temporary)
        os.replace(temporary, path)
    except (OSError, NotImplementedError):
        with open(source, 'rb') as original, atomic_write(path) as copy:
            shutil.copyfileobj(original, copy)
    finally:
        _remove(temporary)  # os.replace leaves it where both are links to one file


def json_text(value: Any, **options: Any) -> str:
    """Return `json.dumps` of a value with NaN and infinite numbers as null, since JSON has no such numbers."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: str) -> None:
    """Sync a folder to make a rename in it durable; not every file system supports that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
