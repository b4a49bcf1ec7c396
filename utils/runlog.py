# SPDX-License-Identifier: Apache-2.0
"""What a run leaves to read: the screen, the log files and metrics.jsonl.

log.txt         the main process, averages over all processes; lines carry `MASTER_LOG`
log_<rank>.txt  one process
log_all.txt     every line of every process
"""

from __future__ import annotations

import json
import os
import sys
import time

from tqdm import tqdm

from utils.files import atomic_write


class RunLog:
    """Log files of one process of a run. Each line is flushed, so that a killed run keeps its last words."""

    def __init__(self, folder: str, rank: int):
        self.folder = folder
        self.rank = rank
        self._local = self._open(f'log_{rank}.txt')
        self._all = self._open('log_all.txt')
        self._master = self._open('log.txt') if rank == 0 else None

    def _open(self, name: str):
        return open(os.path.join(self.folder, name), 'a', buffering=1, encoding='utf-8')

    def local(self, message: str) -> None:
        """A line about this process, to its own file."""
        self._write(message, (self._local, self._all))

    def master(self, message: str) -> None:
        """A line about the run: printed and logged by the main process, dropped by the others."""
        if self._master is not None:
            line = self._write(f'MASTER_LOG {message}', (self._master, self._all))
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    @staticmethod
    def _write(message: str, files) -> str:
        line = f'{time.strftime("%m/%d %H:%M:%S")} {message}'
        for file in files:
            file.write(line + '\n')
        return line

    def close(self) -> None:
        for file in filter(None, (self._local, self._all, self._master)):
            file.close()


class MetricsFile:
    """metrics.jsonl: one JSON object per epoch of training and per evaluation, each with its `step`."""

    def __init__(self, path: str):
        self.path = path

    def append(self, row: dict) -> None:
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')

    def rewind(self, step: int, validated: bool) -> None:
        """Drops rows that a run resumed at optimiser step `step` is about to write again.

        Args:
            validated: whether the evaluation due at that very step was done.
        """
        if not os.path.exists(self.path):
            return
        rows = []
        with open(self.path, encoding='utf-8') as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:  # cut off by a crash
                    continue
                if row['step'] < step or (row['step'] == step and (validated or row['kind'] == 'train')):
                    rows.append(line if line.endswith('\n') else line + '\n')
        with atomic_write(self.path, 'w') as file:
            file.writelines(rows)


def progress(iterable, total: int, label: str, shown: bool):
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(
        iterable, total=total, desc=label, leave=False, disable=not (shown and sys.stderr.isatty()), dynamic_ncols=True
    )
