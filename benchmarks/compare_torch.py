#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare the speed of this suite with that of PyTorch and timm on this machine's CPU, in one run.

    pip install -r requirements-deploy.txt -r benchmarks/requirements.txt
    python benchmarks/compare_torch.py -rounds 10 -json comparison.json
    python benchmarks/compare_torch.py deit_small_patch16_224 -only inference -precision bf16 -batch 1

Rounds alternate between the frameworks, and only one of them computes at a time. docs/benchmark.md explains the tables.
"""

from __future__ import annotations

import os
import sys

if __name__ == '__main__':
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import contextlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from benchmarks.cases import INFERENCE, KINDS, LEANVIT, MODELS, PRECISIONS, SIDES, TORCH, Case, cases, groups
from benchmarks.processes import ROOT, Stopped, Worker
from benchmarks.table import speed, tables
from utils.cli import run, whole_number
from utils.environment import ensure_home, processor_name
from utils.errors import UserError
from utils.files import atomic_write, json_text
from utils.temporary import temporary_folder

WARMUP = 1  # rounds, after the first pass of each model
PAUSE = 0.3  # seconds before a turn: threads of OpenMP spin for up to 0.2 s after their last operator
START = 120.0  # seconds in which a framework is imported
BUSY = 0.3  # load average per core from which on other processes disturb the comparison
TOLERANCE = 1e-4  # difference of logits between the frameworks, relative to the largest one


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    ensure_home()
    with atomic_write(args.json, 'w') if args.json else contextlib.nullcontext() as file:
        with temporary_folder('compare-torch') as folder:
            result = Comparison(args, lambda side: start(side, args.torch_python, folder), folder).run()
        print('\n\n'.join(tables(result)))
        if file:
            file.write(json_text(result, indent=2))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Compare the speed with PyTorch and timm.', allow_abbrev=False)
    parser.add_argument('models', nargs='*', metavar='MODEL', help=f'some of {", ".join(MODELS)} (default: all)')
    parser.add_argument('-rounds', type=whole_number, default=10, metavar='N', help='timed rounds (default: 10)')
    parser.add_argument('-batch', type=whole_number, nargs='+', metavar='N', help='of inference (default: 1 16)')
    parser.add_argument('-only', choices=KINDS, help='measure inference or training steps only')
    parser.add_argument('-precision', choices=PRECISIONS, help='measure one precision only')
    parser.add_argument('-compile_training', action='store_true', help='training steps of torch.compile, too')
    parser.add_argument(
        '-limit', type=whole_number, default=600, metavar='SECONDS', help='for building a model, and for the rounds of '
        'a comparison (default: 600)',
    )  # fmt: skip
    parser.add_argument(
        '-torch_python', default=sys.executable, metavar='FILE', help='Python that has PyTorch and timm (default: this)'
    )
    parser.add_argument('-json', metavar='FILE', help='also write the seconds of all rounds to this file')
    args = parser.parse_args(argv)
    args.batch = args.batch or [1, 16]
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise UserError for values that cannot be measured."""
    unknown = [name for name in args.models if name not in MODELS]
    if unknown:
        raise UserError(f"there is no PyTorch model for '{unknown[0]}': choose from {', '.join(MODELS)}.")
    for flag, values in (('-rounds', [args.rounds]), ('-batch', args.batch), ('-limit', [args.limit])):
        if min(values) < 1:
            raise UserError(f'{flag} is {min(values)}, but must be at least 1.')


def start(side: str, torch_python: str, folder: str) -> Worker:
    """Start the process of a framework."""
    python = torch_python if side == TORCH else sys.executable
    try:
        return Worker([python, '-m', 'benchmarks.worker', side, folder], {'PYTHONPATH': ROOT})
    except OSError as error:
        raise UserError(f"-torch_python: cannot start '{python}' ({error.strerror}).") from None


