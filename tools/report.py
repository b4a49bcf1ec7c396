#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write one HTML page about a run, or about several runs that are compared.

    python tools/report.py output/latest
    python tools/report.py output/latest -evaluate
    python tools/report.py output/dense output/fading -output comparison.html

The page loads nothing from the network and runs no script; docs/report.md describes it.
"""

from __future__ import annotations

import sys

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start(paddle='-evaluate' in sys.argv)

import argparse
import os

from analysis.report.page import render
from analysis.report.runs import Run, read_runs
from config import MAE, MOCOV3
from tools._output import add_output_file
from utils.cli import run
from utils.errors import UserError
from utils.files import atomic_write
from utils.flags import flag_parser
from utils.run_paths import follow_latest

ONE, SEVERAL = 'report.html', 'comparison.html'
ADDED = 'results by class, confusion matrix, calibration and mistakes'


def main(argv: list[str] | None = None) -> int:
    """Return 1 if an evaluation failed, else 0."""
    args = parse(argv)
    folders = [os.path.normpath(follow_latest(path)) for path in args.runs]
    runs = read_runs(folders)
    failures = evaluate(folders, args) if args.evaluate else {}
    if args.evaluate:
        runs = read_runs(folders)
    for one in runs:
        one.notes += failures.get(one.path, [])
        for note in one.notes:
            print(note, file=sys.stderr)
        if not args.evaluate and could_be_evaluated(one):
            print(f'{one.path} has no predictions: -evaluate adds {ADDED}.')
    target = args.target or os.path.join(folders[0], SEVERAL if len(folders) > 1 else ONE)
    with atomic_write(target, 'w') as file:
        file.write(render(runs))
    print(f'{target}: {", ".join(one.name for one in runs)}')
    return int(len(failures) > 0)


def evaluate(folders: list[str], args: argparse.Namespace) -> dict[str, list[str]]:
    """Evaluate the weights of each run, and return the sentences about failures by folder."""
    from tools._evaluation import evaluate_run  # Paddle takes seconds to import

    failures = {}
    for folder in dict.fromkeys(folders):
        try:
            evaluate_run(folder, args)
        except UserError as error:
            failures[folder] = [f"'{folder}' cannot be evaluated: {error}"]
    return failures


def could_be_evaluated(one: Run) -> bool:
    """Return True if a run has weights of a task with predictions, but no predictions."""
    weights = any(os.path.isfile(os.path.join(one.path, f'{name}.pdparams')) for name in ('best', 'last'))
    pretrained = one.config is None or one.config.TRAIN.TASK in MAE + MOCOV3
    return weights and not pretrained and one.predictions is None and one.classes is None


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = ('-data_path', '-batch_size', '-num_workers')
    parser = flag_parser('Write one HTML page about a run, or about several runs that are compared.', flags)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run folders, such as output/latest')
    add_output_file(
        parser, '.html', what=f'page to write (default: {ONE}, of several runs {SEVERAL}, in the first RUN)'
    )
    parser.add_argument(
        '-evaluate',
        action='store_true',
        help='evaluate the best weights of each RUN first, and draw kept tokens; the files go to RUN/evaluation',
    )
    args = parser.parse_args(argv)
    unused = [f'-{flag}' for flag in ('data_path', 'batch_size', 'num_workers', 'opts') if getattr(args, flag, None)]
    if unused and not args.evaluate:
        raise UserError(f'{unused[0]} has an effect with -evaluate only: add -evaluate, or remove {unused[0]}.')
    return args


if __name__ == '__main__':
    run(main)
