# SPDX-License-Identifier: Apache-2.0
"""Exact evaluation: each image counts once, on any number of ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import numpy as np
import paddle

from datasets.batch import on_device
from engine.distributed import Context
from tasks import Evaluator, Interrupted, Task
from utils.device import upload
from utils.errors import UserError
from utils.runlog import RunLog, progress


@paddle.no_grad()
def evaluate(
    config,
    model: paddle.nn.Layer,
    loader,
    context: Context,
    log: RunLog,
    task: Task,
    evaluator: Evaluator,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Evaluate a model on a data set.

    Ranks evaluate disjoint images, each in its own number of batches. All-reduces follow the last batch, so no images are
    padded and ranks do not communicate between batches.

    Returns:
        The metrics of the evaluator by name, `images`, `skipped` (unreadable images), `seconds`.

    Raises:
        Interrupted: on every rank, if `should_stop()` was true between two batches on any rank.
        UserError: no image could be read.
    """
    was_training = model.training
    model.eval()
    started = time.time()
    images = skipped = 0
    stopped = False
    try:
        evaluator.reset(model, context, should_stop)
        with contextlib.closing(loader.epoch(0, borrow=True)) as arrays:
            batches = on_device(arrays, config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
            for index, batch in enumerate(progress(batches, loader.num_batches, 'validation', context.is_main)):
                context.mark()
                stopped = should_stop()
                if stopped:
                    break
                if len(batch):
                    evaluator.process(batch, task.infer(model, batch))
                images += len(batch)
                skipped += batch.skipped
                if index % config.REPORT_FREQ == 0 or index == loader.num_batches - 1:
                    metrics = describe_metrics(evaluator, evaluator.progress(), 'Avg')
                    log.local(f'Step[{index:04d}/{loader.num_batches:04d}]{metrics and ", "}{metrics}')
    finally:
        if was_training:
            model.train()
    # The stop flag is all-reduced, so that all ranks stop together.
    counts = context.sum(upload(np.array([images, skipped, stopped], 'float64')))
    images, skipped, stopped = counts.tolist()
    if stopped:
        raise Interrupted
    if images == 0:
        raise UserError(f"none of the validation images of '{config.DATA.DATASET}' could be read; see DATA.DATA_PATH.")
    evaluator.reduce(context)
    return {
        **evaluator.result(),
        'images': int(images),
        'skipped': int(skipped),
        'seconds': time.time() - started,
    }


def describe_metrics(evaluator: Evaluator, metrics: dict, prefix: str) -> str:
    """Format metrics, such as 'Avg Loss: 0.1234, Avg Acc@1: 0.9000' for the prefix 'Avg'."""
    titles = evaluator.titles.items()
    return ', '.join(f'{prefix} {title}: {metrics[name]:.4f}' for name, title in titles if name in metrics)