class Comparison:
    """Measures all cases of the command line.

    Args:
        args: the command line.
        start: starts the process of a side.
        folder: for weights that the sides exchange.
    """

    def __init__(self, args: argparse.Namespace, start: Callable[[str], Worker], folder: str):
        self._args, self._start, self._folder = args, start, folder
        self._load = round(os.getloadavg()[0], 1)  # before this run adds to it
        self._workers: dict[str, Worker] = {}
        self._stack = contextlib.ExitStack()

    def run(self) -> dict:
        """Return the content of the JSON file."""
        args, records = self._args, []
        if self._load > BUSY * (os.cpu_count() or 1):
            print(f'note: {busy(self._load)}', file=sys.stderr)
        with self._stack:
            result: dict[str, Any] = {'environment': self._environment(), 'differences': {}, 'records': records}
            for models in groups(args.models or MODELS):
                for model in models:
                    result['differences'][model] = self._difference(model)
                for kind, precision, batch in self._plan():
                    rows = self._measure(cases(models, kind, precision, batch, args.compile_training))
                    records += rows
                    for row in rows:
                        print(progress(row), file=sys.stderr)
        return result

    def _plan(self) -> Iterator[tuple[str, str, int]]:
        """Yield kinds, precisions and batches."""
        args = self._args
        for kind in [args.only] if args.only else KINDS:
            for precision in [args.precision] if args.precision else PRECISIONS:
                for batch in args.batch if kind == INFERENCE else [max(args.batch)]:
                    yield kind, precision, batch

    # ------------------------------------------------------------------------------------------------ processes
    def _worker(self, side: str) -> Worker:
        """Return the process of a side, started if there is none."""
        if side not in self._workers:
            self._workers[side] = self._stack.enter_context(self._start(side))
            self._ask_versions(side)
        return self._workers[side]

    def _ask_versions(self, side: str) -> dict[str, str]:
        try:
            return self._workers[side].ask(START, 'versions')
        except UserError as error:
            raise UserError(
                f'PyTorch or timm cannot be imported by {self._args.torch_python} ({str(error).rstrip(".")}): '
                'pip install -r benchmarks/requirements.txt, or give the Python that has them as -torch_python.'
            ) from None
        except Stopped as error:
            raise UserError(f'the process of {side} cannot start: {error}.') from None

    def _stop(self, side: str) -> None:
        """End a process that answers no more."""
        worker = self._workers.pop(side)
        worker.__exit__(Stopped, None, None)

    # ------------------------------------------------------------------------------------------------ measurement
    def _environment(self) -> dict:
        """Return the conditions of the measurement. Raises UserError if a framework is missing."""
        versions: dict[str, str] = {}
        for side in (TORCH, LEANVIT):
            self._worker(side)
            versions.update(self._ask_versions(side))
        return {
            'date': time.strftime('%Y-%m-%d'),
            'processor': processor_name(),
            'python': platform.python_version(),
            **versions,
            'rounds': self._args.rounds,
            'load': self._load,
        }

    def _difference(self, model: str) -> float:
        """Return the difference of logits with the same weights. Raises UserError if the models are not the same."""
        path = os.path.join(self._folder, 'exchange.npz')
        try:
            for side in (TORCH, LEANVIT):
                difference = self._worker(side).ask(self._args.limit, 'exchange', model=model, path=path)
        except Stopped as error:
            raise UserError(f'{model}: its outputs cannot be compared: {error}.') from None
        if not difference <= TOLERANCE:  # NaN included
            raise UserError(f'{model}: with the same weights, logits differ by {difference:.1e} of the largest one.')
        return difference

    def _measure(self, chosen: Sequence[Case]) -> list[dict]:
        """Time cases in turns. A case that cannot be built, or ends its process, has an `error` instead of `seconds`."""
        records = {case: case.fields() for case in chosen}
        while True:
            working = [case for case in chosen if 'error' not in records[case]]
            if self._attempt(working, records):
                return list(records.values())

    def _attempt(self, working: Sequence[Case], records: dict[Case, dict]) -> bool:
        """Build and time cases. Return False if one of them ended its process, so that the rest must be measured again."""
        for side in SIDES:
            self._worker(side).ask(self._args.limit, 'forget')
        for case in working:
            records[case].update(seconds=[], processor_seconds=[])
            try:
                records[case].update(self._worker(case.side).ask(self._args.limit, 'prepare', case=case.fields()))
            except UserError as error:
                records[case]['error'] = str(error)
            except Stopped as error:
                return self._failed(case, records, error)
        built = [case for case in working if 'error' not in records[case]]
        for case, timed in turns(built, self._args.rounds, self._args.limit):
            try:
                seconds, used = self._worker(case.side).ask(self._args.limit, 'turn', case=case.fields())
            except Stopped as error:
                return self._failed(case, records, error)
            if timed:
                records[case]['seconds'].append(seconds)
                records[case]['processor_seconds'].append(used)
        return True

    def _failed(self, case: Case, records: dict[Case, dict], error: Stopped) -> bool:
        records[case]['error'] = str(error)
        self._stop(case.side)
        return False


def turns(
    chosen: Sequence[Case], rounds: int, limit: float, pause: Callable[[], object] = lambda: time.sleep(PAUSE)
) -> Iterator[tuple[Case, bool]]:
    """Yield each case once per round, and whether it is timed. Every second round has the reverse order.

    No round starts after `limit` seconds, apart from the first timed one.
    """
    started = time.monotonic()
    for number in range(WARMUP + rounds):
        if number > WARMUP and time.monotonic() - started > limit:
            return
        for case in in_order(chosen, number):
            pause()
            yield case, number >= WARMUP


def in_order(chosen: Iterable[Case], number: int) -> list[Case]:
    """Return the order of a round."""
    return list(chosen)[:: -1 if number % 2 else 1]


def busy(load: float) -> str:
    """Return the warning of a busy machine."""
    return (
        f'other processes use the processor (load average {load}): OpenMP waits at each operator for its slowest thread, so '
        'that the comparison is not fair; stop them, or measure elsewhere.'
    )


def progress(record: dict) -> str:
    """Format a finished case as a line."""
    names = [str(record[name]) for name in ('model', 'kind', 'precision', 'batch', 'side', 'runner')]
    result = record.get('error') or f'{speed(record):.1f} images/s'
    return f'{" ".join(names)}: {result}'


if __name__ == '__main__':
    run(main)
