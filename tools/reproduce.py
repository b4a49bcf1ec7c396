#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reproduce the published accuracies: download or take weights, convert, evaluate, compare.

    python tools/reproduce.py -data_path /dataset/imagenet -output zoo
    python tools/reproduce.py -data_path /dataset/imagenet -output zoo -weights downloads/ deit_tiny_patch16_224 gmlp_s16_224

Without names: all rows of configs/zoo.csv. A finished row is kept in zoo/results.json and skipped when the command is started
again. A row that fails is listed with its reason, the others go on, and the exit status is 1. Writes zoo/table.md, table.csv and
zoo.png; docs/models.md explains them.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()
elif __name__ == '__mp_main__':  # the process that evaluates
    from utils.environment import import_paddle

    import_paddle()

import argparse
import json
import os
from collections.abc import Mapping, Sequence

import paddle
from yacs.config import CfgNode

from config import get_config, update_config
from engine import distributed
from models.exported import cpu_threads
from models.registry import config_file
from models.zoo import PUBLISHED, Published, read_zoo
from tasks import build_task
from tools._output import add_output_folder
from tools._reproduction import Request, reproduce_row
from tools._zoo_table import cells_of, draw, write_tables
from utils.cli import run
from utils.environment import processor_name
from utils.errors import UserError
from utils.files import atomic_write, json_text, read_regular
from utils.flags import flag_parser
from utils.processes import Worker, WorkerDied

RESULTS = 'results.json'
COLUMNS = '{:<44} {:>9} {:>9} {:>6} {:>9} {:>9} {:>8} {:>7} {:>9}  {}'
BATCH_SIZES = {True: 256, False: 8}  # of the measurement of speed, on a GPU and on a CPU
_LARGEST = 1 << 26  # bytes of results.json


def main(argv: list[str] | None = None) -> int:
    """Return 1 if a row could not be reproduced, else 0."""
    args = parse(argv)
    table = PUBLISHED if args.zoo is None else read_zoo(args.zoo)
    rows = [table.get(name, Published(name)) for name in args.names or table]
    configs = {row.name: read_config(row.name, args) for row in rows}
    results = Results(args.folder, conditions(args), table)
    waiting = [row for row in rows if not results.is_done(row.name)]
    if waiting:
        check_data(configs[waiting[0].name])
    if len(waiting) < len(rows):
        print(f"{len(rows) - len(waiting)} of {len(rows)} rows are done already, see '{args.folder}'.")
    print(
        COLUMNS.format(
            'name', 'published', 'measured', 'diff', 'published5', 'measured5', 'params M', 'MACs G', 'images/s', ''
        )
    )
    with Worker() as worker:
        for row in waiting:
            request = Request(row, configs[row.name], args.weights, args.folder, args.speed_batch, args.rounds)
            print(COLUMNS.format(*cells_of(results.add(row, attempt(worker, request)))), flush=True)
    return results.finish([row.name for row in rows])


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = ('-dataset', '-data_path', '-batch_size', '-num_workers')
    parser = flag_parser('Reproduce the published accuracies.', flags)
    parser.add_argument(
        'names', nargs='*', metavar='NAME', help='configurations or YAML files (default: the whole table)'
    )
    add_output_folder(parser, 'for tables, picture, run folders and converted weights', required=True)
    parser.add_argument(
        '-weights',
        metavar='DIR',
        help='folder with given weights, NAME.pth and so on, or run folders NAME; others are downloaded',
    )
    parser.add_argument('-zoo', metavar='FILE', help='another table in the format of configs/zoo.csv')
    parser.add_argument(
        '-speed_batch', type=int, metavar='N', help='images per batch of images/s (default: 256 on a GPU, 8 on a CPU)'
    )
    parser.add_argument(
        '-rounds', type=int, default=10, metavar='N', help='timed batches of images/s; their median is reported'
    )
    args = parser.parse_args(argv)
    for flag in ('speed_batch', 'rounds'):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f'-{flag} is {getattr(args, flag)}, but must be at least 1.')
    if args.weights is not None and not os.path.isdir(args.weights):
        raise UserError(f"-weights: there is no folder '{args.weights}'.")
    context = distributed.start()
    args.speed_batch = args.speed_batch or BATCH_SIZES[context.on_gpu]
    return args


