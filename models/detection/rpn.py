# SPDX-License-Identifier: Apache-2.0
"""Region proposal network (Faster R-CNN, https://arxiv.org/abs/1506.01497) on the levels of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.nn import initializer

from models.detection.anchors import cell_anchors, grid_anchors
from models.detection.boxes import BoxCoder, clip_boxes, is_nonempty, pairwise_iou
from models.detection.matching import IGNORED, POSITIVE, match, subsample
from models.detection.nms import best_of, greedy_on_device, suppress
from models.layers.constants import constant

LOW, HIGH = 0.3, 0.7  # thresholds of the intersection over union
POSITIVE_SHARE = 0.5


class Proposals(NamedTuple):
    """Regions of a batch by descending logit; after the last one of an image come boxes of zeros.

    Attributes:
        boxes: [B, P, 4] float32, without gradients.
        logits: [B, P] float32; 0 behind the last one.
        valid: [B, P] bool.
        settled: 0-D bool, False if they are not the result of non-maximum suppression yet, see `RPN.select`; None: True.
    """

    boxes: Tensor
    logits: Tensor
    valid: Tensor
    settled: Tensor | None = None


class RPNHead(nn.Layer):
    """Two 3x3 convolutions, then objectness and box of each anchor; shared by all levels.

    Args:
        channels: of the maps.
        anchors: anchors per cell.
    """

    def __init__(self, channels: int, anchors: int):
        super().__init__()
        self.conv = nn.Sequential(*((f'conv{i}', nn.Conv2D(channels, channels, 3, padding=1)) for i in range(2)))
        self.objectness_logits = nn.Conv2D(channels, anchors, 1)
        self.anchor_deltas = nn.Conv2D(channels, 4 * anchors, 1)
        for layer in (*self.conv, self.objectness_logits, self.anchor_deltas):
            initializer.Normal(std=0.01)(layer.weight)
            initializer.Constant(0.0)(layer.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [B, C, H, W] -> per level logits [B, H * W * A] and deltas [B, H * W * A, 4], float32."""
        logits, deltas = [], []
        for x in maps:
            for conv in self.conv:
                x = F.relu(conv(x))
            logits.append(self.objectness_logits(x).transpose([0, 2, 3, 1]).flatten(1).astype('float32'))
            delta = self.anchor_deltas(x).transpose([0, 2, 3, 1]).astype('float32')
            deltas.append(delta.reshape([0, -1, 4]))
        return logits, deltas


def _level(grid: tuple[int, int], stride: float, size: float, ratios: tuple[float, ...]) -> np.ndarray:
    """Anchors of a level, [H * W * A, 4]."""
    return grid_anchors(grid, stride, cell_anchors(size, ratios))


