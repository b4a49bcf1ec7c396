# SPDX-License-Identifier: Apache-2.0
"""Heads of Mask R-CNN (https://arxiv.org/abs/1703.06870): class and box of each region, and its mask.

With LayerNorm in the convolutions as in ViTDet. Parameter names are those of detectron2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.nn import initializer

from models.detection.boxes import BoxCoder, pairwise_iou
from models.detection.masks import Instance, mask_targets
from models.detection.matching import IGNORED, POSITIVE, match, subsample
from models.detection.pyramid import ConvNorm, double, kaiming_normal_
from models.detection.roi_align import Places, PyramidPooler
from models.layers.constants import constant
from utils.device import upload

THRESHOLD = 0.5  # intersection over union from which on a region has the class of an object
POSITIVE_SHARE = 0.25
PADDING = -1  # class of a row that is no region
BOX_SIDE, MASK_SIDE = 7, 14  # of pooled regions, cells; masks have twice the side


class Sample(NamedTuple):
    """Sampled regions of a batch with what they learn, sorted by image.

    Attributes:
        boxes: [R, 4].
        images: number of the image, [R] int64.
        classes: K for background, [R] int64; `ROIHeads.assign` returns rows of class `PADDING` at the end, too.
        targets: boxes that the regions with an object learn, [R, 4].
        objects: index of the object in its image; of background of no meaning, [R] int64.
    """

    boxes: Tensor
    images: Tensor
    classes: Tensor
    targets: Tensor
    objects: Tensor


class Regions(NamedTuple):
    """Sampled regions without padding, on both sides.

    Attributes:
        sample: as tensors.
        values: the same as arrays.
        places: see `Places`.
    """

    sample: Sample
    values: Sample
    places: Places


# ---------------------------------------------------------------------------------------------------- layers
class BoxHead(nn.Layer):
    """Convolutions and a linear layer.

    Args:
        channels: of the pooled regions.
        convs: number of convolutions.
        features: channels of the result.
    """

    def __init__(self, channels: int, convs: int, features: int):
        super().__init__()
        self.convs = [f'conv{i + 1}' for i in range(convs)]
        for name in self.convs:
            setattr(self, name, ConvNorm(channels, channels, 3, relu=True))
        self.fc1 = nn.Linear(channels * BOX_SIDE**2, features)
        bound = (3.0 / self.fc1.weight.shape[0]) ** 0.5
        initializer.Uniform(-bound, bound)(self.fc1.weight)
        initializer.Constant(0.0)(self.fc1.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[R, channels, 7, 7] -> [R, features]."""
        for name in self.convs:
            x = getattr(self, name)(x)
        return F.relu(self.fc1(x.flatten(1)))


class BoxPredictor(nn.Layer):
    """Logits of the classes and of background, and a box for each class.

    Args:
        features: channels of `BoxHead`.
        num_classes: K.
    """

    def __init__(self, features: int, num_classes: int):
        super().__init__()
        self.features = features
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both layers by newly initialized ones."""
        self.cls_score = nn.Linear(self.features, num_classes + 1)
        self.bbox_pred = nn.Linear(self.features, 4 * num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            initializer.Normal(std=std)(layer.weight)
            initializer.Constant(0.0)(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[R, features] -> logits [R, K + 1], background last, and deltas [R, K * 4], float32."""
        return self.cls_score(x).astype('float32'), self.bbox_pred(x).astype('float32')


class MaskHead(nn.Layer):
    """Convolutions, a transposed one, and a mask for each class.

    Args:
        channels: of the pooled regions.
        convs: number of convolutions.
        num_classes: K.
    """

    def __init__(self, channels: int, convs: int, num_classes: int):
        super().__init__()
        self.convs = [f'mask_fcn{i + 1}' for i in range(convs)]
        for name in self.convs:
            setattr(self, name, ConvNorm(channels, channels, 3, relu=True))
        self.deconv = double(channels, channels)
        kaiming_normal_(self.deconv.weight, channels * 4)
        initializer.Constant(0.0)(self.deconv.bias)
        self.channels = channels
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a newly initialized one."""
        self.predictor = nn.Conv2D(self.channels, num_classes, 1)
        initializer.Normal(std=0.001)(self.predictor.weight)
        initializer.Constant(0.0)(self.predictor.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[R, channels, 14, 14] -> logits [R, K, 28, 28]."""
        for name in self.convs:
            x = getattr(self, name)(x)
        return self.predictor(F.relu(self.deconv(x)))


