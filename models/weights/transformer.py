# SPDX-License-Identifier: Apache-2.0
"""Weight rules of Vision Transformers: names of timm, MAE-Lite and MoCo-v3, other resolutions, fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import paddle
from paddle import nn

from models.layers import resize_position_table, resize_relative_table
from models.weights.paddlevit import from_paddlevit
from models.weights.rules import Grid, Start, WeightRules, grid_metadata, square_side

# Prefixes of the encoder in pre-training files: MAE-Lite, MoCo-v3. The head of MoCo-v3's encoder is its projector.
MAE_ENCODER, MOCO_ENCODER = 'model.', 'base_encoder.'
# Other parts of these files: training state, MAE decoder, distillation adapters of MAE-Lite.
TRAINING_PARTS = ('tch_model.', 'ema_model.', 'momentum_encoder.', f'{MOCO_ENCODER}head.', 'predictor.')
DECODER_PARTS = ('mask_token', 'decoder_')
ADAPTER_PARTS = ('attn_adapter.', 'hidden_adapter.')

# Parts of a file that fine-tuning does not use if the model lacks them, and parts of a model that keep their initial
# values if the file lacks them: pattern, reason.
_UNUSED = (
    (r'norm\..*', 'the model normalizes after pooling'),
    (r'blocks\.\d+\.attn\.qkv\.bias', 'the model has separate biases of query and value'),
    (r'pos_embed', 'the model has no absolute position embedding'),
)
_INITIAL = (
    (r'(fc_norm|dist_norm)\..*', 'the file normalizes before pooling'),
    (r'head_norm\..*', 'the file has no batch normalization before the classifier'),
    (r'.*\.(q_bias|v_bias)', 'the file has no separate biases of query and value'),
    (r'.*\.(gamma_1|gamma_2)', 'the file has no LayerScale'),
    (r'.*relative_position_bias_table', 'the file has no relative positions'),
)
_LAYER_SCALE = re.compile(r'\.ls([12])\.gamma$')  # names of timm and DINOv2
_PROBE = {'head.0.': 'head_norm.', 'head.1.': 'head.'}  # classifier of MAE's linear probe


class TransformerWeights(WeightRules):
    """Weight rules of the Vision Transformer."""

    head = ('head.', 'head_dist.', 'head_norm.')
    optional_parts = (
        (r'dist_token|dist_norm\..*|head_dist\..*', 'MODEL.TRANS.DISTILLED', 'True', 'False'),
        (r'pre_logits\..*', 'MODEL.TRANS.REPRESENTATION_SIZE', 'their size', 'None'),
        (r'fc_norm\..*', 'MODEL.TRANS.GLOBAL_POOL', 'True', 'False'),
        (r'patch_embed\.proj\.\d+\..*', 'MODEL.TRANS.CONV_STEM', 'True', 'False'),
        (r'head_norm\..*', 'MODEL.TRANS.HEAD_NORM', 'True', 'False'),
        (r'blocks\.\d+\.gamma_[12]', 'MODEL.TRANS.LAYER_SCALE', 'a number', 'None'),
        (r'blocks\..*relative_position_bias_table', 'MODEL.TRANS.REL_POS', "('block',)", '()'),
        (r'rel_pos_bias\..*', 'MODEL.TRANS.REL_POS', "('shared',)", '()'),
        (r'blocks\.\d+\.attn\.[qv]_bias', 'MODEL.TRANS.KEY_BIAS', 'False', 'True'),
        (r'pos_embed', 'MODEL.TRANS.ABS_POS', 'True', 'False'),
    )

    def rename(self, name: str) -> str | None:
        """Rename the encoder of MAE-Lite and MoCo-v3, MAE's probe and timm's LayerScale; drop all other training parts."""
        if name.startswith(TRAINING_PARTS):
            return None
        name = _LAYER_SCALE.sub(r'.gamma_\1', name.removeprefix(MAE_ENCODER).removeprefix(MOCO_ENCODER))
        return _PROBE.get(name[:7], name[:7]) + name[7:]

    def adopt(self, model, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Rename the weights of PaddleViT's DeiT, ViT and MAE folders."""
        return from_paddlevit(arrays, model.global_pool)

    def metadata(self, model) -> dict:
        """Return the number of heads: another number changes the outputs, but not the shapes. Also the grid."""
        return {'MODEL.TRANS.NUM_HEADS': model.num_heads, **grid_metadata(model.patch_embed.grid_size)}

    def unused(self, model, arrays: Mapping[str, np.ndarray], source: str) -> dict[str, str]:
        """See `AttentionRemoval`."""
        return model.removal.unused_weights(arrays, source)

    def resize(self, model, name: str, array: np.ndarray, grid: Grid | None = None) -> np.ndarray:
        """Interpolate absolute and relative position embeddings."""
        if name.endswith('relative_position_bias_table') and array.ndim == 2:
            return resize_relative_table(array, model.patch_embed.grid_size, grid)
        if name != 'pos_embed' or array.ndim != 3:
            return array
        patches = array.shape[1] - model.num_prefix
        old = grid or square_side(patches)
        if old is None or old[0] * old[1] != patches:
            return array
        table = paddle.to_tensor(array.astype('float32'), place=paddle.CPUPlace())
        return resize_position_table(table, old, model.patch_embed.grid_size, model.num_prefix).numpy()

    def start(self, model, names: Collection[str]) -> Start:
        """Fine-tune the base encoder of MAE or MoCo-v3, or a classifier with another pooling."""
        ours = set(model.state_dict())
        renamed = {name: _in_encoder(name) for name in names}
        unused = {name: first_match(_UNUSED, wanted) for name, wanted in renamed.items() if wanted not in ours}
        pretraining = (*TRAINING_PARTS, *DECODER_PARTS, *ADAPTER_PARTS)
        for name in unused:
            if renamed[name].startswith(pretraining):
                unused[name] = 'only pre-training uses them'
        missing = sorted(ours.difference(renamed.values()))
        initial = {name: first_match(_INITIAL, name) for name in missing}
        return Start(
            renamed, *({name: reason for name, reason in part.items() if reason} for part in (unused, initial))
        )


