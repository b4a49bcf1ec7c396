# SPDX-License-Identifier: Apache-2.0
"""Exact evaluation: each image counts once, on any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable

import paddle
import paddle.nn.functional as F

from datasets.batch import to_tensor
from engine.distributed import Context
from utils.errors import UserError
from utils.runlog import RunLog, progress


class Interrupted(Exception):
    """Evaluation was asked to stop before its end."""


@paddle.no_grad()
def evaluate(
    config,
    model: paddle.nn.Layer,
    loader,
    context: Context,
    log: RunLog,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Top-1 and top-5 accuracy and mean cross entropy over a data set, in float32.

    Processes see disjoint images in their own number of batches; sums meet in one reduction at the end, so there is no
    padding and no communication on the way. Top-5 of fewer than five classes is top-K.

    Returns:
        `acc1`, `acc5` (fractions of 1), `loss`, `images`, `skipped` (unreadable images left out), `seconds`.

    Raises:
        Interrupted: on every process, when `should_stop()` said so between two batches of any.
        UserError: when not a single image could be read.
    """
    was_training = model.training
    model.eval()
    started = time.time()
    totals = paddle.zeros([4], 'float64')  # loss, top-1, top-5, images
    skipped, stopped = 0, False
    batches = loader.epoch(0)
    try:
        for index, batch in enumerate(progress(batches, loader.num_batches, 'validation', context.is_main)):
            stopped = should_stop()
            if stopped:
                break
            if len(batch.labels):
                images, labels = to_tensor(batch, config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
                totals += _score(model(images).astype('float32'), labels)
            skipped += batch.skipped
            if index % config.REPORT_FREQ == 0 or index == loader.num_batches - 1:
                loss, top1, top5, images = totals.tolist()
                means = [value / max(images, 1) for value in (loss, top1, top5)]
                log.local(
                    f'Step[{index:04d}/{loader.num_batches:04d}], Avg Loss: {means[0]:.4f}, '
                    f'Avg Acc@1: {means[1]:.4f}, Avg Acc@5: {means[2]:.4f}'
                )
    finally:
        batches.close()
        if was_training:
            model.train()
    # whoever was stopped tells the others here, where all of them meet
    totals = paddle.concat([totals, paddle.to_tensor([skipped, stopped], 'float64')])
    loss, top1, top5, images, skipped, stopped = context.sum(totals).tolist()
    if stopped:
        raise Interrupted
    if images == 0:
        raise UserError(f"none of the validation images of '{config.DATA.DATASET}' could be read; see DATA.DATA_PATH.")
    return {
        'acc1': top1 / images,
        'acc5': top5 / images,
        'loss': loss / images,
        'images': int(images),
        'skipped': int(skipped),
        'seconds': time.time() - started,
    }


def _score(logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    """[sum of losses, top-1 hits, top-5 hits, images] of a batch of logits [B, K] and labels [B]."""
    loss = F.cross_entropy(logits, labels, reduction='sum')
    _, top = paddle.topk(logits, min(5, logits.shape[-1]), axis=-1)
    hits = top == labels.unsqueeze(-1)
    count = paddle.full([], len(labels), 'float64')
    return paddle.stack([*(x.astype('float64') for x in (loss, hits[:, 0].sum(), hits.sum())), count])