class ROIHeads(nn.Layer):
    """Box head and mask head on regions of the pyramid, p2 to p5.

    Args:
        channels: of the maps.
        strides: pixels per cell of the levels.
        num_classes: K.
        samples: regions per image that the loss takes.
        box_convs, box_features: see `BoxHead`.
        mask_convs: see `MaskHead`.
        canonical_size: see `PyramidPooler`.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[float],
        num_classes: int,
        samples: int = 512,
        box_convs: int = 4,
        box_features: int = 1024,
        mask_convs: int = 4,
        canonical_size: float = 224.0,
    ):
        super().__init__()
        self.num_classes, self.samples = num_classes, samples
        self.box_pooler = PyramidPooler(strides, BOX_SIDE, canonical_size)
        self.mask_pooler = PyramidPooler(strides, MASK_SIDE, canonical_size)
        self.box_head = BoxHead(channels, box_convs, box_features)
        self.box_predictor = BoxPredictor(box_features, num_classes)
        self.mask_head = MaskHead(channels, mask_convs, num_classes)
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace what depends on the number of classes by newly initialized layers."""
        self.num_classes = num_classes
        self.box_predictor.reset_classifier(num_classes)
        self.mask_head.reset_classifier(num_classes)

    def predict_boxes(
        self, maps: Sequence[Tensor], boxes: Tensor, images: Tensor, places: Places | None = None
    ) -> tuple[Tensor, Tensor]:
        """Regions [R, 4] of `images` [R], sorted by image -> results of `BoxPredictor`; `places` as in `PyramidPooler`."""
        return self.box_predictor(self.box_head(self.box_pooler(maps[:4], boxes, images, places)))

    def predict_masks(
        self, maps: Sequence[Tensor], boxes: Tensor, images: Tensor, classes: Tensor, places: Places | None = None
    ) -> Tensor:
        """Logits of the masks of regions [R, 4] of `images` [R], for `classes` [R] -> [R, 28, 28] float32."""
        logits = self.mask_head(self.mask_pooler(maps[:4], boxes, images, places)).astype('float32')
        return paddle.take_along_axis(logits, classes.reshape([-1, 1, 1, 1]), axis=1).squeeze(1)

    # ------------------------------------------------------------------------------------------------ training
    def assign(
        self, boxes: Tensor, valid: Tensor, objects: Tensor, classes: Tensor, keys: Tensor, image: int
    ) -> Sample:
        """Sample regions of an image: those with an object in their order, then background, then padding.

        Args:
            boxes, valid: proposals of the image, see `Proposals`. The boxes of the objects are proposals too.
            objects: boxes of the objects, [G, 4].
            classes: of the objects, [G] int64.
            keys: random numbers that decide which regions are sampled, [P + G] float64.
            image: number of the image.
        """
        count = objects.shape[0]
        boxes = paddle.concat([boxes, objects]) if count else boxes
        valid = paddle.concat([valid, paddle.ones([count], 'bool')]) if count else valid
        index, labels = match(pairwise_iou(objects, boxes), THRESHOLD, THRESHOLD)
        labels = paddle.where(valid, labels, paddle.full_like(labels, IGNORED))
        labels = subsample(labels, keys, self.samples, POSITIVE_SHARE)
        order = paddle.where(labels == IGNORED, paddle.full_like(labels, 2), 1 - labels)
        rows = paddle.argsort(order, stable=True)[: self.samples]
        index, boxes, labels = (paddle.gather(values, rows) for values in (index, boxes, labels))
        learnt = paddle.full_like(index, self.num_classes)
        if count:
            learnt = paddle.where(labels == POSITIVE, paddle.gather(classes, index), learnt)
        learnt = paddle.where(labels == IGNORED, paddle.full_like(learnt, PADDING), learnt)
        targets = paddle.gather(objects, index) if count else boxes
        return Sample(boxes, paddle.full_like(index, image), learnt, targets, index)

    def read(self, samples: Sequence[Sample], settled: Tensor | None = None) -> Regions | None:
        """Return the samples of all images without padding, by the one read of the device in a training step.

        Args:
            samples: `assign` of each image.
            settled: 0-D bool; if it is False, the result is None.
        """
        sample = Sample(*(paddle.concat(parts) for parts in zip(*samples)))
        # Both poolers have the same levels.
        parts = [*sample, self.box_pooler.places(sample.boxes, sample.images).t()]
        parts = [part.reshape([sample.classes.shape[0], -1]).astype('float64') for part in parts]
        if settled is not None:
            parts.append(settled.astype('float64').expand([sample.classes.shape[0], 1]))
        columns = np.split(
            paddle.concat(parts, axis=1).numpy(), np.cumsum([part.shape[1] for part in parts])[:-1], axis=1
        )
        if settled is not None and not columns.pop().all():
            return None
        kept = np.flatnonzero(columns[Sample._fields.index('classes')][:, 0] != PADDING)
        if len(kept) < len(columns[0]):
            rows = upload(kept)
            sample = Sample(*(paddle.gather(part, rows) for part in sample))
        boxes, images, classes, targets, objects, places = (column[kept] for column in columns)
        images, classes, objects = (column[:, 0].astype('int64') for column in (images, classes, objects))
        values = Sample(boxes.astype('float32'), images, classes, targets.astype('float32'), objects)
        return Regions(sample, values, Places(*places.T.astype('int64')))

    def losses(
        self, maps: Sequence[Tensor], regions: Regions, masks: Sequence[Sequence[Instance]]
    ) -> dict[str, Tensor]:
        """Losses of the heads; the host does not wait for a GPU.

        Args:
            maps: levels of the pyramid.
            regions: see `read`.
            masks: objects of each image, as polygons or bitmaps in pixels of the network input.
        """
        sample, values, places = regions
        logits, deltas = self.predict_boxes(maps, sample.boxes, sample.images, places)
        result = box_losses(logits, deltas, sample, self.coder)
        found = np.flatnonzero(values.classes < self.num_classes)
        if not len(found):  # a region whose loss counts 0, so that all parameters have a gradient
            boxes, zero, first = constant(_unit_box), paddle.zeros([1], 'int64'), np.zeros([3, 1], 'int64')
            return {**result, 'loss_mask': self.predict_masks(maps, boxes, zero, zero, Places(*first)).sum() * 0.0}
        rows = upload(found)
        chosen = (paddle.gather(part, rows) for part in (sample.boxes, sample.images, sample.classes))
        instances = [masks[image][number] for image, number in zip(values.images[found], values.objects[found])]
        targets = mask_targets(instances, values.boxes[found], 2 * MASK_SIDE)
        given = self.predict_masks(maps, *chosen, places[found])
        return {**result, 'loss_mask': mask_loss(given, upload(np.asarray(targets, 'float32')))}


