# SPDX-License-Identifier: Apache-2.0
"""Weight rules of segmentation models: names of mmsegmentation, TinyMIM and Segmenter, and pre-trained backbones."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np

from models.layers import resize_relative_table
from models.weights.paddlevit import from_paddlevit
from models.weights.rules import Grid, Start, WeightRules
from models.weights.transformer import TransformerWeights, start_backbone

BACKBONE = 'backbone.'
ENCODER = TransformerWeights()

# Published names -> names in the model, applied in order.
_RENAMED = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r'^encoder\.', BACKBONE),  # Segmenter
        (r'^decoder\.', 'decode_head.'),
        (r'^backbone\.(fpn[12])\.', r'neck.\1.'),  # TinyMIM; below mmsegmentation from 0.17 on
        (r'^neck\.upsample_4x\.', 'neck.fpn1.'),
        (r'^neck\.upsample_2x\.', 'neck.fpn2.'),
        (r'^(backbone|decode_head)\.layers\.', r'\1.blocks.'),
        (r'(\.blocks\.\d+)\.ln([12])\.', r'\1.norm\2.'),
        (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
        (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
        (r'\.attn\.attn\.in_proj_', '.attn.qkv.'),
        (r'\.attn\.attn\.out_proj\.', '.attn.proj.'),
        (r'^backbone\.ln1\.', 'backbone.norm.'),
        (r'^backbone\.patch_embed\.projection\.', 'backbone.patch_embed.proj.'),
        (r'^decode_head\.dec_proj\.', 'decode_head.proj_dec.'),
        (r'^decode_head\.patch_proj\.weight$', 'decode_head.proj_patch'),
        (r'^decode_head\.classes_proj\.weight$', 'decode_head.proj_classes'),
    )
)
_CLASSIFIER_OF_BACKBONE = ('encoder.head', 'encoder.pre_logits.')  # part of Segmenter's files
_LINEAR = re.compile(r'\.(patch_proj|classes_proj)\.weight$')  # linear layers in the file, parameters in the model

# Unused parts of an encoder file, and parts of the model that such a file does not have: pattern, reason.
_UNUSED = (
    (r'(norm|fc_norm|dist_norm)\..*', 'the model has no such LayerNorm'),
    (r'(head|head_dist|pre_logits)\..*', 'the head is an image classifier'),
)
_INITIAL = (
    (r'neck\..*', 'the file has no neck'),
    (r'(decode_head|auxiliary_head)\..*', 'the file has no decoder'),
    (r'backbone\.norm\..*', 'the file normalizes after pooling'),
)


class SegmentorWeights(WeightRules):
    """Weight rules of all segmentation models.

    Attributes:
        classes: names of arrays [K], which show the number of classes.
    """

    classes: tuple[str, ...] = ()
    optional_parts = (
        *((f'backbone\\.(?:{pattern})', *rest) for pattern, *rest in ENCODER.optional_parts),
        (r'backbone\.norm\..*', 'MODEL.UPERNET.LAST_NORM', 'True', 'False'),
        (r'auxiliary_head\..*', 'MODEL.UPERNET.AUX_CHANNELS', 'their width', '0'),
        (r'neck\.fpn[12]\..*', 'MODEL.UPERNET.NECK', 'pyramid', 'another'),
        (r'neck\.(lateral_)?convs\..*', 'MODEL.UPERNET.NECK', 'mln', 'another'),
    )

    def rename(self, name: str) -> str | None:
        """Rename TinyMIM's, mmsegmentation's and Segmenter's weights; drop the classifier of Segmenter's encoder."""
        if name.startswith(_CLASSIFIER_OF_BACKBONE):
            return None
        for pattern, ours in _RENAMED:
            name = pattern.sub(ours, name)
        return name

    def adopt(self, model, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """See `TransformerWeights`."""
        return from_paddlevit(arrays)

    def layout(self, name: str, array: np.ndarray) -> np.ndarray:
        """Transpose the projections of mmsegmentation's mask transformer, which are linear layers there."""
        return array.T if _LINEAR.search(name) else array

    def metadata(self, model) -> dict:
        """Return the number of attention heads."""
        return ENCODER.metadata(model.backbone)

    def unused(self, model, arrays: Mapping[str, np.ndarray], source: str) -> dict[str, str]:
        """See `AttentionRemoval`."""
        inner = {name[len(BACKBONE) :]: array for name, array in arrays.items() if name.startswith(BACKBONE)}
        return {f'{BACKBONE}{name}': why for name, why in ENCODER.unused(model.backbone, inner, source).items()}

    def resize(self, model, name: str, array: np.ndarray, grid: Grid | None = None) -> np.ndarray:
        """Interpolate position embeddings; relative ones as in BEiT, unlike in classifiers."""
        if name.endswith('relative_position_bias_table') and array.ndim == 2:
            return resize_relative_table(array, model.backbone.patch_embed.grid_size, grid, spline=True)
        return ENCODER.resize(model.backbone, name.removeprefix(BACKBONE), array, grid)

    def start(self, model, names: Collection[str]) -> Start:
        """Initialize the backbone from an encoder: a classifier, MAE or MoCo-v3."""
        if any(name.startswith(BACKBONE) for name in names):
            return Start()
        return start_backbone(model, BACKBONE, model.backbone, names, _UNUSED, _INITIAL)

    def is_head(self, name: str) -> bool:
        return name.startswith(self.head)

    def count_classes(self, state: Mapping) -> int | None:
        """See `WeightRules`."""
        counts = {value.shape[0] for name, value in state.items() if name in self.classes and value.shape}
        return counts.pop() if len(counts) == 1 else None if counts else 0


class UPerNetWeights(SegmentorWeights):
    """Weight rules of UPerNet."""

    head = ('decode_head.conv_seg.', 'auxiliary_head.conv_seg.')
    classes = ('decode_head.conv_seg.bias', 'auxiliary_head.conv_seg.bias')

    def unused(self, model, arrays: Mapping[str, np.ndarray], source: str) -> dict[str, str]:
        """See `WeightRules`; includes the auxiliary head if the model has none."""
        unused = super().unused(model, arrays, source)
        if model.auxiliary_head is None:
            names = [name for name in arrays if name.startswith('auxiliary_head.')]
            unused.update(dict.fromkeys(names, 'the model has no auxiliary head'))
        return unused


class SegmenterWeights(SegmentorWeights):
    """Weight rules of Segmenter."""

    head = ('decode_head.head.', 'decode_head.cls_emb', 'decode_head.mask_norm.')
    classes = ('decode_head.head.bias', 'decode_head.mask_norm.bias')

    def rename(self, name: str) -> str | None:
        """See `WeightRules`; mmsegmentation's linear decoder is a 1x1 convolution."""
        name = super().rename(name)
        return name and name.replace('decode_head.conv_seg.', 'decode_head.head.')

    def layout(self, name: str, array: np.ndarray) -> np.ndarray:
        if name == 'decode_head.conv_seg.weight' and array.shape[2:] == (1, 1):
            return array.reshape(array.shape[:2])
        return super().layout(name, array)
