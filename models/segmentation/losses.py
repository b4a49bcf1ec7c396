# SPDX-License-Identifier: Apache-2.0
"""Per-pixel cross entropy of semantic segmentation."""

from __future__ import annotations

from typing import NamedTuple

import paddle.nn.functional as F
from paddle import Tensor

from models.layers.resize import resize_maps


class SegmentationLoss(NamedTuple):
    """Result of `segmentation_loss`, 0-D float32.

    Attributes:
        total: `decode` + weight * `auxiliary`.
        decode: loss of the decoder.
        auxiliary: loss of the auxiliary head, unweighted; None without auxiliary head.
    """

    total: Tensor
    decode: Tensor
    auxiliary: Tensor | None


def segmentation_loss(
    logits: Tensor,
    aux: Tensor | None,
    labels: Tensor,
    ignore_index: int = 255,
    avg_non_ignore: bool = False,
    aux_weight: float = 0.4,
) -> SegmentationLoss:
    """Compute the cross entropy of the decoder plus the weighted cross entropy of the auxiliary head.

    Args:
        logits, aux: [B, K, h, w] of any size, resized to the size of the labels. None: no auxiliary head.
        labels: [B, H, W], integers 0 to K - 1 or `ignore_index`.
        ignore_index: label of pixels without loss.
        avg_non_ignore: divide by the number of labeled pixels (Segmenter); False: by the number of all pixels
            (mmsegmentation). A batch without labeled pixels gives 0.
        aux_weight: weight of the auxiliary loss.
    """
    decode = _mean(pixel_losses(logits, labels, ignore_index), labels, ignore_index, avg_non_ignore)
    if aux is None:
        return SegmentationLoss(decode, decode, None)
    auxiliary = _mean(pixel_losses(aux, labels, ignore_index), labels, ignore_index, avg_non_ignore)
    return SegmentationLoss(decode + aux_weight * auxiliary, decode, auxiliary)


def pixel_losses(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Compute the cross entropy of each pixel, [B, H, W] float32; 0 if ignored. Arguments: see `segmentation_loss`."""
    logits = resize_maps(logits.astype('float32'), labels.shape[1:])
    return F.cross_entropy(logits, labels.astype('int64'), reduction='none', axis=1, ignore_index=ignore_index).reshape(
        labels.shape
    )


def _mean(losses: Tensor, labels: Tensor, ignore_index: int, avg_non_ignore: bool) -> Tensor:
    if not avg_non_ignore:
        return losses.mean()
    return losses.sum() / (labels != ignore_index).astype('float32').sum().clip(min=1.0)