def read_config(name: str, args: argparse.Namespace) -> CfgNode:
    """Return the configuration of a row, with the flags of the command line."""
    given = {flag: value for flag, value in vars(args).items() if flag not in ('names', 'weights', 'zoo', 'folder')}
    return update_config(get_config(), argparse.Namespace(**given, cfg=config_file(name)))


def check_data(config: CfgNode) -> None:
    """Raise UserError if the validation images of the first row are missing, before anything is downloaded."""
    build_task(config.clone()).dataset('val')


def conditions(args: argparse.Namespace) -> dict[str, str]:
    """Return what the numbers depend on."""
    on_gpu = distributed.start().on_gpu
    device = paddle.device.cuda.get_device_name() if on_gpu else processor_name()
    found = {
        'device': device,
        'threads': '' if on_gpu else str(cpu_threads()),
        'paddle': paddle.__version__,
        'batch': str(args.speed_batch),
        'rounds': str(args.rounds),
        **{flag: str(getattr(args, flag)) for flag in ('dataset', 'data_path') if flag in args},
        'options': ' '.join(map(str, args.opts)),
    }
    return {key: value for key, value in found.items() if value}


def attempt(worker: Worker, request: Request) -> dict:
    """Return the results of a row, or the reason why there are none."""
    try:
        return {'status': 'done', **worker.call(reproduce_row, request)}
    except (UserError, WorkerDied) as error:
        return {'status': 'failed', 'reason': str(error)}


class Results:
    """The rows in results.json, which is written after each row.

    Args:
        folder: of the results.
        conditions: see `conditions`.
        table: published rows, for their order.

    Raises:
        UserError: the folder holds results of other conditions.
    """

    def __init__(self, folder: str, conditions: Mapping[str, str], table: Mapping[str, Published]):
        self.folder = folder
        self.conditions = conditions
        self.order = {name: number for number, name in enumerate(table)}
        self.path = os.path.join(folder, RESULTS)
        self.rows: dict[str, dict] = self._read() if os.path.lexists(self.path) else {}

    def _read(self) -> dict[str, dict]:
        try:
            content = json.loads(read_regular(self.path, _LARGEST))
            rows, before = {row['name']: row for row in content['rows']}, content['conditions']
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            raise UserError(f"'{self.path}' does not hold results of this tool; give another -output.") from None
        changed = sorted(key for key in {*before, *self.conditions} if before.get(key) != self.conditions.get(key))
        if changed:
            text = ', '.join(f'{key} {before.get(key)!r}, now {self.conditions.get(key)!r}' for key in changed)
            raise UserError(f"-output '{self.folder}' holds results of other conditions ({text}); give another folder.")
        return rows

    def is_done(self, name: str) -> bool:
        """Return True if a row needs no evaluation."""
        return self.rows.get(name, {}).get('status') == 'done'

    def add(self, published: Published, found: Mapping) -> dict:
        """Store the results of a row, and return it."""
        row = {'name': published.name, 'published_acc1': published.acc1, 'published_acc5': published.acc5, **found}
        self.rows[published.name] = row
        os.makedirs(self.folder, exist_ok=True)
        with atomic_write(self.path, 'w') as file:
            file.write(json_text({'conditions': self.conditions, 'rows': self._ordered()}, indent=1) + '\n')
        write_tables(self.folder, self._ordered(), self.conditions)
        return row

    def _ordered(self) -> list[dict]:
        """Return the rows in the order of the table, then others."""
        return sorted(self.rows.values(), key=lambda row: self.order.get(row['name'], len(self.order)))

    def finish(self, names: Sequence[str]) -> int:
        """Draw the picture and print a summary. Return 1 if one of the rows `names` failed."""
        done = [row for row in self._ordered() if self.is_done(row['name'])]
        if done:
            with atomic_write(os.path.join(self.folder, 'zoo.png')) as file:
                draw(file, done, ', '.join(f'{key} {value}' for key, value in self.conditions.items()))
        failed = [name for name in names if not self.is_done(name)]
        print(
            f"{len(names) - len(failed)} of {len(names)} rows are reproduced, see '{os.path.join(self.folder, 'table.md')}'."
        )
        return int(bool(failed))


if __name__ == '__main__':
    run(main)