def _unit_box() -> np.ndarray:
    return np.array([[0.0, 0.0, 1.0, 1.0]], 'float32')


# ---------------------------------------------------------------------------------------------------- losses
def box_losses(logits: Tensor, deltas: Tensor, sample: Sample, coder: BoxCoder) -> dict[str, Tensor]:
    """Cross entropy of all regions, and L1 of the boxes of those with an object over the number of all.

    Args:
        logits: [R, K + 1].
        deltas: [R, K * 4].
    """
    count, num_classes = logits.shape[0], logits.shape[1] - 1
    entropy = F.cross_entropy(logits, sample.classes) if count else logits.sum() * 0.0
    if not count:
        return {'loss_cls': entropy, 'loss_box_reg': deltas.sum() * 0.0}
    positive = sample.classes < num_classes
    classes = paddle.where(positive, sample.classes, paddle.zeros_like(sample.classes))
    given = paddle.gather(deltas.reshape([-1, 4]), paddle.arange(count, dtype='int64') * num_classes + classes)
    positive, unit = positive.unsqueeze(-1), constant(_unit_box)
    boxes, targets = (paddle.where(positive, values, unit) for values in (sample.boxes, sample.targets))
    loss = ((given - coder.encode(boxes, targets)).abs() * positive.astype('float32')).sum()
    return {'loss_cls': entropy, 'loss_box_reg': loss / count}


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross entropy of masks [R, m, m]; 0 of none."""
    if not logits.shape[0]:
        return logits.sum() * 0.0
    return F.binary_cross_entropy_with_logits(logits, targets)
