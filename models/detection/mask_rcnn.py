# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN (https://arxiv.org/abs/1703.06870) with ViTDet's backbone (https://arxiv.org/abs/2203.16527).

Numbers and parameter names are those of detectron2, so that its checkpoints and MAE-Lite's port without renaming.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from models.base import Classifier
from models.detection.backbone import ViTDetBackbone
from models.detection.heads import MASK_SIDE, Regions, ROIHeads
from models.detection.masks import ImageDetections, Instance
from models.detection.nms import choose_detections, numbers_of
from models.detection.rpn import RPN, Proposals
from models.layers import Intermediates
from models.options import detector_options
from models.registry import register_model
from models.weights.detection import DetectorWeights
from utils import device
from utils.device import Download, upload
from utils.errors import UserError

ENCODER = 'backbone.net.'


class Targets(NamedTuple):
    """Objects of a batch, in pixels of the network input. Crowds are left out.

    Attributes:
        boxes: per image [n, 4] float32.
        classes: per image [n] int64.
        masks: per image n objects, each as polygons (x1 y1 x2 y2 ...) or as a bitmap [H, W].
    """

    boxes: Sequence[np.ndarray]
    classes: Sequence[np.ndarray]
    masks: Sequence[Sequence[Instance]]


class Detections(NamedTuple):
    """Detections of a batch, by descending score; zeros come after the last one of an image.

    Attributes:
        boxes: [B, D, 4] float32, pixels of the network input.
        scores: [B, D] float32.
        classes: [B, D] int64.
        masks: probabilities within the boxes, [B, D, 28, 28] float32.
        counts: number of detections of each image, [B] int64.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor
    counts: Tensor


class MaskRCNN(Classifier):
    """Mask R-CNN with a plain Vision Transformer.

    Args:
        num_classes: K.
        channels: of the pyramid and of the heads' convolutions.
        rpn: further arguments of `RPN`.
        heads: further arguments of `ROIHeads`.
        min_score: probabilities up to this are no detections.
        threshold: intersection over union from which on a detection suppresses another one of its class.
        max_detections: D, detections per image.
        encoder: arguments of `PatchEncoder`.

    Attributes:
        image_size: side of the square images that the model is built for, pixels; others interpolate the positions.
    """

    weight_rules = DetectorWeights()
    decays_all = True  # but for the position embedding and the LayerNorms of the Vision Transformer

    def __init__(
        self,
        num_classes: int = 80,
        channels: int = 256,
        rpn: dict | None = None,
        heads: dict | None = None,
        min_score: float = 0.05,
        threshold: float = 0.5,
        max_detections: int = 100,
        **encoder,
    ):
        super().__init__()
        _check_classes(num_classes)
        self.num_classes = num_classes
        self.backbone = ViTDetBackbone(channels, **encoder)
        net, strides = self.backbone.net, self.backbone.strides
        self.depth, self.embed_dim, self.image_size = net.depth, net.embed_dim, net.patch_embed.img_size[0]
        self.patch_size = net.patch_embed.patch_size
        self.proposal_generator = RPN(channels, strides, **(rpn or {}))
        self.roi_heads = ROIHeads(channels, strides[:4], num_classes, **(heads or {}))
        self.min_score, self.threshold, self.max_detections = min_score, threshold, max_detections

    # ------------------------------------------------------------------------------------------------ contract
    def reset_classifier(self, num_classes: int) -> None:
        """Replace what depends on the number of classes by newly initialized layers. Raises UserError for 0."""
        _check_classes(num_classes)
        self.num_classes = num_classes
        self.roi_heads.reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `Classifier`; acts on the blocks of the Vision Transformer."""
        self.backbone.net.set_grad_checkpointing(enable)

    def attention_layers(self) -> list[int]:
        """Blocks with attention among all patches."""
        return self.backbone.net.attention_layers()

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, want: Collection[str] = ('tokens',)
    ) -> Intermediates:
        """Those of the Vision Transformer."""
        return self.backbone.net.forward_intermediates(x, indices, want)

    def layer_id(self, name: str) -> int:
        """That of the Vision Transformer; the last one for pyramid and heads."""
        return self.backbone.net.layer_id(name[len(ENCODER) :]) if name.startswith(ENCODER) else self.num_layers

    def no_weight_decay(self) -> set[str]:
        """Position embedding and LayerNorms of the Vision Transformer."""
        norms = [path for path, layer in self.named_sublayers() if isinstance(layer, nn.LayerNorm)]
        return {f'{ENCODER}pos_embed', *(f'{path}.{part}' for path in norms for part in ('weight', 'bias'))}

    # ------------------------------------------------------------------------------------------------ training
    def forward(
        self,
        images: Tensor,
        sizes: Tensor | None = None,
        targets: Targets | None = None,
        rng: np.random.Generator | None = None,
    ) -> Detections | dict[str, Tensor]:
        """Detect, or with `targets` compute the losses.

        Args:
            images: normalized images [B, in_chans, H, W], padded with 0 at the right and bottom; sides divisible by the
                patch size.
            sizes: (height, width) without padding, [B, 2]; None: there is none.
            targets, rng: see `losses`.
        """
        if targets is not None:
            return self.losses(images, sizes, *targets, rng)
        maps, sizes = self.forward_features(images), _sizes(images, sizes)
        return self.forward_head(maps, self.proposal_generator(maps, sizes), sizes)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Normalized images [B, in_chans, H, W] -> levels p2 to p6 of the pyramid."""
        return self.backbone(x)

    def losses(
        self,
        images: Tensor,
        sizes: Tensor | None,
        boxes: Sequence,
        classes: Sequence,
        masks: Sequence[Sequence[Instance]],
        rng: np.random.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The five losses of a batch, 0-D float32; their sum is the loss of Mask R-CNN.

        Args:
            images, sizes: see `forward`.
            boxes, classes, masks: see `Targets`.
            rng: decides which anchors and regions are sampled: a number is drawn per image, in order; None: always the same.

        Returns:
            loss_rpn_cls, loss_rpn_loc, loss_cls, loss_box_reg, loss_mask.
        """
        rng = np.random.default_rng(0) if rng is None else rng
        draws = [np.random.default_rng(seed) for seed in rng.integers(2**63, size=images.shape[0])]
        boxes = [upload(np.asarray(box, 'float32').reshape(-1, 4)) for box in boxes]
        classes = [upload(np.asarray(label, 'int64').reshape(-1)) for label in classes]
        maps, sizes = self.forward_features(images), _sizes(images, sizes)
        rpn, heads = self.proposal_generator, self.roi_heads
        outputs = rpn.anchors(maps), *rpn.rpn_head(maps)
        proposals = rpn.select(*outputs, sizes, waits=not device.on_gpu())
        anchors, logits, deltas = paddle.concat(outputs[0]), *(paddle.concat(parts, axis=1) for parts in outputs[1:])
        with paddle.no_grad():
            keys = [upload(draw.random(anchors.shape[0])) for draw in draws]
            assigned = [rpn.assign(anchors, box, key) for box, key in zip(boxes, keys)]
            room = proposals.boxes.shape[1]
            keys = [upload(draw.random(room + box.shape[0])) for draw, box in zip(draws, boxes)]
            regions = self._sampled(proposals, boxes, classes, keys)
            if regions is None:  # rarely
                regions = self._sampled(rpn.select(*outputs, sizes), boxes, classes, keys)
        return {
            **rpn.losses(anchors, logits, deltas, *(paddle.stack(parts) for parts in zip(*assigned))),
            **heads.losses(maps, regions, masks),
        }

    def _sampled(
        self, proposals: Proposals, boxes: Sequence[Tensor], classes: Sequence[Tensor], keys: Sequence[Tensor]
    ) -> Regions | None:
        """Return the regions that the heads learn from; None: the proposals are not settled."""
        images = zip(proposals.boxes, proposals.valid, boxes, classes, keys)
        samples = [self.roi_heads.assign(*image, number) for number, image in enumerate(images)]
        return self.roi_heads.read(samples, proposals.settled)

    # ------------------------------------------------------------------------------------------------ detection
    def detect(self, images: Tensor, sizes: Tensor | None = None) -> list[ImageDetections]:
        """Detections of each image, as arrays; arguments as in `forward`."""
        copies = [Download(part) for part in self(images, sizes)]  # all are on the way before one is awaited
        *parts, counts = (copy.numpy() for copy in copies)
        return [ImageDetections(*(part[i, :count] for part in parts)) for i, count in enumerate(counts.tolist())]

    def forward_head(self, x: Sequence[Tensor], proposals: Proposals, sizes: Tensor) -> Detections:
        """Levels of the pyramid and proposals of images of `sizes` [B, 2] -> detections."""
        count, regions = proposals.boxes.shape[1], proposals.boxes.reshape([-1, 4])
        logits, deltas = self.roi_heads.predict_boxes(x, regions, _owners(proposals.boxes))
        boxes = self.roi_heads.coder.decode(deltas, regions).reshape([-1, count, 4 * self.num_classes])
        probabilities = F.softmax(logits, axis=-1).reshape([-1, count, self.num_classes + 1])
        best = choose_detections(
            boxes, probabilities, proposals.valid, sizes, self.min_score, self.threshold, self.max_detections
        )
        classes = best.index % self.num_classes * best.valid.astype('int64')
        masks = F.sigmoid(self._masks(x, best.boxes, classes, best.valid))
        masks = masks * best.valid.astype(masks.dtype).unsqueeze([-1, -1])
        return Detections(best.boxes, best.scores, classes, masks, best.valid.astype('int64').sum(1))

    def _masks(self, maps: Sequence[Tensor], boxes: Tensor, classes: Tensor, valid: Tensor) -> Tensor:
        """Logits of masks [B, D, 28, 28]. Programs compute those of the padding too, for fixed shapes."""
        count, owners = boxes.shape[1], _owners(boxes)
        boxes, classes = boxes.reshape([-1, 4]), classes.flatten()
        if not paddle.in_dynamic_mode():
            return self.roi_heads.predict_masks(maps, boxes, owners, classes).reshape([-1, count, *[2 * MASK_SIDE] * 2])
        rows, result = paddle.nonzero(valid.flatten()).flatten(), paddle.zeros([boxes.shape[0], *[2 * MASK_SIDE] * 2])
        if rows.shape[0]:
            chosen = (paddle.gather(values, rows) for values in (boxes, owners, classes))
            result = paddle.scatter(result, rows, self.roi_heads.predict_masks(maps, *chosen))
        return result.reshape([-1, count, *result.shape[1:]])


