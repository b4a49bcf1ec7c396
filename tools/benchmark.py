#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare models on this machine: parameters, multiply-accumulates, images per second, latency, memory.

    python tools/benchmark.py gmlp_ti16_224 gmlp_s16_224 -batch_size 8 -rounds 10 -json out.json
    python tools/benchmark.py gmlp_s16_224 -engine paddle
    python tools/benchmark.py ms_mlp_tiny_patch4_shift5_224 -batch_size 4 -training
    python tools/benchmark.py deit_small_patch16_224 -batch_size 128 -training -data_path /dataset/imagenet

Each round runs every model once, so that other load slows all models alike. docs/benchmark.md explains the columns.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()
elif __name__ == '__mp_main__':  # the process that measures memory
    from utils.environment import import_paddle

    import_paddle()

import argparse
import contextlib
import os
import statistics
from dataclasses import replace

import paddle

from config import get_config, update_config
from engine import distributed
from engine.distributed import Context
from engine.precision import cpu_obstacle, describe_cpu_precision
from engine.run import build_loader
from engine.throughput import BenchmarkCase, exported, loader_speed, peak_memory, time_interleaved
from models.engines import LAYERS, check_engine
from models.exported import PRECISIONS, cpu_threads
from models.profile import profile_config
from models.registry import config_file
from tasks import build_task
from tools._common import add_backend, with_engine_of_backend
from tools._output import add_output_file
from utils.cli import run
from utils.environment import processor_name
from utils.errors import UserError
from utils.files import atomic_write, json_text
from utils.flags import flag_parser
from utils.temporary import temporary_folder

WARMUP = 3
LOADER_BATCHES = 4  # times the batches that workers prepare in advance, so that these matter little
COLUMNS = '{:<32} {:>9} {:>8} {:>9} {:>11} {:>10} {:>6}'
TRAINING_COLUMNS = '{:<32} {:>9} {:>8} {:>9} {:>9} {:>12} {:>12} {:>6} {:>7} {:>12} {:>8}'


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with atomic_write(args.json, 'w') if args.json else contextlib.nullcontext() as file:
        result = benchmark(args)
        if file:
            file.write(json_text(result, indent=2))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser(
        'Compare the speed and size of models.',
        ('-dataset', '-data_path', '-batch_size', '-image_size', '-num_classes', '-num_workers', '-amp', '-engine'),
    )
    parser.add_argument('models', nargs='+', metavar='MODEL', help='names of configurations, or YAML files')
    parser.add_argument('-rounds', type=int, default=10, metavar='N', help='timed rounds; medians are reported')
    add_backend(parser)
    parser.add_argument('-precision', choices=PRECISIONS, default='fp32', help='precision of the engine')
    parser.add_argument(
        '-training', action='store_true', help='measure a training step instead, with and without TRAIN.RECOMPUTE'
    )
    add_output_file(parser, flag='-json', dest='json', what='also write the results to this file')
    parser.set_defaults(batch_size=8)
    args = with_engine_of_backend(parser.parse_args(argv))
    if args.rounds < 1:
        raise UserError(f'-rounds is {args.rounds}, but must be at least 1.')
    if args.engine == LAYERS and args.precision != 'fp32':
        raise UserError('-precision needs another -engine; layers run in mixed precision with -amp.')
    if args.engine != LAYERS and args.training:
        raise UserError(f'-training needs -engine {LAYERS}; the other engines only evaluate.')
    if not args.training and ('dataset' in args or 'data_path' in args):
        raise UserError('-dataset and -data_path need -training, which then measures the data loader, too.')
    if args.engine != LAYERS and 'amp' in args:
        raise UserError(f'-amp needs -engine {LAYERS}; use -precision bf16 for the other engines.')
    return args


def benchmark(args: argparse.Namespace) -> dict:
    """Measure the models, print the table and return the content of the JSON file."""
    context = distributed.start()
    check_engine(args.engine, args.precision)
    if 'amp' in args and not context.on_gpu:
        print(f'-amp on the CPU: measuring with {describe_cpu_precision()}.')
    cases = find_cases(args)
    info = environment(args, context)
    print(', '.join(f'{key} {value}' for key, value in info.items()))
    rows = [cost(case) for case in cases]
    (measure_training if args.training else measure_evaluation)(rows, cases, args, context)
    return {'environment': info, 'models': rows}


def measure_evaluation(
    rows: list[dict], cases: list[BenchmarkCase], args: argparse.Namespace, context: Context
) -> None:
    """Add speed, latency and memory of forward passes to the rows, and print the table."""
    with temporary_folder('benchmark') as folder:
        if args.engine != LAYERS:
            cases = [exported(case, os.path.join(folder, f'{i}')) for i, case in enumerate(cases)]
        for row, case in zip(rows, cases):
            row['memory_bytes'] = peak_memory(case, args.batch_size)
        calls = [call for case in cases for call in case.calls([args.batch_size, 1], context)]
    seconds = time_interleaved(calls, context, args.rounds, WARMUP)
    for row, batch, single in zip(rows, seconds[::2], seconds[1::2]):
        row['images_per_second'] = args.batch_size / statistics.median(batch)
        row['latency_ms'] = statistics.median(single) * 1000
        row['ratio'] = row['images_per_second'] / rows[0]['images_per_second']
        row['batch_seconds'], row['single_seconds'] = batch, single
    print_table(rows)


