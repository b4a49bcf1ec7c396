#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compares models on this machine: size, multiply-accumulates, images per second, latency, memory.

    python tools/benchmark.py gmlp_ti16_224 gmlp_s16_224 -batch_size 8 -rounds 10 -json out.json
    python tools/benchmark.py gmlp_s16_224 -backend exported
    python tools/benchmark.py ms_mlp_tiny_patch4_shift5_224 -batch_size 4 -training

Models take turns in every round, so that a busy machine does not favour one. docs/benchmark.md explains the columns.
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
import tempfile
from dataclasses import replace

import paddle

from config import flag_parser, get_config, update_config
from engine import distributed
from engine.distributed import Context
from engine.throughput import Subject, peak_memory, time_interleaved
from models import build_model
from models.exported import PRECISIONS, cpu_threads, emulates_bfloat16, save_program
from models.profile import profile
from models.registry import config_file
from tools._common import processor_name
from tools._output import add_output_file
from utils.cli import run
from utils.errors import UserError
from utils.files import atomic_write, json_text

WARMUP = 3
COLUMNS = '{:<32} {:>9} {:>8} {:>9} {:>11} {:>10} {:>6}'
TRAINING_COLUMNS = '{:<32} {:>9} {:>8} {:>9} {:>9} {:>12} {:>12} {:>6} {:>7}'


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with atomic_write(args.json, 'w') if args.json else contextlib.nullcontext() as file:
        result = benchmark(args)
        if file:
            file.write(json_text(result, indent=2))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser(
        'Compare the speed and size of models.', ('-batch_size', '-image_size', '-num_classes', '-amp')
    )
    parser.add_argument('models', nargs='+', metavar='MODEL', help='names of configurations, or YAML files')
    parser.add_argument('-rounds', type=int, default=10, metavar='N', help='timed rounds; medians are reported')
    parser.add_argument(
        '-backend', choices=('dygraph', 'exported'), default='dygraph', help='layers, or inference program'
    )
    parser.add_argument('-precision', choices=PRECISIONS, default='fp32', help='of the exported program')
    parser.add_argument(
        '-training', action='store_true', help='a training step instead, with and without TRAIN.RECOMPUTE'
    )
    add_output_file(parser, flag='-json', dest='json', what='file to write the results to, too')
    parser.set_defaults(batch_size=8)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UserError(f'-rounds is {args.rounds}, but must be at least 1.')
    if args.backend == 'dygraph' and args.precision != 'fp32':
        raise UserError('-precision belongs to -backend exported; layers run in mixed precision with -amp, on a GPU.')
    if args.backend == 'exported' and args.training:
        raise UserError('-training belongs to -backend dygraph; exported programs only evaluate.')
    if args.backend == 'exported' and 'amp' in args:
        raise UserError('-amp belongs to -backend dygraph; give -precision bf16 to the exported program.')
    return args


def benchmark(args: argparse.Namespace) -> dict:
    """Measures the models, prints the table and returns everything that the JSON file says."""
    context = distributed.start()
    if args.precision == 'bf16' and emulates_bfloat16():
        raise UserError(
            'this processor has no instructions for bfloat16 (avx512_bf16, amx_bf16): leave -precision out.'
        )
    if 'amp' in args and not context.on_gpu:
        print('-amp is asked for, but mixed precision needs a GPU: measuring in float32.')
    subjects = find_subjects(args)
    facts = environment(args, context)
    print(', '.join(f'{key} {value}' for key, value in facts.items()))
    rows = [cost(subject) for subject in subjects]
    (measure_training if args.training else measure_evaluation)(rows, subjects, args, context)
    return {'environment': facts, 'models': rows}


