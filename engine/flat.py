# SPDX-License-Identifier: Apache-2.0
"""Many tensors as one, so that an operation on all of them is one kernel launch of a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor

from models.layers.constants import constant

BLOCK = 512  # values


class Layout:
    """Places of tensors in a matrix [M, BLOCK]: each begins with a row of its own, and zeros fill its last row.

    Args:
        tensors: of these shapes are those of the methods.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.shapes = [tensor.shape for tensor in tensors]
        self._sizes = [tensor.size for tensor in tensors]
        rows = tuple(-(-size // BLOCK) for size in self._sizes)
        self._gaps = [count * BLOCK - size for count, size in zip(rows, self._sizes)]
        self._zeros = {gap: paddle.zeros([gap], tensors[0].dtype) for gap in {1, *self._gaps} - {0}}
        self._rows, self._owners = constant(_rows, rows), constant(_owners, rows)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the matrix of tensors, [M, BLOCK]."""
        parts = []
        for tensor, gap in zip(tensors, self._gaps):
            parts += [tensor.flatten(), self._zeros[gap]] if gap else [tensor.flatten()]
        return paddle.concat(parts).reshape([-1, BLOCK])

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Return the tensors of a matrix."""
        lengths = [length for pair in zip(self._sizes, self._gaps) for length in pair if length]
        parts, found = iter(matrix.flatten().split(lengths)), []
        for shape, gap in zip(self.shapes, self._gaps):
            found.append(next(parts).reshape(shape))
            if gap:
                next(parts)
        return found

    def norms(self, matrix: Tensor) -> Tensor:
        """Return the L2 norm of each of the n tensors of a matrix, [n]."""
        sums = paddle.square(matrix).sum(1)
        sums = paddle.gather(paddle.concat([sums, self._zeros[1]]), self._rows.flatten())
        return paddle.sqrt(sums.reshape(self._rows.shape).sum(1))

    def spread(self, values: Tensor) -> Tensor:
        """Values [n] of the tensors -> those of their rows, [M, 1]."""
        return paddle.gather(values, self._owners).unsqueeze(1)


def _rows(counts: tuple[int, ...]) -> np.ndarray:
    """Return the rows of each of n tensors with `counts` rows, then those of a row of zeros behind the last, [n, max]."""
    firsts, places = np.cumsum([0, *counts]), np.arange(max(counts))
    return np.where(places < np.array(counts)[:, None], firsts[:-1, None] + places, firsts[-1])


def _owners(counts: tuple[int, ...]) -> np.ndarray:
    """Return the tensor of each row, [M]."""
    return np.repeat(np.arange(len(counts)), counts)