def measure_training(rows: list[dict], cases: list[BenchmarkCase], args: argparse.Namespace, context: Context) -> None:
    """Add time and memory of forward and backward pass as `plain` and `recompute` to the rows, and print the table."""
    variants = {'plain': False, 'recompute': True}
    steps = [
        (row, name, with_recompute(case, value)) for row, case in zip(rows, cases) for name, value in variants.items()
    ]
    for row, name, case in steps:
        row[name] = {'memory_bytes': peak_memory(case, args.batch_size, training=True)}
    calls = [case.training_call(args.batch_size, context) for _, _, case in steps]
    for (row, name, _), seconds in zip(steps, time_interleaved(calls, context, args.rounds, WARMUP)):
        row[name].update(step_ms=statistics.median(seconds) * 1000, step_seconds=seconds)
    for row, case in zip(rows, cases):
        row['loader'] = measure_loader(case, args, context) if 'dataset' in args or 'data_path' in args else None
        if row['loader']:
            step = args.batch_size / row['plain']['step_ms'] * 1000
            row['loader']['headroom'] = row['loader']['images_per_second'] / step
    print_training_table(rows)


def measure_loader(case: BenchmarkCase, args: argparse.Namespace, context: Context) -> dict:
    """Return images per second and number of workers of the training loader of a case."""
    config = case.config.clone()
    config.defrost()  # the data set gives the number of classes
    task, workers = build_task(config), config.DATA.NUM_WORKERS
    loader = build_loader(config, task, task.dataset('train'), 'train', context)
    batches = max(args.rounds, LOADER_BATCHES * workers * config.DATA.PREFETCH)
    return {'images_per_second': loader_speed(loader, batches), 'workers': workers}


def with_recompute(case: BenchmarkCase, value: bool) -> BenchmarkCase:
    """Return the case with TRAIN.RECOMPUTE set to `value`."""
    config = case.config.clone()
    config.defrost()
    config.TRAIN.RECOMPUTE = value
    config.freeze()
    return replace(case, config=config)


def find_cases(args: argparse.Namespace) -> list[BenchmarkCase]:
    """Return the models of the command line, each with its configuration."""
    cases = []
    for name in args.models:
        config = update_config(get_config(), argparse.Namespace(**{**vars(args), 'cfg': config_file(name)}))
        config.freeze()
        cases.append(BenchmarkCase(name, config, precision=args.precision))
    return cases


def environment(args: argparse.Namespace, context: Context) -> dict:
    """Return the conditions of the measurement."""
    device = paddle.device.cuda.get_device_name() if context.on_gpu else processor_name()
    return {
        'paddle': paddle.__version__,
        'device': device,
        'threads': cpu_threads(),
        'engine': args.engine,
        'precision': 'amp' if 'amp' in args and (context.on_gpu or cpu_obstacle() is None) else args.precision,
        'batch_size': args.batch_size,
        'rounds': args.rounds,
        'memory': 'allocated on the GPU' if context.on_gpu else 'growth of the resident memory',
    }


def cost(case: BenchmarkCase) -> dict:
    """Return name, image size, parameters and MACs of a model."""
    shape = case.image_shape()
    found = profile_config(case.config, [1, *shape])
    return {
        'name': case.name,
        'image_size': shape[1] if shape[1] == shape[2] else shape[1:],
        'params': found.params,
        'macs': found.macs,
    }


def print_table(rows: list[dict]) -> None:
    print(COLUMNS.format('name', 'params M', 'MACs G', 'images/s', 'latency ms', 'memory MB', 'ratio'))
    for row in rows:
        print(
            COLUMNS.format(
                row['name'],
                f'{row["params"] / 1e6:.3f}',
                f'{row["macs"] / 1e9:.3f}',
                f'{row["images_per_second"]:.1f}',
                f'{row["latency_ms"]:.2f}',
                megabytes(row['memory_bytes']),
                f'{row["ratio"]:.2f}',
            )
        )


def print_training_table(rows: list[dict]) -> None:
    titles = ('train ms', 'train MB', 'recompute ms', 'recompute MB', 'time', 'memory', 'loader img/s', 'headroom')
    print(TRAINING_COLUMNS.format('name', 'params M', 'MACs G', *titles))
    for row in rows:
        plain, again, loader = row['plain'], row['recompute'], row['loader']
        known = plain['memory_bytes'] is not None
        print(
            TRAINING_COLUMNS.format(
                row['name'],
                f'{row["params"] / 1e6:.3f}',
                f'{row["macs"] / 1e9:.3f}',
                f'{plain["step_ms"]:.1f}',
                megabytes(plain['memory_bytes']),
                f'{again["step_ms"]:.1f}',
                megabytes(again['memory_bytes']),
                f'{again["step_ms"] / plain["step_ms"]:.2f}',
                f'{again["memory_bytes"] / plain["memory_bytes"]:.2f}' if known else '-',
                f'{loader["images_per_second"]:.1f}' if loader else '-',
                f'{loader["headroom"]:.2f}' if loader else '-',
            )
        )


def megabytes(count: int | None) -> str:
    """Format a number of bytes in MB."""
    return '-' if count is None else f'{count / 1e6:.0f}'


if __name__ == '__main__':
    run(main)
