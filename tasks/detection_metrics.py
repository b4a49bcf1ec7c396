# SPDX-License-Identifier: Apache-2.0
"""Average precision of boxes and masks, by pycocotools (https://github.com/cocodataset/cocoapi)."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import paddle
from paddle import Tensor, nn
from PIL import Image

from datasets.batch import Batch
from datasets.detection import BOXES, CLASSES, DetectionDataset
from tasks.base import Evaluator, Group
from tasks.detection_pictures import Drawn, colors_of, drawn
from tasks.pictures import as_image, image_grid, pixels

KINDS = {'box': 'bbox', 'mask': 'segm'}  # prefix of the metrics -> pycocotools' name
METRICS = (
    'ap',
    'ap50',
    'ap75',
    'aps',
    'apm',
    'apl',
    'ar1',
    'ar10',
    'ar100',
    'ars',
    'arm',
    'arl',
)  # in pycocotools' order
RESULTS = 'detections.json'
SHOWN = 4  # validation images in the picture of an evaluation
ABSENT = -1.0  # pycocotools' value of a mean over nothing


class Detected(NamedTuple):
    """Detections in an image.

    Attributes:
        boxes: (left, top, right, bottom) in pixels of the stored image, [k, 4] float32.
        scores: [k] float32.
        classes: [k] int64.
        masks: an RLE of the stored image's size each, with `size` and `counts`, which is compressed text.
        size: (height, width) of the stored image.
        image: normalized, without padding, [C, h, w].
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: list[dict[str, Any]]
    size: tuple[int, int]
    image: Tensor