def _in_encoder(name: str) -> str:
    return name if name.startswith(TRAINING_PARTS) else name.removeprefix(MOCO_ENCODER)


def first_match(table: Sequence[tuple[str, str]], name: str) -> str | None:
    """Return the reason of the first pattern that matches the complete name; None: no pattern does."""
    return next((reason for pattern, reason in table if re.fullmatch(pattern, name)), None)


def start_backbone(
    model: nn.Layer,
    prefix: str,
    backbone: nn.Layer,
    names: Collection[str],
    unused_parts: Sequence[tuple[str, str]],
    initial_parts: Sequence[tuple[str, str]],
) -> Start:
    """Initialize the backbone of a dense model from an encoder: a classifier, MAE or MoCo v3.

    Args:
        prefix: of the backbone's parameters in `model`.
        names: of the arrays in the file.
        unused_parts: patterns of the encoder's parameters that the dense model lacks, with reasons.
        initial_parts: patterns of the model's parameters that an encoder lacks, with reasons.
    """
    ours = model.state_dict()
    encoder = TransformerWeights().start(backbone, names)
    renamed = {name: f'{prefix}{inner}' for name, inner in encoder.renamed.items()}
    unused = dict(encoder.unused)
    for name in names:
        reason = first_match(unused_parts, encoder.renamed[name])
        if reason and renamed[name] not in ours:
            unused[name] = reason
    initial = {f'{prefix}{name}': reason for name, reason in encoder.initial.items()}
    missing = [name for name in ours if name not in renamed.values() and name not in initial]
    initial.update({name: reason for name in missing if (reason := first_match(initial_parts, name))})
    return Start(renamed, unused, initial)