class RPN(nn.Layer):
    """Proposes regions that may hold an object, and learns to.

    Args:
        channels: of the maps.
        strides: pixels per cell of each level.
        sizes: side of the anchors of each level, pixels.
        ratios: height / width of the anchors.
        candidates: largest number of anchors per level before suppression, in training and in evaluation.
        proposals: largest number of regions per image after it, in training and in evaluation.
        threshold: intersection over union from which on a region suppresses another one of its level.
        samples: anchors per image that the loss takes.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[float],
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        candidates: tuple[int, int] = (2000, 1000),
        proposals: tuple[int, int] = (1000, 1000),
        threshold: float = 0.7,
        samples: int = 256,
    ):
        super().__init__()
        self.rpn_head = RPNHead(channels, len(ratios))
        self.strides, self.samples, self.threshold = tuple(strides), samples, threshold
        self.sizes, self.ratios = tuple(map(float, sizes)), tuple(map(float, ratios))
        self.candidates, self.proposals = tuple(candidates), tuple(proposals)
        self.coder = BoxCoder()

    def anchors(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Per level [H * W * A, 4]."""
        levels = zip(maps, self.strides, self.sizes)
        return [constant(_level, tuple(x.shape[2:]), stride, size, self.ratios) for x, stride, size in levels]

    def forward(self, maps: Sequence[Tensor], sizes: Tensor) -> Proposals:
        """Regions of images of `sizes` [B, 2] (height, width)."""
        return self.select(self.anchors(maps), *self.rpn_head(maps), sizes)

    # ------------------------------------------------------------------------------------------------ proposals
    @paddle.no_grad()
    def select(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        sizes: Tensor,
        waits: bool = True,
    ) -> Proposals:
        """The best regions: the best anchors of each level, without those that a better one of the level overlaps.

        Regions with numbers that are not finite are left out; the loss of training is then not finite either.

        Args:
            anchors: see `anchors`.
            logits, deltas: results of `RPNHead`.
            sizes: (height, width) of the images, [B, 2].
            waits: False: the host does not wait for a GPU, and `Proposals.settled` has to be checked.
        """
        candidates, limit = (setting[not self.training] for setting in (self.candidates, self.proposals))
        boxes, scores, groups = [], [], []
        for level, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas)):
            best, index = logit.topk(min(candidates, logit.shape[1]), axis=1)
            delta = paddle.take_along_axis(delta, index.unsqueeze(-1), axis=1)
            box = self.coder.decode(delta, paddle.gather(anchor, index.flatten()).reshape([*index.shape, 4]))
            boxes.append(box)
            scores.append(best)
            groups.append(paddle.full_like(index, level))
        counts = [box.shape[1] for box in boxes]
        boxes, scores, groups = (paddle.concat(parts, axis=1) for parts in (boxes, scores, groups))
        finite = paddle.logical_and(boxes.isfinite().all(-1), scores.isfinite())
        boxes = clip_boxes(paddle.where(finite.unsqueeze(-1), boxes, paddle.zeros_like(boxes)), sizes)
        usable = paddle.logical_and(finite, is_nonempty(boxes))
        if waits:
            best = suppress(boxes, scores, groups, usable, len(self.sizes), self.threshold, limit)
            return Proposals(best.boxes, best.scores, best.valid)
        levels = zip(*(values.split(counts, axis=1) for values in (boxes, usable)))
        kept, settled = zip(*(greedy_on_device(*level, self.threshold) for level in levels))
        best = best_of(boxes, scores, paddle.concat(kept, axis=1).astype('int64'), limit)
        return Proposals(best.boxes, best.scores, best.valid, paddle.stack(settled).all())

    # ------------------------------------------------------------------------------------------------ training
    def assign(self, anchors: Tensor, objects: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """What each anchor of an image learns.

        Args:
            anchors: [N, 4].
            objects: boxes of the objects, [G, 4].
            keys: random numbers that decide which anchors are sampled, [N] float64.

        Returns:
            POSITIVE, NEGATIVE or IGNORED [N] int64, and the box that a positive anchor learns [N, 4].
        """
        index, labels = match(pairwise_iou(objects, anchors), LOW, HIGH, low_quality=True)
        labels = subsample(labels, keys, self.samples, POSITIVE_SHARE)
        targets = paddle.gather(objects, index) if objects.shape[0] else paddle.zeros_like(anchors)
        return labels, targets

    def losses(
        self, anchors: Tensor, logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        """Binary cross entropy of the sampled anchors and L1 of the positive ones, over samples * images.

        Args:
            anchors: [N, 4].
            logits: [B, N].
            deltas: [B, N, 4].
            labels: POSITIVE, NEGATIVE or IGNORED, [B, N].
            targets: boxes that the positive anchors learn, [B, N, 4].
        """
        normalizer = self.samples * labels.shape[0]
        positive, sampled = labels == POSITIVE, (labels != IGNORED).astype('float32')
        entropy = F.binary_cross_entropy_with_logits(logits, positive.astype('float32'), reduction='none')
        positive = positive.unsqueeze(-1)
        wanted = self.coder.encode(anchors, paddle.where(positive, targets, anchors))  # 0 where it does not count
        loc = ((deltas - wanted).abs() * positive.astype('float32')).sum()
        return {'loss_rpn_cls': (entropy * sampled).sum() / normalizer, 'loss_rpn_loc': loc / normalizer}
