# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention (https://arxiv.org/abs/1706.03762)."""

from __future__ import annotations

from typing import NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn


class AttentionMaps(NamedTuple):
    """What happened inside an attention.

    Attributes:
        logits: scaled scores before the softmax, [B, H, N, N].
        weights: after softmax and dropout, [B, H, N, N].
    """

    logits: Tensor
    weights: Tensor


class Attention(nn.Layer):
    """softmax(q k^T / sqrt(d)) v over H heads of d = C / H channels.

    Args:
        dim: channels C.
        num_heads: H.
        qkv_bias: biases of the three projections.
        attn_drop_rate: dropout of the attention weights.
        proj_drop_rate: dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias_attr=None if qkv_bias else False)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def forward(self, x: Tensor, need_maps: bool = False) -> tuple[Tensor, AttentionMaps | None]:
        """[B, N, C] -> [B, N, C], and the maps where they are asked for: a fused kernel does not have them."""
        q, k, v = self.qkv(x).reshape([0, 0, 3, self.num_heads, self.head_dim]).unbind(2)
        if not need_maps and _fused_kernel(x):
            rate = self.attn_drop.p
            x, maps = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, training=self.training), None
        else:
            q, k, v = (part.transpose([0, 2, 1, 3]) for part in (q, k, v))
            logits = paddle.matmul(q * self.scale, k, transpose_y=True)
            weights = self.attn_drop(F.softmax(logits, axis=-1))
            x = paddle.matmul(weights, v).transpose([0, 2, 1, 3])
            maps = AttentionMaps(logits, weights) if need_maps else None
        return self.proj_drop(self.proj(x.flatten(2))), maps


def _fused_kernel(x: Tensor) -> bool:
    """Whether attention runs faster as one kernel. Exported models are left in parts, which run on every device."""
    return paddle.in_dynamic_mode() and x.place.is_gpu_place()