def measure_evaluation(rows: list[dict], subjects: list[Subject], args: argparse.Namespace, context: Context) -> None:
    """Fills in speed, latency and memory of forward passes, and prints the table."""
    with tempfile.TemporaryDirectory(prefix='benchmark-') as folder:
        if args.backend == 'exported':
            subjects = [export(subject, os.path.join(folder, f'{i}')) for i, subject in enumerate(subjects)]
        for row, subject in zip(rows, subjects):
            row['memory_bytes'] = peak_memory(subject, args.batch_size)
        calls = [call for subject in subjects for call in subject.calls([args.batch_size, 1], context)]
    seconds = time_interleaved(calls, context, args.rounds, WARMUP)
    for row, batch, single in zip(rows, seconds[::2], seconds[1::2]):
        row['images_per_second'] = args.batch_size / statistics.median(batch)
        row['latency_ms'] = statistics.median(single) * 1000
        row['ratio'] = row['images_per_second'] / rows[0]['images_per_second']
        row['batch_seconds'], row['single_seconds'] = batch, single
    print_table(rows)


def measure_training(rows: list[dict], subjects: list[Subject], args: argparse.Namespace, context: Context) -> None:
    """Fills in time and memory of forward and backward pass as `plain` and `recompute`, and prints the table."""
    variants = {'plain': False, 'recompute': True}
    steps = [
        (row, name, recomputing(subject, again))
        for row, subject in zip(rows, subjects)
        for name, again in variants.items()
    ]
    for row, name, subject in steps:
        row[name] = {'memory_bytes': peak_memory(subject, args.batch_size, training=True)}
    calls = [subject.training_call(args.batch_size, context) for _, _, subject in steps]
    for (row, name, _), seconds in zip(steps, time_interleaved(calls, context, args.rounds, WARMUP)):
        row[name].update(step_ms=statistics.median(seconds) * 1000, step_seconds=seconds)
    print_training_table(rows)


def recomputing(subject: Subject, again: bool) -> Subject:
    """The same subject with TRAIN.RECOMPUTE on or off."""
    config = subject.config.clone()
    config.defrost()
    config.TRAIN.RECOMPUTE = again
    config.freeze()
    return replace(subject, config=config)


def find_subjects(args: argparse.Namespace) -> list[Subject]:
    """The models of the command line, each with its configuration."""
    subjects = []
    for name in args.models:
        config = update_config(get_config(), argparse.Namespace(**{**vars(args), 'cfg': config_file(name)}))
        config.freeze()
        subjects.append(Subject(name, config, precision=args.precision))
    return subjects


def environment(args: argparse.Namespace, context: Context) -> dict:
    """What the numbers depend on besides the models."""
    device = paddle.device.cuda.get_device_name() if context.on_gpu else processor_name()
    return {
        'paddle': paddle.__version__,
        'device': device,
        'threads': cpu_threads(),
        'backend': args.backend,
        'precision': args.precision if 'amp' not in args or not context.on_gpu else 'amp',
        'batch_size': args.batch_size,
        'rounds': args.rounds,
        'memory': 'allocated on the GPU' if context.on_gpu else 'growth of the resident memory',
    }


def cost(subject: Subject) -> dict:
    """Name, input and what can be counted without running the model."""
    shape = subject.image_shape()
    found = profile(build_model(subject.config), [1, *shape])
    return {
        'name': subject.name,
        'image_size': shape[1] if shape[1] == shape[2] else shape[1:],
        'params': found.params,
        'macs': found.macs,
    }


def export(subject: Subject, prefix: str) -> Subject:
    """The same subject, run from exported files."""
    save_program(build_model(subject.config), subject.image_shape(), prefix)
    return replace(subject, program=prefix)


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
    titles = ('train ms', 'train MB', 'recompute ms', 'recompute MB', 'time', 'memory')
    print(TRAINING_COLUMNS.format('name', 'params M', 'MACs G', *titles))
    for row in rows:
        plain, again = row['plain'], row['recompute']
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
            )
        )


def megabytes(count: int | None) -> str:
    """Bytes as tables say them."""
    return '-' if count is None else f'{count / 1e6:.0f}'


if __name__ == '__main__':
    run(main)
