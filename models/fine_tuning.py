# SPDX-License-Identifier: Apache-2.0
"""How a Vision Transformer starts from the weights of another one: pre-trained by MAE or MoCo-v3, or pooling otherwise."""

from __future__ import annotations

import re
from collections.abc import Collection

from models.base import Start

# The trained encoder of MoCo-v3 in a file, without its projector.
_ONLINE = re.compile(r'^base_encoder\.(?!head\.)')
# Parts of a file that a model without them does not take when a training starts from it, and parts of a model that then
# begin anew where the file lacks them.
_LEFT_OUT = (
    (r'mask_token|decoder_.*|(attn|hidden)_adapter\..*', 'they serve the pre-training only'),
    (r'(momentum_encoder|predictor|base_encoder\.head)\..*', 'they serve the pre-training only'),
    (r'norm\..*', 'the model normalises after pooling'),
    (r'blocks\.\d+\.attn\.qkv\.bias', 'biases of query and value are learnt by themselves'),
    (r'pos_embed', 'the model has no absolute positions'),
)
_ANEW = (
    (r'(fc_norm|dist_norm)\..*', 'the file normalises before pooling'),
    (r'.*\.(q_bias|v_bias)', 'biases of query and value are learnt by themselves'),
    (r'.*\.(gamma_1|gamma_2)', 'the file does not scale its branches'),
    (r'.*relative_position_bias_table', 'the file has no relative positions'),
)

# Parts that a key adds: pattern of their names, key, its value where only the file or only the model has them.
OPTIONAL_PARTS = (
    (r'dist_token|dist_norm\..*|head_dist\..*', 'MODEL.TRANS.DISTILLED', 'True', 'False'),
    (r'pre_logits\..*', 'MODEL.TRANS.REPRESENTATION_SIZE', 'their size', 'None'),
    (r'fc_norm\..*', 'MODEL.TRANS.GLOBAL_POOL', 'True', 'False'),
    (r'blocks\.\d+\.gamma_[12]', 'MODEL.TRANS.LAYER_SCALE', 'a number', 'None'),
    (r'blocks\..*relative_position_bias_table', 'MODEL.TRANS.REL_POS', "('block',)", '()'),
    (r'rel_pos_bias\..*', 'MODEL.TRANS.REL_POS', "('shared',)", '()'),
    (r'blocks\.\d+\.attn\.[qv]_bias', 'MODEL.TRANS.KEY_BIAS', 'False', 'True'),
    (r'pos_embed', 'MODEL.TRANS.ABS_POS', 'True', 'False'),
)

# LayerScale of timm and DINOv2.
_LAYER_SCALE = re.compile(r'\.ls([12])\.gamma$')


def published_name(name: str) -> str:
    """Our name of an array that timm names in its own way."""
    return _LAYER_SCALE.sub(r'.gamma_\1', name)


def start_transformer(ours: Collection[str], theirs: Collection[str]) -> Start:
    """What a model with the weights `ours` takes of a file with the weights `theirs`."""
    called = {name: _ONLINE.sub('', name) for name in theirs}
    unused = {
        name: reason
        for name, wanted in called.items()
        if wanted not in ours
        for parts, reason in _LEFT_OUT
        if re.fullmatch(parts, wanted)
    }
    missing = set(ours).difference(called.values())
    anew = {name: reason for name in sorted(missing) for parts, reason in _ANEW if re.fullmatch(parts, name)}
    return Start(called, unused, anew)
