# SPDX-License-Identifier: Apache-2.0
"""Processes that measure, one per framework, and their messages: a request of the driver, then an answer, both JSON objects.

Two frameworks in one process would share OpenMP's threads. Here only the process that was asked computes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from benchmarks.cases import Case
from utils.errors import UserError
from utils.processes import die_with_parent
from utils.text import printable

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TURN = 0.3  # seconds that a turn takes at least: short passes are repeated
_EXIT = 5.0  # seconds in which a process that closed its connection exits
_LENGTH = 300  # characters of a reason
Call = Callable[[], object]  # one pass


class Side(Protocol):
    """A framework, in its process."""

    def versions(self) -> dict[str, str]:
        """Return versions of packages by name. Raises UserError if one is missing."""

    def prepare(self, case: Case) -> tuple[Call, dict]:
        """Build a model and return a pass of a batch, and facts for the JSON file. Raises UserError."""

    def exchange(self, model: str, path: str) -> float | None:
        """Write weights, images and logits of a model to a file; the other side reads it and returns the difference."""


class Stopped(Exception):
    """A process ended, or did not answer in time; the text says which."""


# ---------------------------------------------------------------------------------------------------- in the process
def serve(connection: Connection, side: Side) -> None:
    """Answer the requests of a `Worker` until it closes the connection."""
    die_with_parent()
    server = _Server(side)
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = {'result': getattr(server, request.pop('do'))(**request)}
        except Exception as error:  # of any framework: the case fails, the comparison continues
            text = str(error) if isinstance(error, UserError) else f'{type(error).__name__}: {error}'
            answer = {'error': printable(text, _LENGTH)}
        connection.send_bytes(json.dumps(answer).encode())


class _Server:
    """Requests by name."""

    def __init__(self, side: Side):
        self._side = side
        self._calls: dict[Case, Call] = {}

    def versions(self) -> dict:
        return self._side.versions()

    def exchange(self, model: str, path: str) -> float | None:
        return self._side.exchange(model, path)

    def prepare(self, case: dict) -> dict:
        """Build a case and run one pass. Returns facts."""
        call, facts = self._side.prepare(Case(**case))
        call()
        self._calls[Case(**case)] = call
        return facts

    def turn(self, case: dict) -> tuple[float, float]:
        """Return seconds and processor seconds of a pass, means over those that fit into TURN."""
        call, count = self._calls[Case(**case)], 0
        started, used = time.perf_counter(), time.process_time()
        while (seconds := time.perf_counter() - started) < TURN:
            call()
            count += 1
        return seconds / count, (time.process_time() - used) / count

    def forget(self) -> None:
        """Free what `prepare` built."""
        self._calls.clear()


# ---------------------------------------------------------------------------------------------------- in the driver
class Worker:
    """A process that measures, which ends with the block.

    Args:
        command: its command, to which the number of the handle of the connection is added.
        variables: of its environment, beside those of this process.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]):
        self._connection, other = multiprocessing.Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        with other:
            self._process = subprocess.Popen(
                [*command, str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[other.fileno()],
                cwd=ROOT,
                env={**os.environ, **variables},
            )

    def ask(self, limit: float, do: str, **arguments: Any) -> Any:
        """Send a request and return the result.

        Args:
            limit: seconds to wait.

        Raises:
            UserError: the reason that the process gave.
            Stopped: it ended, or did not answer within `limit`.
        """
        try:
            self._connection.send_bytes(json.dumps({'do': do, **arguments}).encode())
            if not self._connection.poll(limit):
                raise Stopped(f'no result within {limit:.0f} s (-limit)')
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise Stopped(f'the process ended: {self._last_line()}') from None
        if 'error' in answer:
            raise UserError(answer['error'])
        return answer['result']

    def _last_line(self) -> str:
        """Return the last line that the process printed, else its exit status."""
        status = self._process.wait(_EXIT)
        self._log.seek(0)
        lines = self._log.read().decode(errors='replace').split('\n')
        return printable(next((line for line in reversed(lines) if line.strip()), f'exit status {status}'), _LENGTH)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()
        self._log.close()
