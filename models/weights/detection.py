# SPDX-License-Identifier: Apache-2.0
"""Weights of detectors: names of detectron2's ViTDet and of MAE-Lite, and starts from weights of an encoder."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import paddle

from models.layers import resize_decomposed_table, resize_position_table
from models.weights.rules import Grid, Start, WeightRules
from models.weights.transformer import TransformerWeights, start_backbone

BACKBONE = 'backbone.net.'
DETECTOR = (BACKBONE, 'backbone.simfp_')  # prefixes of its file
SEGMENTOR = 'backbone.'  # prefix of the encoder of a segmentation model
ENCODER = TransformerWeights()
CLASSES = 'roi_heads.box_predictor.cls_score.bias'  # background included
TABLES = ('.rel_pos_h', '.rel_pos_w')

# Constants that detectron2 may save.
_CONSTANTS = ('pixel_mean', 'pixel_std', 'proposal_generator.anchor_generator.')

# Parts of the file of an encoder that are not used, and parts of the model that such a file lacks.
_UNUSED = (
    (r'cls_token|dist_token', 'the model has no class token'),
    (r'(norm|fc_norm|dist_norm)\..*', 'the model has no last LayerNorm'),
    (r'(head|head_dist|pre_logits)\..*', 'the classifier is of images'),
    (r'(decode_head|auxiliary_head|neck)\..*', 'the decoder is of label maps'),
)
_INITIAL = (
    (r'backbone\.net\..*\.rel_pos_[hw]', 'the file has no decomposed relative positions'),
    (r'backbone\.simfp_.*', 'the file has no pyramid'),
    (r'proposal_generator\..*', 'the file has no region proposal network'),
    (r'roi_heads\..*', 'the file has no box and mask heads'),
)


class DetectorWeights(WeightRules):
    """Rules of Mask R-CNN."""

    head = (
        'roi_heads.box_predictor.cls_score.', 'roi_heads.box_predictor.bbox_pred.', 'roi_heads.mask_head.predictor.',
    )  # fmt: skip
    optional_parts = (
        *((f'backbone\\.net\\.(?:{pattern})', *rest) for pattern, *rest in ENCODER.optional_parts),
        (r'backbone\.net\..*\.rel_pos_[hw]', 'MODEL.TRANS.MIXER', 'windowed and decomposed', 'attention'),
        (r'roi_heads\.box_head\.conv\d+\..*', 'MODEL.DET.BOX_CONVS', 'their number', 'their number'),
        (r'roi_heads\.mask_head\.mask_fcn\d+\..*', 'MODEL.DET.MASK_CONVS', 'their number', 'their number'),
    )

    def rename(self, name: str) -> str | None:
        """detectron2's names are ours; means and anchors, which it may save, are not used."""
        return None if name.startswith(_CONSTANTS) else name

    def metadata(self, model) -> dict:
        """The number of heads, and the anchors."""
        rpn = model.proposal_generator
        return {
            **ENCODER.metadata(model.backbone.net),
            'MODEL.DET.ANCHOR_SIZES': list(rpn.sizes),
            'MODEL.DET.ANCHOR_RATIOS': list(rpn.ratios),
        }

    def unused(self, model, arrays: Mapping[str, np.ndarray], source: str) -> dict[str, str]:
        """See `AttentionRemoval`."""
        inner = {name[len(BACKBONE) :]: array for name, array in arrays.items() if name.startswith(BACKBONE)}
        return {f'{BACKBONE}{name}': why for name, why in ENCODER.unused(model.backbone.net, inner, source).items()}

    def resize(self, model, name: str, array: np.ndarray, grid: Grid | None = None) -> np.ndarray:
        """Interpolate the position embedding, which keeps one row before those of the patches, and relative tables."""
        if name.endswith(TABLES) and array.ndim == 2:
            rows = model.state_dict()[name].shape[0]
            return resize_decomposed_table(_tensor(array), rows).numpy()
        if name != f'{BACKBONE}pos_embed' or array.ndim != 3 or array.shape[1] < 2:
            return array
        side = math.isqrt(array.shape[1])
        old = grid or (side, side)
        prefix = array.shape[1] - old[0] * old[1]
        if not 0 <= prefix <= 2:
            return array
        first = array[:, :1] if prefix else np.zeros_like(array[:, :1])
        table = _tensor(np.concatenate([first, array[:, prefix:]], axis=1))
        return resize_position_table(table, old, model.backbone.net.position_grid, 1).numpy()

    def start(self, model, names: Collection[str]) -> Start:
        """Train from the weights of an encoder: a classifier, MAE, MoCo-v3, or the backbone of a segmentation model."""
        if any(name.startswith(DETECTOR) for name in names):
            return Start()
        inner = {name.removeprefix(SEGMENTOR): name for name in names}
        start = start_backbone(model, BACKBONE, model.backbone.net, inner, _UNUSED, _INITIAL)
        renamed, unused = ({inner[name]: value for name, value in part.items()} for part in start[:2])
        return Start(renamed, unused, start.initial)

    def count_classes(self, state: Mapping) -> int | None:
        """See `WeightRules`."""
        return state[CLASSES].shape[0] - 1 if CLASSES in state and len(state[CLASSES].shape) == 1 else 0


def _tensor(array: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(array.astype('float32'), place=paddle.CPUPlace())
