# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention (https://arxiv.org/abs/1706.03762)."""

from __future__ import annotations

from typing import NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

import ops
from models.layers.basic import Linear, are_plain, drops, is_on_cpu, operator_replaces
from models.layers.relative_position import add_relative_positions, relative_bias

MAX_CHANNELS = 192  # per head: with more, the backward pass of FlashAttention 2 needs an A100 or H100
CLASS_ROW = 'class'  # value of `need_maps`
_EXTRA, _QUERY = 8, 8.0  # channels for a bias per key, and their value in the queries, exact in half precision


class AttentionMaps(NamedTuple):
    """Intermediate results of an attention layer.

    Attributes:
        logits: scaled scores before the softmax, [B, H, N, N].
        weights: after softmax and dropout, [B, H, N, N]; [B, H, 1, N] for the first token alone, the class token.
        keys: mean over the heads, [B, N, C / H].
    """

    logits: Tensor | None = None
    weights: Tensor | None = None
    keys: Tensor | None = None


class Attention(nn.Layer):
    """softmax(q k^T / sqrt(d)) v over H heads of d = C / H channels.

    Args:
        dim: channels C.
        num_heads: H.
        qkv_bias: add biases to the three projections.
        attn_drop_rate: dropout of the attention weights.
        proj_drop_rate: dropout of the output.
        key_bias: False: `qkv_bias` adds only the query and value biases, as `q_bias` and `v_bias` (BEiT).

    Attributes:
        offers: names of the `AttentionMaps` that `forward` can return; a mixer without this attribute has none.
    """

    offers = AttentionMaps._fields

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        key_bias: bool = True,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = Linear(dim, 3 * dim, bias_attr=None if qkv_bias and key_bias else False)
        self.q_bias = self.v_bias = None
        if qkv_bias and not key_bias:
            self.q_bias, self.v_bias = (self.create_parameter([dim], is_bias=True) for _ in range(2))
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def forward(
        self,
        x: Tensor,
        need_maps: bool | str = False,
        need_keys: bool = False,
        key_bias: Tensor | None = None,
        bias: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, AttentionMaps]:
        """Mix tokens. Every mixer has this signature.

        Args:
            x: [B, N, C].
            need_maps: return logits and weights, which a fused kernel does not compute; `CLASS_ROW`: at least the
                weights of the first token.
            need_keys: return the keys.
            key_bias: added to the logits, [B, 1, 1, N].
            bias: added to the logits, [H, N, N].
            grid: (rows, columns) of the patches, for mixers that need it; None: the tokens form no grid.

        Returns:
            [B, N, C], and the requested maps.
        """
        fused = bias is None and _fused_kernel(x) and self.fuses(grid, key_bias) and self._fuses_maps(need_maps)
        if not fused and bias is None and self._operator_computes(x, need_maps, key_bias):
            return self._by_operators(x, need_maps, need_keys, key_bias)
        q, k, v = self._project(x).reshape([0, 0, 3, self.num_heads, self.head_dim]).unbind(2)
        maps = AttentionMaps(keys=k.mean(2) if need_keys else None)
        if fused:
            x = self._fused(q, k, v, key_bias, grid)
            maps = maps._replace(weights=self._class_row(q, k, key_bias) if need_maps else None)
        else:
            pair_biases = [bias for bias in (bias, self.own_bias(q, grid)) if bias is not None]
            q, k, v = (part.transpose([0, 2, 1, 3]) for part in (q, k, v))
            logits = paddle.matmul(q * self.scale, k, transpose_y=True)
            for bias in pair_biases if key_bias is None else [key_bias, *pair_biases]:
                logits = logits + bias
            weights = self.attn_drop(F.softmax(logits, axis=-1))
            x = paddle.matmul(weights, v).transpose([0, 2, 1, 3])
            maps = maps._replace(logits=logits, weights=weights) if need_maps else maps
        return self.proj_drop(self.proj(x.flatten(2))), maps

    def _operator_computes(self, x: Tensor, need_maps: bool | str, key_bias: Tensor | None) -> bool:
        """Return whether `ops.attention` computes this pass."""
        plain = type(self).own_bias is Attention.own_bias and not drops(self.attn_drop)
        plain = plain and need_maps in (False, CLASS_ROW) and (key_bias is None or _is_constant(key_bias, x))
        return plain and operator_replaces(x, (self.qkv, self.attn_drop), (Linear, nn.Dropout))

    def _by_operators(
        self, x: Tensor, need_maps: bool | str, need_keys: bool, key_bias: Tensor | None
    ) -> tuple[Tensor, AttentionMaps]:
        """Compute `forward` by the operators for the CPU."""
        maps = AttentionMaps()
        qkv = ops.linear(x, self.qkv.weight, self._qkv_bias(), half_output=not (need_maps or need_keys))
        if need_maps or need_keys:
            q, k, _ = qkv.reshape([0, 0, 3, self.num_heads, self.head_dim]).unbind(2)
            weights = self._class_row(q, k, key_bias) if need_maps else None
            maps = AttentionMaps(weights=weights, keys=k.mean(2) if need_keys else None)
        key_bias = None if key_bias is None else key_bias.flatten(1)
        x = ops.attention(qkv, self.num_heads, self.scale, key_bias)
        if not are_plain([self.proj], [Linear]):
            x = x.astype('float32')  # Paddle has no layers for bfloat16 on the CPU
        return self.proj_drop(self.proj(x)), maps

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, grid: tuple[int, int] | None) -> Tensor:
        """Compute attention of q, k, v [B, N, H, d] by the fused kernel, [B, N, H, d].

        A bias becomes channels of queries and keys: a mask of the kernel is slower and has no gradient. `training` is always
        set: without it, the kernel of float32 and of GPUs before Ampere keeps no sums of exponentials for its backward pass.
        """
        channels = self.own_channels(q, grid)
        if channels is not None:
            q, k, v = with_channels(q, k, v, *channels)
        if key_bias is not None:
            q, k, v = with_key_bias(q, k, v, key_bias)
        rate = self.attn_drop.p if drops(self.attn_drop) else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, training=True)
        return x[..., : self.head_dim]

    def _class_row(self, q: Tensor, k: Tensor, key_bias: Tensor | None) -> Tensor:
        """Return the attention weights of the first token, [B, H, 1, N], by the operators of the unfused path."""
        q, k = (part.transpose([0, 2, 1, 3]) for part in (q[:, :1], k))
        logits = paddle.matmul(q * self.scale, k, transpose_y=True)
        return F.softmax(logits if key_bias is None else logits + key_bias, axis=-1)

    def _fuses_maps(self, need_maps: bool | str) -> bool:
        """Return whether the fused path returns these maps: the class row, if neither biases nor dropout change it."""
        if need_maps != CLASS_ROW:
            return not need_maps
        return type(self).own_bias is Attention.own_bias and not drops(self.attn_drop)

    def fuses(self, grid: tuple[int, int] | None, key_bias: Tensor | None) -> bool:
        """Return whether the fused kernel can compute this layer; arguments as in `forward`."""
        return True

    def own_channels(self, q: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, Tensor] | None:
        """Return channels whose products are `own_bias`, as arguments of `with_channels`; None: there is no bias."""
        return None

    def own_bias(self, q: Tensor, grid: tuple[int, int] | None) -> Tensor | None:
        """Return the layer's own bias of the attention logits, [H, N, N] or [B, H, N, N]; None: no bias.

        Args:
            q: queries before scaling, [B, N, H, C / H].
            grid: as in `forward`.
        """
        return None

    def _project(self, x: Tensor) -> Tensor:
        """[B, N, C] -> concatenated queries, keys and values, [B, N, 3 * C]."""
        x = self.qkv(x)
        return x if self.q_bias is None else x + self._qkv_bias().astype(x.dtype)

    def _qkv_bias(self) -> Tensor | None:
        """Return the biases of queries, keys and values, [3 * C]; None: they have none."""
        if self.q_bias is None:
            return self.qkv.bias
        return paddle.concat([self.q_bias, paddle.zeros_like(self.q_bias), self.v_bias])


