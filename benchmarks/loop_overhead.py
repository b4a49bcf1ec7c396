#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Overhead of the training loop over a bare loop of forward pass, backward pass and optimizer step.

    python benchmarks/loop_overhead.py gmlp_digits
    python benchmarks/loop_overhead.py deit_small_patch16_224 -batch_size 16 -steps 3 -rounds 3

bare     cross entropy of a fixed batch that lies on the device, backward pass, optimizer step
recipe   a step of the configuration on a fixed batch in host memory: its loss, gradient clipping, EMA
trainer  epochs of engine/train.py: also loader, augmentation, statistics, log, metrics and VisualDL files

Each round runs every loop once, so that other load slows all alike. docs/benchmark.md explains the columns.
"""

from __future__ import annotations

import os
import sys

if __name__ == '__main__':
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from utils.cli import begin
    from utils.environment import start_paddle

    begin()
    start_paddle()

import argparse
import contextlib
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import paddle
import paddle.nn.functional as F

from config import get_config, update_config
from engine import distributed
from engine.optim import build_optimizer
from engine.run import build_loader
from engine.throughput import training_call
from engine.train import Trainer
from models import build_model
from models.registry import config_file
from tasks import build_task
from tools._output import add_output_file
from tools.benchmark_data import write_photographs
from utils.cli import run
from utils.environment import processor_name
from utils.files import atomic_write, json_text
from utils.flags import flag_parser
from utils.runlog import RunLog
from utils.temporary import temporary_folder

LOOPS = ('bare', 'recipe', 'trainer')
COLUMNS = '{:<28} {:>7} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}'
EMBEDDED = ('digits',)  # data sets that need no DATA_PATH


class EpochTrainer(Trainer):
    """A Trainer that trains one epoch per call, without validation and checkpoints."""

    def open(self) -> None:
        """Open the files of the run."""
        self.reporter.open(self.state)
        self.reporter.start(1, self.global_batch)
        self.parallel = self.context.parallel(self.model)

    def train_epoch(self) -> int:
        """Train the next epoch. Return its number of images."""
        self._train_epoch(self.state.epoch + 1)
        self.state.validated = True
        return self.train_loader.num_samples


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with atomic_write(args.json, 'w') if args.json else contextlib.nullcontext() as file:
        rows = [row for name in args.models for row in measure(name, args)]
        if file:
            conditions = {'paddle': paddle.__version__, 'device': processor_name(), 'rounds': args.rounds}
            conditions['threads'] = int(os.environ.get('FLAGS_paddle_num_threads', 1))
            file.write(json_text({'environment': conditions, 'loops': rows}, indent=2))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser('Measure the overhead of the training loop.', ('-dataset', '-data_path', '-batch_size'))
    parser.add_argument('models', nargs='+', metavar='MODEL', help='names of configurations, or YAML files')
    parser.add_argument('-rounds', type=int, default=8, metavar='N', help='timed rounds after one warm-up round')
    parser.add_argument('-steps', type=int, default=8, metavar='N', help='steps of an epoch on synthetic images')
    parser.add_argument(
        '-workers', type=int, nargs='+', metavar='N', help='DATA.NUM_WORKERS (default: 0, and the default)'
    )
    add_output_file(parser, flag='-json', dest='json', what='also write the results to this file')
    return parser.parse_args(argv)


def measure(name: str, args: argparse.Namespace) -> list[dict]:
    """Measure the loops of a configuration for each number of workers. Print and return a row for each."""
    config = update_config(get_config(), argparse.Namespace(**{**vars(args), 'cfg': config_file(name)}))
    config.TRAIN.NUM_EPOCHS = args.rounds + 1
    config.TRAIN.WARMUP_EPOCHS = 0
    config.DATA.BATCH_SIZE_EVAL = config.DATA.BATCH_SIZE
    rows = []
    with temporary_folder('loop') as folder:
        if 'data_path' not in args and config.DATA.DATASET not in EMBEDDED:
            config.DATA.DATASET, config.DATA.DATA_PATH = 'folder', os.path.join(folder, 'images')
            for split, count in (('train', args.steps * config.DATA.BATCH_SIZE), ('val', 2)):
                write_photographs(os.path.join(config.DATA.DATA_PATH, split), count)
            config.TRAIN.REPEATED_AUG = 0
        for workers in args.workers or sorted({0, get_config().DATA.NUM_WORKERS}):
            config.DATA.NUM_WORKERS = workers
            row = {'name': name, 'workers': workers, 'batch_size': config.DATA.BATCH_SIZE}
            rows.append({**row, **measure_loops(config.clone(), os.path.join(folder, f'run{workers}'), args.rounds)})
            print_row(rows[-1], header=len(rows) == 1)
    return rows


def measure_loops(config, folder: str, rounds: int) -> dict:
    """Return seconds and processor seconds per image of each loop in each round."""
    os.makedirs(folder)
    context = distributed.start()
    with contextlib.ExitStack() as stack:
        trainer = stack.enter_context(trainer_of(config, context, folder))
        batch_size, steps = config.DATA.BATCH_SIZE, trainer.train_loader.num_batches
        task = trainer.task
        recipe = training_call(config, build_model(config), task, batch_size, context)
        loops = {
            'bare': repeated(bare_step(config, batch_size), steps, batch_size),
            'recipe': repeated(recipe, steps, batch_size),
            'trainer': trainer.train_epoch,
        }
        found: dict[str, dict] = {name: {'seconds': [], 'cpu_seconds': []} for name in loops}
        for index in range(rounds + 1):
            for name, loop in loops.items():
                context.synchronize()
                started, used = time.perf_counter(), processor_seconds()
                images = loop()
                context.synchronize()
                if index:
                    found[name]['seconds'].append((time.perf_counter() - started) / images)
                    found[name]['cpu_seconds'].append((processor_seconds() - used) / images)
    return found


def processor_seconds() -> float:
    """Return the processor time of this process, without its workers."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def trainer_of(config, context: distributed.Context, folder: str) -> Iterator[EpochTrainer]:
    """Build what `engine.run` builds, with a log that is written but not shown."""
    with contextlib.ExitStack() as stack:
        task = build_task(config)
        data = {split: task.dataset(split) for split in ('train', 'val')}
        paddle.seed(config.SEED)
        model = build_model(config)
        config.freeze()
        log = stack.enter_context(contextlib.closing(RunLog(folder, context.rank)))
        null = stack.enter_context(open(os.devnull, 'w', encoding='utf-8'))
        stack.enter_context(contextlib.redirect_stdout(null))
        loaders = [stack.enter_context(build_loader(config, task, data[split], split, context)) for split in data]
        task.attach(model, log.master, training=True)
        trainer = EpochTrainer(config, model, task, *loaders, context, log, folder)
        trainer.open()
        stack.callback(trainer.reporter.close)
        yield trainer


