# SPDX-License-Identifier: Apache-2.0
"""Names of the weights of PaddleViT's DeiT, ViT and MAE folders. Layouts are Paddle's, as in LeanViT."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

_SIGN = 'patch_embedding.patch_embedding.weight'

_BLOCK = (
    (r'attn_norm', 'norm1'),
    (r'mlp_norm', 'norm2'),
    (r'attn\.out', 'attn.proj'),
    (r'attn\.(?:query|q)', 'attn.q'),
    (r'attn\.(?:key|k)', 'attn.k'),
    (r'attn\.(?:value|v)', 'attn.v'),
    (r'(attn\.qkv|mlp\.fc1|mlp\.fc2)', r'\1'),
)
# Pattern of PaddleViT's complete names -> LeanViT's. Older files keep the tokens in the patch embedding.
_NAMES = [
    (r'patch_embedding\.patch_embedding\.(weight|bias)', r'patch_embed.proj.\1'),
    (r'(?:patch_embedding\.)?(cls_token|dist_token)', r'\1'),
    (r'(?:patch_embedding\.|encoder_)?position_embeddings?', 'pos_embed'),
    (r'encoder\.(?:encoder_)?norm\.(\w+)', r'norm.\1'),
    (r'classifier\.(\w+)', r'head.\1'),
    (r'classifier\.0\.(\w+)', r'head_norm.\1'),
    (r'classifier\.1\.(\w+)', r'head.\1'),
    (r'classifier_dist(?:ill)?\.(\w+)', r'head_dist.\1'),
    (r'linear_projection\.(\w+)', r'decoder_embed.\1'),
    (r'decoder_position_embeddings?', 'decoder_pos_embed'),
    (r'decoder\.norm\.(\w+)', r'decoder_norm.\1'),
]
for _layers, _blocks in (('encoder.layers', 'blocks'), ('decoder.layers', 'decoder_blocks')):
    for _theirs, _ours in _BLOCK:
        _group = 3 if '(attn' in _theirs else 2
        _part = r'\2' if _group == 3 else _ours
        _NAMES.append((rf'{re.escape(_layers)}\.(\d+)\.{_theirs}\.(\w+)', rf'{_blocks}.\1.{_part}.\{_group}'))
_PATTERNS = [(re.compile(theirs), ours) for theirs, ours in _NAMES]
_SPLIT = re.compile(r'(.+\.attn)\.q\.(weight|bias)')


def from_paddlevit(arrays: Mapping[str, np.ndarray], pooled: bool = False) -> dict[str, np.ndarray]:
    """Return the weights of a file of PaddleViT under LeanViT's names; return all other weights unchanged.

    Separate weights of query, key and value become `attn.qkv`.

    Args:
        arrays: name -> array.
        pooled: the model normalizes after pooling, so that the norm before the classifier is `fc_norm` (MAE, fine-tuned).
    """
    if _SIGN not in arrays:
        return dict(arrays)
    last_norm = 'fc_norm' if pooled else 'norm'
    renamed = {_rename(name, last_norm): array for name, array in arrays.items()}
    for name in list(renamed):
        if match := _SPLIT.fullmatch(name):
            parts = [f'{match[1]}.{part}.{match[2]}' for part in 'qkv']
            if _can_be_joined([renamed.get(part) for part in parts]):
                renamed[f'{match[1]}.qkv.{match[2]}'] = np.concatenate([renamed.pop(part) for part in parts], axis=-1)
    return renamed


def _can_be_joined(parts: list[np.ndarray | None]) -> bool:
    """Return True for three arrays of one shape whose numbers are all stored, so that the result is no larger than the file."""
    shapes = {part.shape if part is not None else () for part in parts}
    return len(shapes) == 1 and () not in shapes and all(part.size and 0 not in part.strides for part in parts)


def _rename(name: str, last_norm: str) -> str:
    if name.startswith('encoder_norm.'):
        return f'{last_norm}.{name.partition(".")[2]}'
    for pattern, ours in _PATTERNS:
        if match := pattern.fullmatch(name):
            return match.expand(ours)
    return name
