#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Growth of time and memory with image size, depth, batch, classes, and with the number of images.

    python benchmarks/growth.py -json growth.json -picture growth.png
    python benchmarks/growth.py -json lists.json -only images -images 1e3 1e5 1e7

Each point is a process of its own, one at a time: a training step of a model, or a list file that is read and iterated.
docs/growth.md explains the numbers.
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
elif __name__ == '__mp_main__':  # a process that measures one point
    from utils.environment import import_paddle

    import_paddle()

import argparse
import concurrent.futures
import contextlib
import functools
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence

import numpy as np
import paddle

from benchmarks.growth_chart import draw
from benchmarks.long_lists import measure_list
from config import get_config
from engine import distributed
from engine.throughput import BenchmarkCase
from models.profile import profile_config
from models.registry import config_file
from tools._output import add_output_file
from utils.cli import run
from utils.environment import processor_name
from utils.files import atomic_write, json_text
from utils.processes import die_with_parent, resident_memory
from utils.temporary import temporary_folder

MODELS = {'DeiT-S': 'deit_small_patch16_224', 'EViT 0.5': 'evit_small_patch16_224_k05_fuse', 'gMLP-S': 'gmlp_s16_224'}
# Values of each axis; an axis varies while the others have the value of `BASE`.
AXES = {
    'image size': (128, 224, 384, 512),
    'depth': (4, 12, 24),
    'batch': (1, 4, 8),
    'classes': (1000, 10000, 100000),
}
BASE = {'image size': 224, 'depth': 12, 'batch': 1, 'classes': 1000}
DROPS = 3  # blocks of EViT that drop tokens, at the quarters of the depth
IMAGES = (1e3, 1e4, 1e5, 1e6, 1e7)
TAIL = 2  # last points of an axis, whose exponent is given beside that of all points


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(atomic_write(args.json, 'w'))
        picture = stack.enter_context(atomic_write(args.picture)) if args.picture else None
        result = {'environment': environment(args), 'models': [], 'images': []}
        if args.only in (None, 'models'):
            result['models'] = [sweep(name, axis, args.steps) for axis in AXES for name in MODELS]
        if args.only in (None, 'images'):
            result['images'] = [of_images(int(count)) for count in args.images]
        file.write(json_text(result, indent=1))
        if picture:
            draw(picture, result)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Measure how time and memory grow.', allow_abbrev=False)
    parser.add_argument('-only', choices=('models', 'images'), help='measure the models or the numbers of images only')
    parser.add_argument('-steps', type=int, default=2, metavar='N', help='timed steps of a point (default: 2)')
    parser.add_argument('-images', type=float, nargs='+', default=IMAGES, metavar='N', help='lines of list files')
    add_output_file(parser, '.json', flag='-json', dest='json', what='results', required=True)
    add_output_file(parser, '.png', flag='-picture', dest='picture', what='picture of the results')
    return parser.parse_args(argv)


def environment(args: argparse.Namespace) -> dict:
    """Return the conditions of the measurement."""
    threads = int(os.environ.get('FLAGS_paddle_num_threads', 1))
    return {'paddle': paddle.__version__, 'device': processor_name(), 'threads': threads, 'steps': args.steps, **BASE}


def in_process(function: Callable, *arguments):
    """Return the result of a function in a new process, whose memory starts small."""
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context('spawn'), initializer=die_with_parent
    ) as executor:
        return executor.submit(function, *arguments).result()


# ---------------------------------------------------------------------------------------------------- models
def sweep(name: str, axis: str, steps: int) -> dict:
    """Measure a model along an axis. Print and return the points and their exponents."""
    points = [{axis: value, **at(name, tuple({**BASE, axis: value}.items()), steps)} for value in AXES[axis]]
    x = [point[axis] for point in points]
    exponents = {}
    for kind in ('macs', 'cpu_seconds', 'memory_bytes'):
        y = [point[kind] for point in points]
        exponents[kind] = {'all': exponent(x, y), 'last': exponent(x[-TAIL:], y[-TAIL:])}
    texts = (f'{kind} {found["all"]:.2f}, at the end {found["last"]:.2f}' for kind, found in exponents.items())
    print(f'{name}, {axis} {x[0]} to {x[-1]}: exponents of {"; ".join(texts)}', flush=True)
    return {'name': name, 'axis': axis, 'points': points, 'exponents': exponents}


@functools.cache
def at(name: str, values: tuple[tuple[str, int], ...], steps: int) -> dict:
    """Return `measure_step` of a point, which several axes may share."""
    found = in_process(measure_step, name, dict(values), steps)
    where = ', '.join(f'{axis} {value}' for axis, value in values)
    print(f'{name}, {where}: {found["cpu_seconds"]:.2f} s, {found["memory_bytes"] / 1e6:.0f} MB', flush=True)
    return found


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of log y over log x by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measure_step(name: str, values: dict[str, int], steps: int) -> dict:
    """Return MACs, parameters, peak memory, and the shortest wall and processor time of a training step."""
    config, context = configured(name, values), distributed.start()
    before = resident_memory('VmRSS')
    with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # resets the peak
    call = BenchmarkCase(name, config).training_call(values['batch'], context)
    call()
    wall, used = [], []
    for _ in range(steps):
        started, begun = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - started)
        used.append(time.process_time() - begun)
    memory = resident_memory('VmHWM') - before
    found = profile_config(config, [1, 3, values['image size'], values['image size']])
    return {
        'params': found.params,
        'macs': found.macs * values['batch'],
        'seconds': min(wall),
        'cpu_seconds': min(used),
        'memory_bytes': memory,
    }


def configured(name: str, values: dict[str, int]):
    """Return the configuration of a model at a point."""
    depth = values['depth']
    options = ['DATA.IMAGE_SIZE', values['image size'], 'MODEL.NUM_CLASSES', values['classes']]
    options += ['MODEL.MIXER.DEPTH' if name.startswith('gMLP') else 'MODEL.TRANS.DEPTH', depth]
    if name.startswith('EViT'):
        options += ['MODEL.EVIT.DROP_LOC', [(1 + place) * depth // (DROPS + 1) for place in range(DROPS)]]
        options += ['MODEL.EVIT.SHRINK_START_EPOCH', 0, 'MODEL.EVIT.SHRINK_EPOCHS', 0]  # no schedule
    if not name.startswith('gMLP'):  # loss and mixing are the same in all
        options += ['TRAIN.MODEL_EMA', False]
    config = get_config(config_file(MODELS[name]), options)
    config.freeze()
    return config


# ---------------------------------------------------------------------------------------------------- images
def of_images(count: int) -> dict:
    """Measure a list file of `count` lines. Print and return the numbers."""
    with temporary_folder('growth') as folder:
        row = in_process(measure_list, folder, count)
    text = ', '.join(f'{key} {value:.3g}' for key, value in row.items() if key != 'images')
    print(f'10^{math.log10(count):.0f} images: {text}', flush=True)
    return row


if __name__ == '__main__':
    run(main)