def coco_statistics(truth: dict[str, list], detections: Sequence[dict], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate detections on all images of `truth`.

    Args:
        truth: images, annotations and categories in COCO's format.
        detections: COCO's results, with `bbox` and `segmentation`.
        kind: 'bbox' or 'segm'. For masks the boxes are dropped, so that areas are mask areas.

    Returns:
        The values of METRICS [12] and the AP of each category, sorted by id, [K]; ABSENT if there is no object.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    field = {'bbox': 'bbox', 'segm': 'segmentation'}[kind]
    results = [
        {
            'image_id': found['image_id'],
            'category_id': found['category_id'],
            'score': found['score'],
            field: found[field],
        }
        for found in detections
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {**truth, 'annotations': [dict(entry) for entry in truth['annotations']]}
        reference.createIndex()
        if results:
            found = reference.loadRes(results)
        else:  # which loadRes does not take
            found = COCO()
            found.dataset = {**truth, 'annotations': []}
            found.createIndex()
        evaluation = COCOeval(reference, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval['precision'][:, :, :, 0, -1]  # [thresholds, recalls, K], all areas, 100 detections
    valid = precision > ABSENT
    sums, counts = np.where(valid, precision, 0).sum((0, 1)), valid.sum((0, 1))
    return np.asarray(evaluation.stats), np.where(counts > 0, sums / np.maximum(counts, 1), ABSENT)


def coco_results(found: Detected, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return COCO's results of an image; boxes are [left, top, width, height]."""
    corners = found.boxes.astype('float64')
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    return [
        {'image_id': image_id, 'category_id': category_ids[number], 'bbox': box, 'score': score, 'segmentation': mask}
        for number, box, score, mask in zip(found.classes.tolist(), boxes, found.scores.tolist(), found.masks)
    ]


class DetectionEvaluator(Evaluator):
    """COCO's metrics of boxes and masks. The detections of all ranks are gathered, and rank 0 evaluates them once.

    Args:
        dataset: validation images; None: nothing will be evaluated.
        names: class names.
        data: DATA of the configuration; mean and standard deviation are read.
        shown_score: minimum score of objects in pictures.
    """

    titles = {'box_ap': 'box AP', 'box_ap50': 'box AP50', 'mask_ap': 'mask AP', 'mask_ap50': 'mask AP50'}
    best = ('box_ap', 'max')

    def __init__(self, dataset: DetectionDataset | None, names: Sequence[str], data, shown_score: float):
        self.dataset = dataset
        self.names = list(names)
        self._statistics = data.IMAGENET_MEAN, data.IMAGENET_STD
        self._shown_score = shown_score

    def reset(self, model: nn.Layer, group: Group, should_stop: Callable[[], bool]) -> None:
        """See `Evaluator`."""
        self._found: dict[int, list[dict]] = {}  # results by index of the image
        self._shown: list[tuple] = []
        self._results: list[dict] = []  # of all processes, on the main one

    def process(self, batch: Batch, outputs: Sequence[Detected]) -> None:
        """See `Evaluator`."""
        category_ids = [category.id for category in self.dataset.categories]
        for place, (index, found) in enumerate(zip(batch.indices.tolist(), outputs)):
            self._found[index] = coco_results(found, int(self.dataset.image_ids[index]), category_ids)
            if len(self._shown) < SHOWN:
                self._shown.append((found, batch.targets[BOXES][place], batch.targets[CLASSES][place]))

    def reduce(self, group: Group) -> None:
        """See `Evaluator`."""
        texts = group.gather(json.dumps(list(self._found.items())))
        self._found = {}
        values = np.zeros((len(KINDS), len(METRICS) + len(self.names)))
        if group.is_main:
            found = dict(sorted(pair for text in texts for pair in json.loads(text)))
            self._results = [entry for entries in found.values() for entry in entries]
            truth = self.dataset.truth(list(found))
            values = np.stack([np.concatenate(coco_statistics(truth, self._results, kind)) for kind in KINDS.values()])
        values = group.sum(paddle.to_tensor(values, 'float64')).numpy()
        self._values = np.where(values == ABSENT, np.nan, values)

    def result(self) -> dict[str, float]:
        """Return METRICS of boxes and masks as fractions of 1; NaN: no such object."""
        rows = zip(KINDS, self._values.tolist())
        return {f'{kind}_{name}': value for kind, row in rows for name, value in zip(METRICS, row)}

    def details(self) -> list[str]:
        """Return the metrics of boxes and of masks, and a line per class."""
        tables = zip(KINDS, self._values)
        lines = [f'{kind:<4}  {"  ".join(map(_labeled, METRICS, row))}' for kind, row in tables]
        width, classes = max(map(len, self.names)), self._values[:, len(METRICS) :].T
        return lines + [
            f'{name:<{width}}  ' + '  '.join(f'{kind} AP {_text(value)}' for kind, value in zip(KINDS, row))
            for name, row in zip(self.names, classes)
        ]

    def class_results(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """See `Evaluator`."""
        columns = self.names, *self._values[:, len(METRICS) :].tolist()
        return [dict(zip(('name', *(f'{kind}_ap' for kind in KINDS)), row)) for row in zip(*columns)]

    def files(self) -> dict[str, str]:
        """Return COCO's results file, which pycocotools and COCO's server read."""
        return {RESULTS: json.dumps(self._results)}

    def pictures(self, model: nn.Layer) -> dict[str, Image.Image]:
        """Return ground truth and detections of some images."""
        rows = [self._row(*shown) for shown in self._shown]
        return {'detection': image_grid(rows)} if rows else {}

    def _row(self, found: Detected, boxes: np.ndarray, classes: np.ndarray) -> list[np.ndarray]:
        image = picture_of(found.image, *self._statistics)
        scale = np.array([image.width / found.size[1], image.height / found.size[0]] * 2)
        colors, names = colors_of(len(self.names)), self.names
        truth = Drawn(boxes * scale, [names[number] for number in classes], colors[classes])
        kept = found.scores >= self._shown_score
        labels = [f'{names[number]} {score:.2f}' for number, score in zip(found.classes[kept], found.scores[kept])]
        predicted = Drawn(found.boxes[kept] * scale, labels, colors[found.classes[kept]])
        return [np.asarray(drawn(image, objects)) for objects in (truth, predicted)]


def picture_of(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Normalized [C, h, w] -> RGB picture."""
    shown = pixels(image.unsqueeze(0), mean, std)[0]
    return as_image(shown).convert('RGB')


def _labeled(name: str, value: float) -> str:
    return f'{name[:2].upper()}{name[2:]} {_text(value)}'


def _text(value: float) -> str:
    return '-' if np.isnan(value) else f'{value:.4f}'
