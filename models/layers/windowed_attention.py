# SPDX-License-Identifier: Apache-2.0
"""Windowed attention and decomposed relative positions, as in ViTDet (https://arxiv.org/abs/2203.16527).

Decomposed relative positions (MViTv2, https://arxiv.org/abs/2112.01526) add to the logit of query q at (y, x) and key at
(y', x') the products q . R_h[y - y'] + q . R_w[x - x'], where q is not scaled. The heads share both tables.
"""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.nn import initializer

from models.layers.attention import MAX_CHANNELS, Attention, AttentionMaps, wide_channels
from models.layers.constants import constant
from utils.errors import UserError


# ---------------------------------------------------------------------------------------------------- windows
def window_partition(x: Tensor, window: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut maps into windows, with zeros at the right and bottom up to a multiple of the window.

    Args:
        x: [B, H, W, C].
        window: side w of a window.

    Returns:
        Windows [B * number of windows, w, w, C], and the padded (H, W).
    """
    height, width, channels = x.shape[1:]
    rows, columns = -(-height // window), -(-width // window)
    x = _padded(x, rows * window - height, columns * window - width)
    x = x.reshape([-1, rows, window, columns, window, channels]).transpose([0, 1, 3, 2, 4, 5])
    return x.reshape([-1, window, window, channels]), (rows * window, columns * window)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """Add rows and columns of zeros to [B, H, W, C]; Paddle 3.3: `F.pad` corrupts memory in programs with oneDNN."""
    if rows:
        x = paddle.concat([x, paddle.zeros_like(x[:, :1]).expand([-1, rows, -1, -1])], axis=1)
    if columns:
        x = paddle.concat([x, paddle.zeros_like(x[:, :, :1]).expand([-1, -1, columns, -1])], axis=2)
    return x


def window_merge(windows: Tensor, padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The inverse of `window_partition`: windows [B * number, w, w, C] -> [B, *size, C], without the padding."""
    window, channels = windows.shape[2:]
    rows, columns = padded[0] // window, padded[1] // window
    x = windows.reshape([-1, rows, columns, window, window, channels]).transpose([0, 1, 3, 2, 4, 5])
    return x.reshape([-1, *padded, channels])[:, : size[0], : size[1]]


# ---------------------------------------------------------------------------------------------------- positions
def relative_rows(table: Tensor, q_size: int, k_size: int) -> Tensor:
    """Row of a table for each query and key position along one axis.

    Args:
        table: [T, d]; for another T than 2 max(q, k) - 1 it is interpolated linearly.
        q_size, k_size: q and k; positions are scaled to the longer one and the differences truncated.

    Returns:
        [q, k, d]
    """
    table = resize_decomposed_table(table, 2 * max(q_size, k_size) - 1)
    index = constant(_row_index, q_size, k_size)
    return paddle.gather(table, index).reshape([q_size, k_size, table.shape[1]])


def _row_index(q_size: int, k_size: int) -> np.ndarray:
    """Row of the table for each query and key position, [q * k] int64."""
    q_scale, k_scale = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
    differences = (np.arange(q_size) * q_scale)[:, None] - np.arange(k_size) * k_scale + (k_size - 1) * k_scale
    return differences.astype('int64').reshape(-1)


def resize_decomposed_table(table: Tensor, rows: int) -> Tensor:
    """A table of relative positions along one axis [T, d] -> [rows, d], linearly with half-pixel centers."""
    if table.shape[0] == rows:
        return table
    columns = table.transpose([1, 0]).unsqueeze(0)
    resized = F.interpolate(columns, size=[rows], mode='linear', align_corners=False, align_mode=0, data_format='NCW')
    return resized[0].transpose([1, 0])


def decomposed_bias(q: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bias of the logits of decomposed relative positions.

    Args:
        q: queries before scaling [B, H * W, heads, d], of a grid H x W.
        rows: `relative_rows` of the vertical table, [H, H, d].
        columns: of the horizontal table, [W, W, d].

    Returns:
        [B, heads, H * W, H * W]
    """
    height, width, heads = rows.shape[0], columns.shape[0], q.shape[2]
    vertical, horizontal = _axis_biases(q, rows, columns)
    vertical, horizontal = vertical.transpose([1, 2, 0, 3, 4]), horizontal.transpose([1, 2, 3, 0, 4])
    bias = vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)  # [B, heads, H, W, H, W]
    return bias.reshape([-1, heads, height * width, height * width])


def _axis_biases(q: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The biases of both axes, arguments as in `decomposed_bias`.

    Returns:
        [H, B, heads, W, H] for each row of keys, [W, B, heads, H, W] for each column of keys.
    """
    height, width, (heads, dim) = rows.shape[0], columns.shape[0], q.shape[2:]
    q = q.reshape([-1, height, width, heads, dim])
    vertical = paddle.matmul(
        q.transpose([1, 0, 3, 2, 4]).reshape([height, -1, dim]), rows.astype(q.dtype), transpose_y=True
    )
    horizontal = paddle.matmul(
        q.transpose([2, 0, 3, 1, 4]).reshape([width, -1, dim]), columns.astype(q.dtype), transpose_y=True
    )
    return (
        vertical.reshape([height, -1, heads, width, height]),
        horizontal.reshape([width, -1, heads, height, width]),
    )


def decomposed_channels(q: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Channels whose products are `decomposed_bias`: those of a key are 1 for its row and column, and else 0.

    Args:
        q, rows, columns: as in `decomposed_bias`.

    Returns:
        Of the queries [B, H * W, heads, H + W], and of the keys [H * W, H + W].
    """
    height, width, heads = rows.shape[0], columns.shape[0], q.shape[2]
    vertical, horizontal = _axis_biases(q, rows, columns)
    queries = paddle.concat([vertical.transpose([1, 0, 3, 2, 4]), horizontal.transpose([1, 3, 0, 2, 4])], axis=-1)
    return queries.reshape([-1, height * width, heads, height + width]), constant(_cells, height, width)


def _cells(height: int, width: int) -> np.ndarray:
    """One-hot row and column of each cell of a grid, [H * W, H + W] float32."""
    rows, columns = np.divmod(np.arange(height * width), width)
    return np.concatenate([np.eye(height)[rows], np.eye(width)[columns]], axis=1).astype('float32')


def add_decomposed_tables(layer: nn.Layer, grid: tuple[int, int], head_dim: int) -> None:
    """Give `layer` both tables, of zeros, under detectron2's names."""
    for name, length in zip(('rel_pos_h', 'rel_pos_w'), grid):
        table = layer.create_parameter([2 * length - 1, head_dim], default_initializer=initializer.Constant(0.0))
        setattr(layer, name, table)


# ---------------------------------------------------------------------------------------------------- mixers
class DecomposedAttention(Attention):
    """Attention among all patches with decomposed relative positions; other grids interpolate the tables.

    Args:
        grid: (rows, columns) of patches.
        options: arguments of `Attention`.
    """

    patches_only = True

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], **options):
        super().__init__(dim, num_heads, **options)
        add_decomposed_tables(self, grid, self.head_dim)

    def own_bias(self, q: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """See `Attention`."""
        check_grid(grid, q.shape[1])
        return decomposed_bias(q, *_tables(self, grid))

    def own_channels(self, q: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """See `Attention`."""
        check_grid(grid, q.shape[1])
        return decomposed_channels(q, *_tables(self, grid))

    def fuses(self, grid: tuple[int, int] | None, key_bias: Tensor | None) -> bool:
        """See `Attention`."""
        return grid is not None and _fits(self.head_dim, grid, key_bias)


def _tables(layer: Attention, grid: tuple[int, int]) -> list[Tensor]:
    """`relative_rows` of both tables of a layer, for a grid of patches."""
    return [relative_rows(table, side, side) for table, side in zip((layer.rel_pos_h, layer.rel_pos_w), grid)]


def _fits(dim: int, grid: tuple[int, int], key_bias: Tensor | None) -> bool:
    """Return whether the fused kernel takes the channels of both axes."""
    return key_bias is None and wide_channels(dim, sum(grid)) <= MAX_CHANNELS


class WindowedAttention(Attention):
    """Attention among the patches of each window.

    Windows are not shifted. Maps are padded with zeros to whole windows; the padding takes part as it does in ViTDet, with the
    biases of the projections as its keys and values.

    Args:
        window: side of a window, patches.
        relative: decomposed relative positions.
        options: arguments of `Attention`.
    """

    offers = ()  # its attention weights are those of windows
    patches_only = True

    def __init__(self, dim: int, num_heads: int, window: int, relative: bool = True, **options):
        super().__init__(dim, num_heads, **options)
        self.window, self.relative = window, relative
        if relative:
            add_decomposed_tables(self, (window, window), self.head_dim)

    def forward(
        self,
        x: Tensor,
        need_maps: bool | str = False,
        need_keys: bool = False,
        key_bias: Tensor | None = None,
        bias: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, AttentionMaps]:
        """See `Attention`; no maps are returned."""
        check_grid(grid, x.shape[1])
        windows, padded = window_partition(x.reshape([-1, *grid, x.shape[2]]), self.window)
        # `super()` of a subclass recurses without end in exported programs
        mixed, _ = Attention.forward(self, windows.flatten(1, 2), grid=(self.window, self.window))
        mixed = mixed.reshape([-1, self.window, self.window, x.shape[2]])
        return window_merge(mixed, padded, grid).flatten(1, 2), AttentionMaps()

    def own_bias(self, q: Tensor, grid: tuple[int, int] | None) -> Tensor | None:
        """See `Attention`."""
        return decomposed_bias(q, *_tables(self, grid)) if self.relative else None

    def own_channels(self, q: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, Tensor] | None:
        """See `Attention`."""
        return decomposed_channels(q, *_tables(self, grid)) if self.relative else None

    def fuses(self, grid: tuple[int, int] | None, key_bias: Tensor | None) -> bool:
        """See `Attention`."""
        return not self.relative or _fits(self.head_dim, grid, key_bias)


def check_grid(grid: tuple[int, int] | None, tokens: int) -> None:
    """Raises UserError where the tokens are not all patches of a grid."""
    if grid is None or (tokens > 0 and grid[0] * grid[1] != tokens):
        raise UserError(
            'windowed attention and decomposed relative positions (MODEL.TRANS.MIXER) need all patch tokens and no other.'
        )
