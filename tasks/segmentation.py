# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation, trained on crops and evaluated by mIoU on whole images.

Transform, loss, inference and metric follow mmsegmentation 0.11, with options for those of Segmenter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from PIL import Image

from datasets.batch import Batch, to_device
from datasets.classes import ClassTable, numbered_classes
from datasets.dense import crop_size, dense_transform
from datasets.known_classes import known_classes
from datasets.sample import IMAGE_SIZE, Plane
from datasets.segmentation import LABELS, SegmentationDataset, label_type
from models.layers.resize import resize_maps
from models.segmentation.inference import slide_inference, whole_inference
from models.segmentation.losses import segmentation_loss
from tasks.base import Losses, Prediction, PredictionOptions, Task, register_task
from tasks.pictures import BACKGROUND, Shown, as_image, pixels
from tasks.segmentation_metrics import SegmentationEvaluator, colored
from utils.errors import UserError
from utils.sizes import size_pair


class SegmentationOutput(NamedTuple):
    """Predicted class map of an image, and the image.

    Attributes:
        classes: [H, W] int64, in the size of the stored image.
        image: normalized, [C, h, w].
    """

    classes: Tensor
    image: Tensor


@register_task('segmentation')
class SegmentationTask(Task):
    """Semantic segmentation; loss: see `segmentation_loss`."""

    counts = {'acc': 'Acc'}
    data_kind = SegmentationDataset

    def __init__(self, config):
        super().__init__(config)
        if not config.VAL.SCALE_RATIOS:
            raise UserError('VAL.SCALE_RATIOS is empty, but needs at least one number: [1.0] evaluates one scale.')
        if config.TRAIN.REPEATED_AUG > 1 or config.TRAIN.RANDOM_ERASE_PROB > 0:
            raise UserError(
                'TRAIN.TASK segmentation does not support repeated augmentation and random erasing: set '
                'TRAIN.REPEATED_AUG and TRAIN.RANDOM_ERASE_PROB to 0.'
            )
        self.classes: ClassTable | None = None

    # ------------------------------------------------------------------------------------------------ data
    def dataset(self, split: str) -> SegmentationDataset:
        """See `Task`."""
        dataset = super().dataset(split)
        dataset.check()
        self.classes = dataset.classes
        return dataset

    def describe_data(self, data) -> list[str]:
        """See `Task`; empty classes are not listed, since only `tools/verify_data.py` reads all label maps."""
        return [note for dataset in data.values() for note in dataset.notes]

    def transform(self, training: bool):
        """See `Task`."""
        labels = label_type(self.config.MODEL.NUM_CLASSES or 1, self.config.DATA.IGNORE_INDEX)
        return dense_transform(self.config, training, [Plane(LABELS, crop_size(self.config), labels)])

    # ------------------------------------------------------------------------------------------------ training
    def attach(self, model: nn.Layer, log: Callable[[str], None], training: bool) -> None:
        """See `Task`."""
        if not hasattr(model, 'decode_head'):
            raise UserError(
                f'TRAIN.TASK segmentation needs a model with a decoder, such as MODEL.TYPE segmenter or upernet, not '
                f'{self.config.MODEL.TYPE}.'
            )
        size = crop_size(self.config)
        if getattr(model, 'fixed_size', False) and size != (wanted := size_pair(model.image_size)):
            raise UserError(
                f'the relative positions of this model need crops of {wanted[0]} x {wanted[1]} pixels: remove '
                'DATA.CROP_SIZE.'
            )
        if getattr(model, 'fixed_size', False) and not self.config.VAL.IS_SLIDE:
            raise UserError('the relative positions of this model need windows of one size: set VAL.IS_SLIDE to True.')
        if getattr(model, 'auxiliary_head', None) is not None:
            self.parts = {'decode': 'decode', 'aux': 'aux'}

    def loss(self, model: nn.Layer, batch: Batch, rng: np.random.Generator) -> Losses:
        """See `Task`; the model returns logits [B, n, h, w], or a pair of them and the auxiliary logits."""
        outputs, labels, train = model(batch.images), batch.targets[LABELS], self.config.TRAIN
        logits, aux = outputs if isinstance(outputs, (tuple, list)) else (outputs, None)
        logits, ignored = resize_maps(logits.astype('float32'), labels.shape[1:]), self.config.DATA.IGNORE_INDEX
        losses = segmentation_loss(logits, aux, labels, ignored, train.AVG_NON_IGNORE, train.AUX_WEIGHT)
        parts = {'decode': losses.decode, 'aux': losses.auxiliary} if self.parts else {}
        accuracy = pixel_accuracy(logits.detach(), labels, ignored)
        return Losses(losses.total, parts, {'acc': accuracy * len(batch)})

    def training_pictures(
        self, batch: Batch, rng: np.random.Generator, dataset: SegmentationDataset, count: int
    ) -> list[Shown]:
        """See `Task`; beside each image its label map in the colors of the classes, which the caption lists by
        area.
        """
        maps, table = batch.targets[LABELS][:count].numpy().astype('int64'), self._class_table()
        shown = super().training_pictures(batch, rng, dataset, count)
        return [
            Shown([image, self._painted(labels, table)], ', '.join(_classes_by_area(labels, table.names)))
            for ([image], _), labels in zip(shown, maps)
        ]

    def _painted(self, labels: np.ndarray, table: ClassTable) -> np.ndarray:
        """Return a label map [H, W] in colors, ignored pixels in white."""
        ignored = labels[..., None] == self.config.DATA.IGNORE_INDEX
        return np.where(ignored, BACKGROUND, colored(labels, table.palette)).astype('uint8')

    def image_shape(self) -> list[int]:
        """See `Task`."""
        return [self.config.DATA.IMAGE_CHANNELS, *crop_size(self.config)]

    def example(self, batch_size: int) -> Batch:
        """See `Task`."""
        shape, classes = self.image_shape(), max(self.config.MODEL.NUM_CLASSES or 1, 1)
        labels = paddle.randint(classes, shape=[batch_size, *shape[1:]], dtype='int32')
        return Batch(paddle.randn([batch_size, *shape]), {LABELS: labels}, np.arange(batch_size))

    # ------------------------------------------------------------------------------------------------ evaluation
    @paddle.no_grad()
    def infer(self, model: nn.Layer, batch: Batch) -> list[SegmentationOutput]:
        """Return class maps in the size of the stored images. Images of equal size are batched."""
        data, others = self.config.DATA, batch.targets.get('scales', [[] for _ in batch.images])
        together = defaultdict(list)
        for index, (image, size) in enumerate(zip(batch.images, batch.targets[IMAGE_SIZE])):
            together[tuple(image.shape), tuple(size.tolist())].append(index)
        results: dict[int, Tensor] = {}
        for (_, size), indices in together.items():
            scales = [paddle.stack([batch.images[index] for index in indices])]
            for pictures in zip(*(others[index] for index in indices)):
                scale = Batch(np.stack(pictures), {}, np.array(indices))
                scales.append(to_device(scale, data.IMAGENET_MEAN, data.IMAGENET_STD).images)
            classes = self.probabilities(model, scales, size).argmax(1)
            results.update(zip(indices, classes.unbind()))
        return [SegmentationOutput(results[index], image) for index, image in enumerate(batch.images)]

    def probabilities(self, model: nn.Layer, scales: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Average the class probabilities over scales and flips, [B, n, *size].

        Args:
            model: segmentation model.
            scales: images [B, C, h, w], one tensor per scale.
            size: (rows, columns) of the result.
        """
        flips = (False, True) if self.config.VAL.FLIP else (False,)
        total, count = None, len(scales) * len(flips)
        for images in scales:
            for flipped in flips:
                logits = self._logits(model, images.flip([3]) if flipped else images)
                probabilities = F.softmax(resize_maps(logits, size), axis=1)
                probabilities = probabilities.flip([3]) if flipped else probabilities
                total = probabilities if total is None else total + probabilities
        return total / count

    def _logits(self, model: nn.Layer, images: Tensor) -> Tensor:
        if self.config.VAL.IS_SLIDE:
            return slide_inference(model, images, crop_size(self.config), tuple(self.config.VAL.STRIDE_SIZE))
        return whole_inference(model, images)

    def evaluator(self) -> SegmentationEvaluator:
        """See `Task`."""
        return SegmentationEvaluator(self._class_table(), self.config.DATA.IGNORE_INDEX, self.config.DATA)

    def _class_table(self) -> ClassTable:
        """Return names and colors of the data's classes, or numbers if they do not fit the model."""
        count = self.config.MODEL.NUM_CLASSES
        table = self.classes or known_classes(self.config)
        return table if table is not None and len(table.names) == count else numbered_classes(count)

    # ------------------------------------------------------------------------------------------------ predictions
    def prediction_columns(self, options: PredictionOptions) -> tuple[str, ...]:
        """Return columns for index, name and pixel share of the most frequent classes."""
        topk = min(options.topk, self.config.MODEL.NUM_CLASSES)
        return tuple(f'{part}{rank}' for rank in range(1, topk + 1) for part in ('class', 'name', 'share'))

    def preprocessing(self) -> dict[str, Any]:
        """See `Task`: resize the image to fit into `resize_scale`, then run windows of `image_size`."""
        return {
            'resize_scale': list(self.config.DATA.IMAGE_SCALE),
            'interpolation': 'opencv_bilinear',
            'image_size': list(crop_size(self.config)),
            'class_names': self._class_table().names,
        }

    def predictions(self, outputs: Sequence[SegmentationOutput], options: PredictionOptions) -> list[Prediction]:
        """Return pixel shares of the classes, the class map as a palette image, and an overlay."""
        table = self._class_table()
        names = list(options.class_names or table.names)
        topk = min(options.topk, len(names))
        return [self._prediction(output, names, table.palette, topk, options.pictures) for output in outputs]

    def _prediction(
        self, output: SegmentationOutput, names: list[str], palette: np.ndarray, topk: int, draw: bool
    ) -> Prediction:
        classes = output.classes.numpy()
        shares = np.bincount(classes.reshape(-1), minlength=len(names)) / classes.size
        order = [int(index) for index in np.argsort(-shares, kind='stable') if shares[index] > 0]
        entries = [{'class': index, 'name': names[index], 'share': float(shares[index])} for index in order]
        cells = [value for entry in entries[:topk] for value in entry.values()]
        cells += [''] * (3 * topk - len(cells))
        text = ', '.join(f'{entry["name"]} {entry["share"]:.4f}' for entry in entries[:topk])
        pictures = self._pictures(classes, output.image, palette) if draw else {}
        return Prediction({'classes': entries}, tuple(cells), text, pictures)

    def _pictures(self, classes: np.ndarray, image: Tensor, palette: np.ndarray) -> dict[str, Image.Image]:
        data = self.config.DATA
        shown = pixels(image.unsqueeze(0), data.IMAGENET_MEAN, data.IMAGENET_STD)[0]
        shown = as_image(shown).convert('RGB').resize(classes.shape[::-1], Image.Resampling.BILINEAR)
        overlay = Image.blend(shown, Image.fromarray(colored(classes, palette)), 0.5)
        return {'classes': class_picture(classes, palette), 'overlay': overlay}


def _classes_by_area(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Return the names of the classes in a label map, the largest first."""
    counts = np.bincount(labels[(labels >= 0) & (labels < len(names))], minlength=len(names))
    return [names[index] for index in np.argsort(-counts, kind='stable') if counts[index]]


def class_picture(classes: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Return a class map [H, W] as a palette image, or as a 16-bit image for more than 256 classes."""
    if len(palette) > 256:
        return Image.fromarray(classes.astype('uint16'))
    picture = Image.fromarray(classes.astype('uint8'))
    picture.putpalette(palette.tobytes())
    return picture


def pixel_accuracy(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Return the accuracy on labeled pixels, 0-D float32; 0 without labeled pixels."""
    hits = logits.argmax(1) == labels.astype('int64')
    kept = labels.astype('int64') != ignored
    return paddle.logical_and(hits, kept).astype('float32').sum() / kept.astype('float32').sum().clip(min=1.0)
