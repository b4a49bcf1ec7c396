# SPDX-License-Identifier: Apache-2.0
"""Images per second of a model on this device."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import paddle

from engine.distributed import Context


@dataclass(frozen=True)
class Throughput:
    """Medians over the timed rounds."""

    batch_size: int
    images_per_second: float
    latency_ms: float  # of one batch


@paddle.no_grad()
def measure(
    model: paddle.nn.Layer,
    batch_size: int,
    image_size: int,
    channels: int,
    context: Context,
    rounds: int = 10,
    warmup: int = 3,
) -> Throughput:
    """Times the forward pass of random images [batch_size, channels, image_size, image_size] in evaluation mode."""
    model.eval()
    images = paddle.randn([batch_size, channels, image_size, image_size])
    seconds = []
    for index in range(warmup + rounds):
        context.synchronize()
        started = time.perf_counter()
        model(images)
        context.synchronize()
        if index >= warmup:
            seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return Throughput(batch_size, batch_size / median, median * 1000)


def report(result: Throughput) -> None:
    """Prints a measurement."""
    print(
        f'throughput: {result.images_per_second:.1f} images/s at batch {result.batch_size}, '
        f'{result.latency_ms:.1f} ms a batch (median)'
    )