def bare_step(config, batch_size: int) -> Callable[[], None]:
    """Return a step as a tutorial writes it, on a fixed batch."""
    model = build_model(config)
    model.train()
    optimizer = build_optimizer(config, model)
    optimizer.set_lr(config.TRAIN.BASE_LR)
    images = paddle.randn([batch_size, *build_task(config).image_shape()])
    labels = paddle.arange(batch_size) % model.num_classes

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)

    return step


def repeated(step: Callable[[], None], steps: int, batch_size: int) -> Callable[[], int]:
    """Return a loop of `steps` steps, which returns its number of images."""

    def loop() -> int:
        for _ in range(steps):
            step()
        return steps * batch_size

    return loop


def overhead(row: dict, over: str, clock: str = 'seconds') -> float:
    """Return the median over the rounds of the trainer's time relative to the loop `over`, minus 1."""
    return statistics.median(own / base for own, base in zip(row['trainer'][clock], row[over][clock])) - 1


def print_row(row: dict, header: bool) -> None:
    if header:
        speeds = [f'{name} i/s' for name in LOOPS]
        print(COLUMNS.format('name', 'workers', *speeds, '/bare', '/recipe', 'CPU /bare', '/recipe'))
    speeds = [f'{1 / statistics.median(row[name]["seconds"]):.1f}' for name in LOOPS]
    over = [f'{overhead(row, base, clock):+.1%}' for clock in ('seconds', 'cpu_seconds') for base in LOOPS[:2]]
    print(COLUMNS.format(row['name'], row['workers'], *speeds, *over), flush=True)


if __name__ == '__main__':
    run(main)
