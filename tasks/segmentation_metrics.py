# SPDX-License-Identifier: Apache-2.0
"""Metrics of semantic segmentation from pixel counts: IoU and accuracy per class, and their means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from PIL import Image

from datasets.batch import Batch
from datasets.classes import ClassTable
from datasets.segmentation import LABELS
from tasks.base import Evaluator, Group
from tasks.pictures import image_grid, pixels
from utils.device import upload

SHOWN = 4  # validation images in the picture of an evaluation
TITLES = {'miou': 'mIoU', 'macc': 'mAcc', 'aacc': 'aAcc'}


def count_pixels(classes: Tensor, labels: Tensor, num_classes: int, ignored: int) -> Tensor:
    """Count pixels per class; pixels with label `ignored` do not count.

    Args:
        classes: predicted classes, integers 0 to n - 1, of any shape.
        labels: labels of the same shape; other values than classes and `ignored` belong to no class.
        num_classes: n.
        ignored: label of ignored pixels.

    Returns:
        [3, n] int64: for each class the number of correct, predicted and labeled pixels.
    """
    classes, labels = classes.astype('int64'), labels.astype('int64')
    kept, none = labels != ignored, paddle.full_like(labels, -1)
    predicted = paddle.where(kept, classes, none)
    hits = paddle.where(classes == labels, predicted, none)
    labeled = paddle.where(paddle.logical_and(kept, labels < num_classes), labels, none)
    # `masked_select` and `bincount` would let the host wait for a GPU. Values below 0 are in no bin.
    return paddle.stack(
        [paddle.histogram(values, num_classes, 0, num_classes) for values in (hits, predicted, labeled)]
    )


def segmentation_metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Compute `iou` and `acc` [n], and the metrics of TITLES, as fractions of 1, from counts [3, n].

    The IoU of a class without predicted and labeled pixels, and the accuracy of a class without labeled pixels, are NaN;
    means exclude NaN.
    """
    hits, predicted, labeled = counts.astype('float64')
    with np.errstate(invalid='ignore', divide='ignore'):
        iou, acc = hits / (predicted + labeled - hits), hits / labeled
        aacc = hits.sum() / labeled.sum()
    return {'iou': iou, 'acc': acc, 'miou': _mean(iou), 'macc': _mean(acc), 'aacc': aacc}


def _mean(values: np.ndarray) -> np.ndarray:
    found = values[~np.isnan(values)]
    return found.mean() if len(found) else np.float64('nan')


class SegmentationEvaluator(Evaluator):
    """mIoU, mAcc and aAcc from integer counts over all images and processes.

    Args:
        classes: names and colors of the classes.
        ignored: label of ignored pixels.
        data: DATA of the configuration, for mean and standard deviation.
    """

    titles = TITLES
    best = ('miou', 'max')

    def __init__(self, classes: ClassTable, ignored: int, data):
        self.classes = classes
        self.ignored = ignored
        self._statistics = data.IMAGENET_MEAN, data.IMAGENET_STD

    def reset(self, model: nn.Layer, group: Group, should_stop: Callable[[], bool]) -> None:
        """See `Evaluator`."""
        self._counts = paddle.zeros([3, len(self.classes.names)], 'int64')
        self._shown: list[Sequence[np.ndarray]] = []

    def process(self, batch: Batch, outputs: Sequence[Any]) -> None:
        """See `Evaluator`; `classes` of each output is a map [H, W] in the size of the label map."""
        for labels, (classes, image) in zip(batch.targets[LABELS], outputs):
            self._counts += count_pixels(classes, upload(labels.astype('int32')), len(self.classes.names), self.ignored)
            if len(self._shown) < SHOWN:
                self._shown.append((pixels(image.unsqueeze(0), *self._statistics)[0], labels, classes.numpy()))

    def reduce(self, group: Group) -> None:
        """See `Evaluator`."""
        self._counts = group.sum(self._counts)

    def result(self) -> dict[str, float]:
        """See `Evaluator`."""
        metrics = segmentation_metrics(self._counts.numpy())
        return {name: float(metrics[name]) for name in self.titles}

    def details(self) -> list[str]:
        """Return one line per class."""
        metrics, names = segmentation_metrics(self._counts.numpy()), self.classes.names
        width = max(map(len, names))
        rows = zip(names, metrics['iou'], metrics['acc'])
        return [f'{name:<{width}}  IoU {_text(iou)}  Acc {_text(acc)}' for name, iou, acc in rows]

    def class_results(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """See `Evaluator`."""
        counts, names = self._counts.numpy(), self.classes.names
        metrics = segmentation_metrics(counts)
        columns = names, metrics['iou'].tolist(), metrics['acc'].tolist(), *counts.tolist()
        return [dict(zip(('name', 'iou', 'acc', 'correct', 'predicted', 'labeled'), row)) for row in zip(*columns)]

    def pictures(self, model: nn.Layer) -> dict[str, Image.Image]:
        """Return a picture of some images with labels and predictions."""
        rows = [self._row(*shown) for shown in self._shown]
        return {'segmentation': image_grid(rows)} if rows else {}

    def _row(self, image: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> list[np.ndarray]:
        image = image.repeat(3, axis=-1) if image.shape[-1] == 1 else image
        size = image.shape[1::-1]
        maps = (Image.fromarray(colored(values, self.classes.palette)) for values in (labels, classes))
        return [image, *(np.asarray(picture.resize(size, Image.Resampling.NEAREST)) for picture in maps)]


def _text(value: float) -> str:
    return '     -' if np.isnan(value) else f'{value:.4f}'


def colored(classes: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Class map [H, W] -> [H, W, 3] uint8; pixels without a class are black."""
    known = (classes >= 0) & (classes < len(palette))
    return np.where(known[..., None], palette[np.where(known, classes, 0)], 0).astype('uint8')