class RelativeAttention(Attention):
    """Attention with its own relative position bias (BEiT), for all patches of one grid and a class token.

    Args:
        grid: (rows, columns) of patches.
        options: arguments of `Attention`.
    """

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], **options):
        super().__init__(dim, num_heads, **options)
        add_relative_positions(self, grid, num_heads)

    def own_bias(self, q: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """See `Attention`."""
        return relative_bias(self)

    def fuses(self, grid: tuple[int, int] | None, key_bias: Tensor | None) -> bool:
        """See `Attention`: False. The kernels take a bias per head only with a copy for each image, and not its gradient."""
        return False


def with_channels(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add channels to q, k, v [B, N, H, d], with which their scaled scores q k^T / sqrt(d') have the bias queries keys^T.

    d' is d + E, rounded up to a multiple of 8. The new channels of v are 0.

    Args:
        queries: [B, N, H, E].
        keys: [N, E].
    """
    batch, tokens, heads, dim = q.shape
    wide, extra = wide_channels(dim, keys.shape[1]), keys.shape[1]
    q = [
        q * (wide / dim) ** 0.5,
        queries.astype(q.dtype) * wide**0.5,
    ]  # scores are divided by sqrt(d') instead of sqrt(d)
    k = [k, keys.astype(k.dtype).reshape([1, tokens, 1, extra]).expand([batch, tokens, heads, extra])]
    if wide > dim + extra:
        padding = paddle.zeros([batch, tokens, heads, wide - dim - extra], v.dtype)
        q, k = [*q, padding], [*k, padding]
    v = [v, paddle.zeros([batch, tokens, heads, wide - dim], v.dtype)]
    return tuple(paddle.concat(parts, axis=-1) for parts in (q, k, v))


def wide_channels(dim: int, extra: int) -> int:
    """Return the channels per head of `with_channels`; see `MAX_CHANNELS`."""
    return -(-(dim + extra) // 8) * 8


def with_key_bias(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add channels to q, k, v [B, N, H, d], with which their scaled scores q k^T / sqrt(d') have the bias [B, 1, 1, N].

    d' = d + 8: the kernel needs equal numbers of channels, in multiples of 8. The new channels of v are 0. The bias is the sum
    of two channels of k, its half-precision value and the rest, so half precision does not round it.
    """
    batch, tokens, heads, dim = q.shape
    wide = dim + _EXTRA
    bias = key_bias.flatten(1).astype('float32') * (wide**0.5 / _QUERY)
    high = bias.astype(k.dtype)
    low = (bias - high.astype('float32')).astype(k.dtype)
    zeros = paddle.zeros([batch, tokens, _EXTRA - 2], k.dtype)
    keys = paddle.concat([high.unsqueeze(-1), low.unsqueeze(-1), zeros], axis=-1)
    shape = [batch, tokens, heads, _EXTRA]
    # Scores are divided by sqrt(d') instead of sqrt(d).
    q = paddle.concat([q * (wide / dim) ** 0.5, paddle.full(shape, _QUERY, q.dtype)], axis=-1)
    k = paddle.concat([k, keys.unsqueeze(2).expand(shape)], axis=-1)
    return q, k, paddle.concat([v, paddle.zeros(shape, v.dtype)], axis=-1)


def _is_constant(key_bias: Tensor, x: Tensor) -> bool:
    """Return whether `ops.attention` takes a bias for tokens x [B, N, C]: [B, 1, 1, N] in float32, without gradient."""
    shape = [x.shape[0], 1, 1, x.shape[1]]
    return key_bias.stop_gradient and key_bias.dtype == paddle.float32 and list(key_bias.shape) == shape


def _fused_kernel(x: Tensor) -> bool:
    """Return whether to use the fused attention kernel. Exports use separate operators, which run on all devices."""
    return paddle.in_dynamic_mode() and not is_on_cpu(x)
