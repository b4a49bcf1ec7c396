# SPDX-License-Identifier: Apache-2.0
"""Registry of token mixers.

A mixer is a layer with the signature of `Attention.forward`. To add one, register a function that builds it from a
`MixerSpec`, and set MODEL.TRANS.MIXER to its name:

>>> @register_mixer('mine')
... def mine(spec, dim, num_heads, grid, drop_rate) -> nn.Layer: ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paddle import nn

from models.layers.attention import Attention, RelativeAttention
from models.layers.windowed_attention import DecomposedAttention, WindowedAttention
from utils.registry import Registry

MIXERS = Registry('token mixer (MODEL.TRANS.MIXER)')
register_mixer = MIXERS.register
DEFAULT_WINDOW = 14  # side of a window of windowed attention, patches


@dataclass(frozen=True)
class MixerSpec:
    """Configuration of a token mixer.

    Attributes:
        name: name in the registry.
        qkv_bias, key_bias: see `Attention`.
        drop_rate: dropout of the attention weights.
        options: further options by name; from a configuration, the keys of the section MODEL.<NAME> in lower case.
    """

    name: str = 'attention'
    qkv_bias: bool = True
    key_bias: bool = True
    drop_rate: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


def build_mixer(spec: MixerSpec, dim: int, num_heads: int, grid: tuple[int, int], drop_rate: float = 0.0) -> nn.Layer:
    """Build the mixer that `spec` describes.

    Args:
        dim: channels C.
        num_heads: heads of attention.
        grid: (rows, columns) of patches that the model is built for.
        drop_rate: dropout of the output.
    """
    return MIXERS[spec.name](spec, dim, num_heads, grid, drop_rate)


@register_mixer('attention')
def _attention(spec: MixerSpec, dim: int, num_heads: int, grid: tuple[int, int], drop_rate: float) -> Attention:
    return Attention(dim, num_heads, **_options(spec, drop_rate))


@register_mixer('relative')
def _relative(spec: MixerSpec, dim: int, num_heads: int, grid: tuple[int, int], drop_rate: float) -> RelativeAttention:
    """Build attention with one relative position bias per block."""
    return RelativeAttention(dim, num_heads, grid, **_options(spec, drop_rate))


@register_mixer('windowed')
def _windowed(spec: MixerSpec, dim: int, num_heads: int, grid: tuple[int, int], drop_rate: float) -> WindowedAttention:
    """Attention within windows (ViTDet). Options: `size`, side of a window; `rel_pos`, decomposed relative positions."""
    window, relative = spec.options.get('size', DEFAULT_WINDOW), spec.options.get('rel_pos', True)
    return WindowedAttention(dim, num_heads, window, relative, **_options(spec, drop_rate))


@register_mixer('decomposed')
def _decomposed(
    spec: MixerSpec, dim: int, num_heads: int, grid: tuple[int, int], drop_rate: float
) -> DecomposedAttention:
    """Attention with decomposed relative positions (ViTDet)."""
    return DecomposedAttention(dim, num_heads, grid, **_options(spec, drop_rate))


def _options(spec: MixerSpec, drop_rate: float) -> dict:
    return {
        'qkv_bias': spec.qkv_bias,
        'key_bias': spec.key_bias,
        'attn_drop_rate': spec.drop_rate,
        'proj_drop_rate': drop_rate,
    }
