#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Part of tools/check_device.py: sum vectors over two processes, and print the values and the speed as JSON."""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start(single_process=False)

import json
import statistics
import sys
import time

import paddle

from engine import distributed
from engine.distributed import Context
from engine.launch import is_worker, launch
from utils.cli import run

PROCESSES, ROUNDS = 2, 5
VALUES = {True: 2**24, False: 2**20}  # on a GPU, on a CPU


def main() -> None:
    if not is_worker():
        sys.exit(launch(PROCESSES))
    context = distributed.start()
    result = measure(context)
    if context.is_main:
        print(json.dumps(result))


def measure(context: Context) -> dict[str, object]:
    """Return the sum of (rank + 1) * [0, 1, 2] over the processes, and gigabytes of float32 per second of an all-reduce."""
    small = context.sum(paddle.arange(3, dtype='float32') * (context.rank + 1)).tolist()
    large, seconds = paddle.ones([VALUES[context.on_gpu]]), []
    for _ in range(ROUNDS + 1):
        context.barrier()
        context.synchronize()
        started = time.perf_counter()
        context.sum(large)
        context.synchronize()
        seconds.append(time.perf_counter() - started)
    expected = float(context.world_size ** (ROUNDS + 1))
    return {
        'sum': small,
        'exact': bool((large == expected).all().item()),
        'megabytes': 4 * large.size / 1e6,
        'gigabytes_per_second': 4 * large.size / statistics.median(seconds[1:]) / 1e9,
    }


if __name__ == '__main__':
    run(main)
