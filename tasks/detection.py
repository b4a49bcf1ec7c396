# SPDX-License-Identifier: Apache-2.0
"""Object detection with instance segmentation: a class, a box and a mask for each object, evaluated by COCO's AP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from PIL import Image

from datasets.bands import PLAIN
from datasets.batch import Batch
from datasets.detection import BOXES, CLASSES, MASKS, DetectionDataset, known_categories
from datasets.detection_transforms import detection_transform
from datasets.polygons import coco_masks, decoded_rle
from datasets.sample import IMAGE_SIZE, VALID
from models.detection import Detections, ImageDetections, Targets, postprocess, rasterize
from tasks.base import Losses, Prediction, PredictionOptions, Task, register_task
from tasks.detection_metrics import Detected, DetectionEvaluator, picture_of
from tasks.detection_pictures import Drawn, colors_of, drawn
from tasks.pictures import Shown, enlarged, enlargement
from utils.device import Download
from utils.errors import UserError

COLUMNS = ('class', 'name', 'score', 'left', 'top', 'width', 'height')
_PASTED = 1 << 26  # pixels of masks at a time
_TIES = 0.1  # share of the detections of a program that may differ from those of the model


@register_task('detection')
class DetectionTask(Task):
    """Learn to detect objects; the losses are those of Mask R-CNN (https://arxiv.org/abs/1703.06870)."""

    parts = {name: name for name in ('rpn_cls', 'rpn_loc', 'cls', 'box_reg', 'mask')}
    data_kind = DetectionDataset

    def __init__(self, config):
        super().__init__(config)
        if config.TRAIN.REPEATED_AUG > 1 or config.TRAIN.RANDOM_ERASE_PROB > 0:
            raise UserError(
                'TRAIN.TASK detection knows no repeated augmentation and no random erasing: set TRAIN.REPEATED_AUG and '
                'TRAIN.RANDOM_ERASE_PROB to 0.'
            )
        if not isinstance(config.DATA.IMAGE_SIZE, int):
            raise UserError(
                'TRAIN.TASK detection pads every image to a square, as ViTDet does, so that images of any shape fit: set '
                f'DATA.IMAGE_SIZE to one number, such as {max(config.DATA.IMAGE_SIZE)}.'
            )
        if config.DATA.IMAGE_CHANNELS not in PLAIN:
            raise UserError('TRAIN.TASK detection reads RGB and gray images: set DATA.IMAGE_CHANNELS to 1 or 3.')
        self._validation: DetectionDataset | None = None
        self._names: list[str] | None = None

    # ------------------------------------------------------------------------------------------------ data
    def dataset(self, split: str) -> DetectionDataset:
        """See `Task`. Raises UserError if the classes of both splits differ."""
        dataset = super().dataset(split)
        dataset.check()
        if self._names is not None and dataset.class_names != self._names:
            raise UserError(
                f'{dataset.source} has other categories than the annotations of the other split: both must have the same '
                'categories with the same ids.'
            )
        self._names = dataset.class_names
        if split == 'val':
            self._validation = dataset
        return dataset

    def describe_data(self, data) -> list[str]:
        """See `Task`."""
        return [note for dataset in data.values() for note in dataset.notes]

    def transform(self, training: bool):
        """See `Task`."""
        return detection_transform(self.config, training)

    # ------------------------------------------------------------------------------------------------ training
    def attach(self, model: nn.Layer, log: Callable[[str], None], training: bool) -> None:
        """See `Task`."""
        if not hasattr(model, 'detect'):
            raise UserError(
                f'TRAIN.TASK detection needs a detector, such as MODEL.TYPE mask_rcnn, not {self.config.MODEL.TYPE}.'
            )

    def loss(self, model: nn.Layer, batch: Batch, rng: np.random.Generator) -> Losses:
        """See `Task`; the model returns its losses by name, each with 'loss_' before the names of `parts`."""
        targets = Targets(batch.targets[BOXES], batch.targets[CLASSES], batch.targets[MASKS])
        losses = model(batch.images, batch.targets[VALID], targets=targets, rng=rng)
        parts = {name: losses[f'loss_{name}'].astype('float32') for name in self.parts}
        return Losses(sum(parts.values()), parts)

    def training_pictures(
        self, batch: Batch, rng: np.random.Generator, dataset: DetectionDataset, count: int
    ) -> list[Shown]:
        """See `Task`; boxes, masks and class names are drawn on the images."""
        names, shown = self._class_names(), super().training_pictures(batch, rng, dataset, count)
        colors, targets = colors_of(len(names)), (batch.targets[name] for name in (BOXES, CLASSES, MASKS))
        result = []
        for ([image], _), boxes, classes, outlines in zip(shown, *targets):
            factor, image = enlargement(image.shape[:2]), enlarged(image)  # before the labels are drawn
            polygons = [[factor * polygon for polygon in outline] for outline in outlines]
            masks = list(rasterize(polygons, *image.shape[:2]).astype(bool))
            objects = Drawn(factor * boxes, [names[label] for label in classes], colors[classes], masks)
            picture = np.asarray(drawn(Image.fromarray(image), objects))
            result.append(Shown([picture], f'{len(classes)} object{"s" * (len(classes) != 1)}'))
        return result

    def example(self, batch_size: int) -> Batch:
        """See `Task`; each image has two objects."""
        side, channels = self.config.DATA.IMAGE_SIZE, self.config.DATA.IMAGE_CHANNELS
        corners = np.array([[0.1, 0.1, 0.5, 0.5], [0.3, 0.4, 0.9, 0.8]]) * side
        squares = [[box[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2)] for box in corners]
        classes = np.random.default_rng(0).integers(max(self.config.MODEL.NUM_CLASSES or 1, 1), size=(batch_size, 2))
        targets = {
            VALID: paddle.full([batch_size, 2], side, 'int32'),
            BOXES: [corners.astype('float32')] * batch_size,
            CLASSES: list(classes),
            MASKS: [squares] * batch_size,
        }
        return Batch(paddle.randn([batch_size, channels, side, side]), targets, np.arange(batch_size))

    # ------------------------------------------------------------------------------------------------ evaluation
    @paddle.no_grad()
    def infer(self, model: nn.Layer, batch: Batch) -> list[Detected]:
        """Return detections in the coordinates of the stored images."""
        sizes = batch.targets[VALID]
        copies = [Download(values) for values in (sizes, batch.targets[IMAGE_SIZE])]
        found = model.detect(batch.images, sizes)
        rows = zip(found, batch.images, *(copy.numpy().tolist() for copy in copies))
        return [in_stored_image(one, image, tuple(size), tuple(full)) for one, image, size, full in rows]

    def evaluator(self) -> DetectionEvaluator:
        """See `Task`."""
        return DetectionEvaluator(self._validation, self._class_names(), self.config.DATA, self.config.VAL.SHOW_SCORE)

    def _class_names(self) -> list[str]:
        """Return the class names if known and as many as the model has, else numbers."""
        count = self.config.MODEL.NUM_CLASSES or 0
        names = self._names or [category.name for category in known_categories(self.config) or ()]
        return names if len(names) == count else [str(number) for number in range(count)]

    # ------------------------------------------------------------------------------------------------ predictions
    def prediction_columns(self, options: PredictionOptions) -> tuple[str, ...]:
        """Return class, name, score and box for each of the top objects."""
        return tuple(f'{column}{rank}' for rank in range(1, options.topk + 1) for column in COLUMNS)

    def preprocessing(self) -> dict[str, Any]:
        """See `Task`: the image is resized so that its longer side becomes `resize_long`, normalized, and padded by 0."""
        return {
            'resize_long': self.config.DATA.IMAGE_SIZE,
            'interpolation': 'bilinear',
            'image_size': self.config.DATA.IMAGE_SIZE,
            'outputs': list(Detections._fields),
            'class_names': self._class_names(),
        }

    def program_inputs(self, batch_size: int) -> dict[str, np.ndarray]:
        """See `Task`: (height, width) of each image without its padding."""
        side = self.config.DATA.IMAGE_SIZE
        return {'sizes': np.random.default_rng(0).integers(side // 2, side + 1, (batch_size, 2), 'int32')}

    def exports(self, model: nn.Layer) -> Iterator[None]:
        """See `Task`: at first detections of any score are returned."""
        least, model.min_score = model.min_score, 0.0
        try:
            yield
        finally:
            model.min_score = least
        yield

    def program_difference(self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
        """See `Task`: that of detections, whatever their order; a tenth of them may differ.

        Rounding decides between candidates whose scores or overlaps nearly tie.
        """
        images = zip(*(zip(*outputs) for outputs in (found, expected)))
        side = self.config.DATA.IMAGE_SIZE
        differences = np.concatenate([detection_differences(*map(Detections._make, pair), side) for pair in images])
        return float(np.quantile(differences, 1 - _TIES, method='lower')) if len(differences) else 0.0

    def predictions(self, outputs: Sequence[Detected], options: PredictionOptions) -> list[Prediction]:
        """Return all objects with box and mask, and a picture of those with a score of at least VAL.SHOW_SCORE."""
        names = list(options.class_names or self._class_names())
        return [self._prediction(output, names, options.topk, options.pictures) for output in outputs]

    def _prediction(self, found: Detected, names: list[str], topk: int, draw: bool) -> Prediction:
        boxes = np.concatenate([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], axis=1).tolist()
        rows = zip(found.classes.tolist(), found.scores.tolist(), boxes, found.masks)
        objects = [
            {'class': number, 'name': names[number], 'score': score, 'bbox': box, 'segmentation': mask}
            for number, score, box, mask in rows
        ]
        shown = objects[:topk]
        cells = [value for entry in shown for value in (entry['class'], entry['name'], entry['score'], *entry['bbox'])]
        cells += [''] * (len(COLUMNS) * topk - len(cells))
        texts = [f'{entry["name"]} {entry["score"]:.4f} at {_place(entry["bbox"])}' for entry in shown]
        row = {'height': found.size[0], 'width': found.size[1], 'objects': objects}
        pictures = {'objects': self._picture(found, names)} if draw else {}
        return Prediction(row, tuple(cells), ', '.join(texts) or 'nothing', pictures)

    def _picture(self, found: Detected, names: list[str]) -> Image.Image:
        data, kept = self.config.DATA, np.flatnonzero(found.scores >= self.config.VAL.SHOW_SCORE)
        image = picture_of(found.image, data.IMAGENET_MEAN, data.IMAGENET_STD)
        image = image.resize(found.size[::-1], Image.Resampling.BILINEAR)
        labels = [f'{names[found.classes[index]]} {found.scores[index]:.2f}' for index in kept]
        masks = [decoded_rle(found.masks[index]).astype(bool) for index in kept]
        return drawn(image, Drawn(found.boxes[kept], labels, colors_of(len(names))[found.classes[kept]], masks))


def _place(box: Sequence[float]) -> str:
    """'12,30 40x25': left, top, width, height."""
    left, top, width, height = (round(side) for side in box)
    return f'{left},{top} {width}x{height}'


def in_stored_image(found: ImageDetections, image: Tensor, size: tuple[int, int], stored: tuple[int, int]) -> Detected:
    """Convert the detections of a network input to its stored image; the order is kept.

    Args:
        found: boxes in pixels of the input, masks as probabilities in their boxes.
        image: the input [C, S, S].
        size: (height, width) of the input without its padding.
        stored: (height, width) of the stored image.
    """
    step = max(_PASTED // (stored[0] * stored[1]), 1)
    parts = [
        postprocess(ImageDetections(*(values[start : start + step] for values in found)), size, stored)
        for start in range(0, len(found.scores), step)
    ]
    boxes, scores, classes = (
        np.concatenate([part[number] for part in parts] or [found[number]]) for number in range(3)
    )
    masks = [mask for part in parts for mask in encoded(part.masks)]
    return Detected(boxes, scores, classes, masks, stored, image[:, : size[0], : size[1]])


def detection_differences(found: Detections, expected: Detections, side: float) -> np.ndarray:
    """Return the distance of each expected detection of an image to the nearest one that was found, [k]; 1: there is none.

    The distance of two detections of a class is the largest difference of scores, masks, and boxes divided by `side`.
    """
    one, other = ([part[: outputs.counts] for part in outputs[:4]] for outputs in (found, expected))
    result = np.ones(abs(len(one[1]) - len(other[1])) + len(other[1]))
    for number, (box, score, label, mask) in enumerate(zip(*other)):
        same = one[2] == label
        if same.any():
            boxes, scores = np.abs(one[0][same] - box).max(1) / side, np.abs(one[1][same] - score)
            distances = np.maximum(np.maximum(boxes, scores), np.abs(one[3][same] - mask).max((1, 2)))
            result[number] = distances.min()
    return result


def encoded(masks: np.ndarray) -> list[dict[str, Any]]:
    """Encode masks [k, H, W] bool as compressed RLEs."""
    if not len(masks):
        return []
    codes = coco_masks().encode(np.asfortranarray(masks.transpose(1, 2, 0).astype('uint8')))
    return [{'size': list(code['size']), 'counts': code['counts'].decode('ascii')} for code in codes]
