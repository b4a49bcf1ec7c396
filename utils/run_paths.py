# SPDX-License-Identifier: Apache-2.0
"""Names of runs, and `latest`: a symbolic link in the folder of all runs to the run trained last.

Where the file system has no symbolic links, `latest` is a pointer file, which holds the name of the run in one line.
"""

from __future__ import annotations

import contextlib
import os
import uuid

from utils.errors import UserError
from utils.files import atomic_write

LATEST = 'latest'
_MAX_PATH = 4096  # characters; file systems have no longer ones
_MAX_POINTER = 4096  # bytes; a longer file is no pointer


def check_run_name(name: str) -> None:
    """Raise UserError if a non-empty TAG is not the relative path of a folder below the folder of all runs."""
    pieces = name.split('/')
    if not name.isprintable() or '\\' in name:
        raise UserError(f'TAG is {name!r}, but may hold neither a backslash nor an unprintable character.')
    if os.path.isabs(name) or '..' in pieces or not ''.join(pieces).strip(' .'):
        raise UserError(f"TAG is '{name}', but must name a folder below -output, such as 'a' or 'a/b'.")
    if LATEST in name.lower().split('/'):
        raise UserError(f"TAG is '{name}', but '{LATEST}' stands for the run trained last; choose another name.")


def follow_latest(path: str) -> str:
    """Return `path` with `~` expanded and each `latest`, link or pointer file, replaced by its target."""
    path = os.path.expanduser(path)
    parent, name = os.path.split(path)
    if parent == path or len(path) > _MAX_PATH:
        return path
    parent = follow_latest(parent)
    target = _target(os.path.join(parent, name)) if name == LATEST else None
    return os.path.join(parent, target or name)


def holds_weights(path: str) -> bool:
    """Return True if `path`, with or without `.pdparams`, is a file, or a folder with `.pdparams` files."""
    if os.path.isfile(path) or os.path.isfile(f'{path}.pdparams'):
        return True
    try:
        return any(name.endswith('.pdparams') for name in os.listdir(path))
    except OSError:
        return False


def point_latest(root: str, name: str) -> None:
    """Make `latest` in the folder `root` point to the run `name` below it; keep a folder or file of the user.

    Raises:
        UserError: a full or read-only disk.
    """
    path = os.path.join(root, LATEST)
    if os.path.lexists(path) and _target(path) is None:
        return
    temporary = os.path.join(root, f'.{LATEST}.{uuid.uuid4().hex}.tmp')
    try:
        os.symlink(name, temporary)
        os.replace(temporary, path)  # atomic, so that `latest` always exists while other runs start
    except (OSError, NotImplementedError):
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        with atomic_write(path, 'w') as file:
            file.write(f'{name}\n')


def _target(path: str) -> str | None:
    """Return the target of a link or pointer file; None if `path` is neither."""
    try:
        if os.path.islink(path):
            return os.readlink(path)
        if not os.path.isfile(path) or os.path.getsize(path) > _MAX_POINTER:
            return None
        with open(path, encoding='utf-8') as file:
            text = file.read().rstrip('\n')
    except (OSError, ValueError):
        return None
    return text if text and text.isprintable() else None
