# SPDX-License-Identifier: Apache-2.0
"""Exact evaluation: each image counts once, on any number of processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import paddle
import paddle.nn.functional as F

from datasets.batch import to_tensor
from engine.distributed import Context
from utils.errors import UserError
from utils.runlog import RunLog, progress


class Interrupted(Exception):
    """Evaluation was asked to stop before its end."""


@dataclass(frozen=True)
class Measure:
    """What an evaluation computes.

    Attributes:
        titles: name of each mean over the images -> what to call it.
        best: the name that decides which weights are the best: an accuracy, or the loss.
        sums: model, images [b, C, H, W], labels [b], indices [b] of the images -> sums over them, in the order of
            `titles`, [len(titles)] float64.
        begin: model, context, should_stop -> `sums` for one evaluation, where something must come before it; it too may
            raise `Interrupted`, on every process.
    """

    titles: dict[str, str]
    best: str
    sums: Callable[..., paddle.Tensor] | None = None
    begin: Callable[..., Callable[..., paddle.Tensor]] | None = None

    def score(self, result: dict) -> float:
        """How good a result is: the higher the better."""
        return -result['loss'] if self.best == 'loss' else result[self.best]

    def text(self, means: dict, prefix: str) -> str:
        """'Avg Loss: 0.1234, Avg Acc@1: 0.9000' for the prefix 'Avg'."""
        return ', '.join(f'{prefix} {title}: {means[name]:.4f}' for name, title in self.titles.items())


def _classification(model: paddle.nn.Layer, images: paddle.Tensor, labels: paddle.Tensor, _) -> paddle.Tensor:
    """[sum of losses, top-1 hits, top-5 hits] of a batch."""
    logits = model(images).astype('float32')
    loss = F.cross_entropy(logits, labels, reduction='sum')
    _, top = paddle.topk(logits, min(5, logits.shape[-1]), axis=-1)
    hits = top == labels.unsqueeze(-1)
    return paddle.stack([x.astype('float64') for x in (loss, hits[:, 0].sum(), hits.sum())])


# Mean cross entropy, top-1 and top-5 accuracy as fractions of 1; top-5 of fewer than five classes is top-K.
CLASSIFICATION = Measure({'loss': 'Loss', 'acc1': 'Acc@1', 'acc5': 'Acc@5'}, 'acc1', _classification)


@paddle.no_grad()
def evaluate(
    config,
    model: paddle.nn.Layer,
    loader,
    context: Context,
    log: RunLog,
    should_stop: Callable[[], bool] = lambda: False,
    measure: Measure = CLASSIFICATION,
) -> dict:
    """Means of `measure` over a data set, in float32.

    Processes see disjoint images in their own number of batches; sums meet in one reduction at the end, so there is no
    padding and no communication on the way.

    Returns:
        The means by name, `images`, `skipped` (unreadable images left out), `seconds`.

    Raises:
        Interrupted: on every process, when `should_stop()` said so between two batches of any.
        UserError: when not a single image could be read.
    """
    was_training = model.training
    model.eval()
    started = time.time()
    total, images = paddle.zeros([len(measure.titles)], 'float64'), 0
    skipped, stopped = 0, False
    try:
        compute = measure.sums if measure.begin is None else measure.begin(model, context, should_stop)
        with contextlib.closing(loader.epoch(0)) as batches:
            for index, batch in enumerate(progress(batches, loader.num_batches, 'validation', context.is_main)):
                stopped = should_stop()
                if stopped:
                    break
                if len(batch.labels):
                    pixels, labels = to_tensor(batch, config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
                    total += compute(model, pixels, labels, batch.indices)
                images += len(batch.labels)
                skipped += batch.skipped
                if index % config.REPORT_FREQ == 0 or index == loader.num_batches - 1:
                    means = measure.text(_means(measure, total.tolist(), images), 'Avg')
                    log.local(f'Step[{index:04d}/{loader.num_batches:04d}], {means}')
    finally:
        if was_training:
            model.train()
    # whoever was stopped tells the others here, where all of them meet
    totals = paddle.concat([total, paddle.to_tensor([images, skipped, stopped], 'float64')])
    *sums, images, skipped, stopped = context.sum(totals).tolist()
    if stopped:
        raise Interrupted
    if images == 0:
        raise UserError(f"none of the validation images of '{config.DATA.DATASET}' could be read; see DATA.DATA_PATH.")
    return {
        **_means(measure, sums, images),
        'images': int(images),
        'skipped': int(skipped),
        'seconds': time.time() - started,
    }


def _means(measure: Measure, sums: list[float], images: float) -> dict[str, float]:
    return {name: value / max(images, 1) for name, value in zip(measure.titles, sums)}
