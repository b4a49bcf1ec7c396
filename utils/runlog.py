# SPDX-License-Identifier: Apache-2.0
"""Output of a run: log lines on the screen and in files, metrics.jsonl and VisualDL records.

Every line is written immediately, so that a full disk ends the run at that line, with one sentence.

log.txt         lines of the main process, with averages over all ranks; marked by `MASTER_LOG`
log_<rank>.txt  lines of one rank
log_all.txt     lines of all ranks
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import sys
import time
from collections.abc import Callable
from typing import IO

import numpy as np
from tqdm import tqdm

from utils.cli import discard_output
from utils.errors import UserError
from utils.files import TEXT, atomic_write, cannot_write, json_text, open_regular, writing
from utils.text import printable, printable_lines

_ROW = 1 << 20  # maximum of characters of a row of metrics.jsonl; rows have a few hundred


class RunLog:
    """Log files of one rank. Each line is flushed, so that the log of a killed run is complete.

    Without a folder, lines are printed and buffered until `open` names one.

    Attributes:
        on_error: called with the error of a file that cannot be written, which gets no further lines; None: it is raised.
    """

    def __init__(self, folder: str | None, rank: int):
        self.rank = rank
        self.on_error: Callable[[UserError], None] | None = None
        self._files: dict[str, IO[str]] = {}
        self._lost: set[str] = set()  # files that could not be written
        self._early: list[tuple[str, str]] = []  # file name and line
        if folder is not None:
            self.open(folder)

    def open(self, folder: str) -> None:
        """Open the log files in `folder` for appending, and write the buffered lines to them."""
        for name in (f'log_{self.rank}.txt', 'log_all.txt', *(['log.txt'] if self.rank == 0 else [])):
            path = os.path.join(folder, name)
            with writing(path):
                self._files[name] = open(path, 'a', buffering=1, **TEXT)  # noqa: SIM115 (closed by `close`)
        for name, line in self._early:
            self._write_line(name, line)
        self._early.clear()

    def local(self, message: str) -> None:
        """Write a line about this rank to its own file; the line may continue on further lines."""
        self._write(printable_lines(message), f'log_{self.rank}.txt')

    def master(self, message: str) -> None:
        """Print and log a line about the run, on the main process only."""
        if self.rank == 0:
            self._print(self._write(f'MASTER_LOG {printable(message)}', 'log.txt'))

    def _print(self, line: str) -> None:
        """Print a line. If the reader of a pipe exited or the terminal was closed, the log goes on in the files."""
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            discard_output()
            if isinstance(error, BrokenPipeError) or error.errno == errno.EIO:
                self._write('MASTER_LOG ----- Standard output is closed; the log goes on in its files only.', 'log.txt')
            else:
                self._fail(cannot_write('standard output', error))

    def _write(self, message: str, name: str) -> str:
        line = f'{time.strftime("%m/%d %H:%M:%S")} {message}'
        for target in (name, 'log_all.txt'):
            if self._files:
                self._write_line(target, line + '\n')
            else:
                self._early.append((target, line + '\n'))
        return line

    def _write_line(self, name: str, line: str) -> None:
        if name in self._lost:
            return
        try:
            with writing(self._files[name].name):
                self._files[name].write(line)
        except UserError as error:
            self._lost.add(name)
            self._fail(error)

    def _fail(self, error: UserError) -> None:
        if self.on_error is None:
            raise error
        self.on_error(error)

    def close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # raised before, when the line was written
                file.close()


class MetricsFile:
    """metrics.jsonl: one JSON object per epoch of training and per evaluation, each with its `step`."""

    def __init__(self, path: str):
        self.path = path

    def append(self, row: dict) -> None:
        with writing(self.path), open(self.path, 'a', encoding='utf-8') as file:
            file.write(json_text(row) + '\n')

    def rewind(self, step: int, validated: bool, trained: bool = True) -> None:
        """Drop the rows that a run resumed at optimizer step `step` will write again.

        Args:
            validated: True if the evaluation due at `step` was done.
            trained: True if the row of the epoch that ends at `step` was written.
        """
        if not os.path.exists(self.path):
            return
        rows = []
        with open_regular(self.path, encoding='utf-8', errors='replace') as file:
            for line in iter(lambda: file.readline(_ROW), ''):
                row = _parsed(line)
                if row is None:  # cut off by a crash
                    continue
                if row['step'] < step or (row['step'] == step and (trained if row['kind'] == 'train' else validated)):
                    rows.append(line if line.endswith('\n') else line + '\n')
        with atomic_write(self.path, 'w') as file:
            file.writelines(rows)


def _parsed(line: str) -> dict | None:
    """Return a row of metrics.jsonl, None for a damaged one."""
    try:
        row = json.loads(line)
        return row if isinstance(row['kind'], str) and isinstance(row['step'], (int, float)) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


class VisualDLFile:
    """A file of VisualDL records.

    VisualDL's own LogWriter writes in a thread. On a full disk that thread drops records and exits, and the run then
    waits for it forever.

    Args:
        folder: argument of `visualdl --logdir`; it is created.
    """

    def __init__(self, folder: str):
        from visualdl.component import base_component  # slow to import, and only one process writes

        self._components = base_component
        self.path = os.path.join(folder, f'vdlrecords.{int(time.time()):010d}.log')
        with writing(self.path):
            os.makedirs(folder, exist_ok=True)
            self._file = open(self.path, 'ab')  # noqa: SIM115 (closed by `close`)
        self._append(base_component.meta_data(walltime=_milliseconds()))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._append(self._components.scalar(tag, value, step, _milliseconds()))

    def add_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Add an image [H, W, C], uint8."""
        self._append(self._components.image(tag, image, step, _milliseconds()))

    def _append(self, record) -> None:
        data = record.SerializeToString()
        with writing(self.path):
            self._file.write(struct.pack('<Q', len(data)) + data)
            self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # raised before, when the record was written
            self._file.close()


def _milliseconds() -> int:
    return round(time.time() * 1000)


def progress(iterable, total: int, label: str, shown: bool):
    """Wrap an iterable in a progress bar, which appears on a terminal only."""
    return tqdm(
        iterable, total=total, desc=label, leave=False, disable=not (shown and sys.stderr.isatty()), dynamic_ncols=True
    )