def _check_classes(num_classes: int) -> None:
    if not num_classes:
        raise UserError('a detector needs classes: set MODEL.NUM_CLASSES.')


def _sizes(images: Tensor, sizes: Tensor | None) -> Tensor:
    """(height, width) of each image [B, 2] int64."""
    if sizes is not None:
        return sizes
    return paddle.zeros_like(images[:, 0, 0, :2]).astype('int64') + paddle.to_tensor([list(images.shape[2:])], 'int64')


def _owners(boxes: Tensor) -> Tensor:
    """Number of the image of each box of [B, N, 4], [B * N] int64."""
    return numbers_of(boxes).unsqueeze(1).expand([-1, boxes.shape[1]]).flatten()


# ---------------------------------------------------------------------------------------------------- builder
@register_model('mask_rcnn')
def build_mask_rcnn(config) -> MaskRCNN:
    """Build Mask R-CNN from a configuration."""
    det = config.MODEL.DET
    return MaskRCNN(
        num_classes=config.MODEL.NUM_CLASSES,
        channels=det.CHANNELS,
        rpn={
            'sizes': det.ANCHOR_SIZES,
            'ratios': det.ANCHOR_RATIOS,
            'candidates': det.RPN_CANDIDATES,
            'proposals': det.RPN_PROPOSALS,
            'threshold': det.RPN_NMS,
            'samples': det.RPN_SAMPLES,
        },
        heads={
            'samples': det.ROI_SAMPLES,
            'box_convs': det.BOX_CONVS,
            'box_features': det.BOX_FEATURES,
            'mask_convs': det.MASK_CONVS,
            'canonical_size': det.CANONICAL_SIZE,
        },
        min_score=det.MIN_SCORE,
        threshold=det.NMS,
        max_detections=det.MAX_DETECTIONS,
        **detector_options(config),
    )
