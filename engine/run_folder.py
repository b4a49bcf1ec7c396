# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: locked by one run at a time, and not written before model, data and weights are loaded."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from config import get_config
from engine.checkpoint import LAST
from engine.distributed import Context
from engine.run_info import write_run_info
from utils.errors import UserError
from utils.files import atomic_write
from utils.locks import LockedError, file_lock
from utils.run_paths import follow_latest, point_latest
from utils.runlog import RunLog


@dataclass(frozen=True)
class RunFolder:
    """Location of a run.

    Attributes:
        root: folder of all runs, which holds `latest`.
        name: path of the run's folder below `root`.
    """

    root: str
    name: str

    @property
    def path(self) -> str:
        return os.path.join(self.root, self.name)

    @property
    def has_checkpoint(self) -> bool:
        return os.path.exists(os.path.join(self.path, LAST))


@contextlib.contextmanager
def lock_folder(config, context: Context) -> Iterator[RunFolder]:
    """Find or create the run's folder, the same on all ranks, and lock it while the block runs.

    The folder is that of `-resume=FOLDER` or TAG, else `train-` or `eval-` with a time stamp. Only the lock file is
    written to an existing folder. A new folder that is empty at the end is removed.

    Raises:
        UserError: another run holds the lock, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_locked_folder(config)) if context.is_main else RunFolder('', '')
        root, name = context.broadcast_text(f'{folder.root}\0{folder.name}').split('\0')
        yield RunFolder(root, name)


def open_folder(folder: RunFolder, config, context: Context, log: RunLog, keep_config: bool = False) -> None:
    """Write the resolved configuration, `latest`, and the log with the lines buffered so far.

    `keep_config` leaves config.yaml as it is: a finished run stays described by the values that it was trained with.

    All ranks must have built and loaded everything: an error after this point may leave a changed folder.
    """
    context.barrier()
    with _disk_errors(folder.path):
        if context.is_main:
            for stale in glob.glob(os.path.join(glob.escape(folder.path), '.*.tmp')):  # left by a killed process
                os.unlink(stale)
        log.open(folder.path)
        keep_config = keep_config or config.EVAL and folder.has_checkpoint  # a training run needs its own to resume
        if context.is_main and not keep_config:
            _write_config(config, folder, context)
    if context.is_main and not config.EVAL:
        try:
            point_latest(folder.root, folder.name)
        except UserError as error:  # the run itself is not affected
            log.master(f'----- {error}')


# ---------------------------------------------------------------------------------------------------- locking
@contextlib.contextmanager
def _locked_folder(config) -> Iterator[RunFolder]:
    path, is_new = follow_latest(config.MODEL.RESUME or ''), False
    with contextlib.ExitStack() as stack:
        if not os.path.isdir(path) or config.EVAL:
            path, is_new = _create(config)
        if is_new:
            stack.callback(_remove_empty, path)
        with _disk_errors(path):
            try:
                stack.enter_context(file_lock(os.path.join(path, '.lock')))
            except LockedError as owner:
                raise UserError(
                    f"another run ({owner}) writes to '{path}'; wait for its end or choose another -tag."
                ) from None
        yield _locate(path, config)


def _create(config) -> tuple[str, bool]:
    """Create the folder that TAG names, or one with an unused name. Return its path and whether it is new."""
    root, name = _root(config), os.path.normpath(config.TAG) if config.TAG else ''
    stamp = time.strftime(('eval' if config.EVAL else 'train') + '-%Y%m%d-%H%M%S')
    names = [name] if name else itertools.chain([stamp], (f'{stamp}-{number}' for number in itertools.count(2)))
    with _disk_errors(os.path.join(root, name or stamp)):
        os.makedirs(os.path.join(root, os.path.dirname(name)), exist_ok=True)
        for path in (os.path.join(root, name) for name in names):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)  # fails if a run that started at the same moment has this name
                return path, True
        os.makedirs(path, exist_ok=True)  # raises if it is a file
    return path, False


def _root(config) -> str:
    return os.path.expanduser(config.SAVE) or os.curdir


def _remove_empty(path: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _locate(path: str, config) -> RunFolder:
    """Locate a folder: below SAVE, else below SAVE of the run in it, else below its parent."""
    roots = [_root(config)]
    with contextlib.suppress(UserError):
        roots.append(_root(get_config(os.path.join(path, 'config.yaml'))))
    for root in roots:
        name = _name_below(root, path)
        if name is not None:
            return RunFolder(root, name)
    return RunFolder(*os.path.split(os.path.realpath(path)))


def _name_below(root: str, path: str) -> str | None:
    for resolve in (os.path.realpath, os.path.abspath):  # links first, so that the name does not contain `latest`
        name = os.path.relpath(resolve(path), resolve(root))
        is_below = name.split(os.sep)[0] not in (os.curdir, os.pardir)
        with contextlib.suppress(OSError):
            if is_below and os.path.samefile(os.path.join(root, name), path):
                return name
    return None


# ---------------------------------------------------------------------------------------------------- writing
def _write_config(config, folder: RunFolder, context: Context) -> None:
    saved = config.clone()
    saved.defrost()
    saved.SAVE, saved.TAG, saved.EVAL, saved.MODEL.RESUME, saved.BASE = folder.root, '', False, None, ['']
    saved.TRAIN.LAST_EPOCH, saved.ENGINE, saved.ENGINE_PRECISION = 0, 'dygraph', 'fp32'
    write_run_info(folder.path, config, saved, context)
    with atomic_write(os.path.join(folder.path, 'config.yaml'), 'w') as file:
        file.write(saved.dump())


@contextlib.contextmanager
def _disk_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: thousands of folders
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f"cannot write the run folder '{path}': {reason}; choose another with -output.") from None
