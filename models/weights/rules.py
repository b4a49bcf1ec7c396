# SPDX-License-Identifier: Apache-2.0
"""Weight rules of an architecture: names in published files, and initialization from weights of other models."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from paddle import nn

from utils.errors import UserError

Grid = tuple[int, int]  # (rows, columns) of patches
# Entry of the metadata of models that are built for a grid that is not square: [rows, columns]. Shapes show the product only.
GRID = 'GRID'
MAX_ROWS = 1 << 16  # rows or columns of a grid in a file
# Buffers that must be loaded; a model builds all other buffers.
STATISTICS_SUFFIXES = ('._mean', '._variance')


class Start(NamedTuple):
    """How to initialize training from the weights of another kind of model, apart from the classifier.

    Attributes:
        renamed: name in the file -> name in the model, if they differ.
        unused: name in the file that the model does not use -> reason.
        initial: name in the model that keeps its initial value -> reason.
    """

    renamed: Mapping[str, str] = MappingProxyType({})
    unused: Mapping[str, str] = MappingProxyType({})
    initial: Mapping[str, str] = MappingProxyType({})


class WeightRules:
    """Weight rules of an architecture. A model class has one instance, `weight_rules`.

    Attributes:
        head: prefixes of the classifier's parameters, which depend on the number of classes.
        input_weights: ends of the names of convolutions of the image, see `models.weights.channels`.
        optional_parts: parts that a configuration adds: (pattern of their names, key, value of the key if only the file
            has them, value if only the model has them).
    """

    head: tuple[str, ...] = ('head.',)
    input_weights: tuple[str, ...] = (
        'patch_embed.proj.weight',
        'patch_embed.patch_embed.weight',
        'patch_embed.proj.0.weight',
    )
    optional_parts: Sequence[tuple[str, str, str, str]] = ()

    def rename(self, name: str) -> str | None:
        """Return the model's name of a parameter of the published PyTorch weights; None: known, but not used."""
        return name

    def adopt(self, model: nn.Layer, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Return the arrays of a .pdparams file of another project under the model's names; return all others unchanged."""
        return arrays

    def layout(self, name: str, array: np.ndarray) -> np.ndarray:
        """Convert the layout of an array, by its published name. Transposed linear weights need no rule."""
        return array

    def metadata(self, model: nn.Layer) -> dict:
        """Return configuration keys and values that shapes do not show; files store them, and loading compares them.

        GRID is not compared: position embeddings are interpolated from it.
        """
        return {}

    def unused(self, model: nn.Layer, arrays: Mapping[str, np.ndarray], source: str) -> dict[str, str]:
        """Return name -> reason of arrays, under the model's names, that the model does not use.

        Raises:
            UserError: the arrays contradict the model.
        """
        return {}

    def resize(self, model: nn.Layer, name: str, array: np.ndarray, grid: Grid | None = None) -> np.ndarray:
        """Interpolate a position embedding to the resolution of the model; return any other array unchanged.

        Args:
            grid: (rows, columns) of patches in the file; None: a square grid.
        """
        return array

    def start(self, model: nn.Layer, names: Collection[str]) -> Start:
        """Return how to initialize training from a file with the arrays `names`, of another kind of model."""
        return Start()

    def is_head(self, name: str) -> bool:
        """Return whether a parameter belongs to the classifier."""
        return name.startswith(self.head)

    def count_classes(self, state: Mapping) -> int | None:
        """Return the number of classes in a state dict; 0: no classifier; None: its parts disagree."""
        parts = [name for name in state if self.is_head(name) and not name.endswith(STATISTICS_SUFFIXES)]
        shapes = [tuple(state[name].shape) for name in parts]
        counts = {shape[-1] for shape in shapes if shape}
        return counts.pop() if len(counts) == 1 else None if counts else 0


DEFAULT_RULES = WeightRules()


def grid_metadata(grid: Grid) -> dict:
    """Return the metadata of a grid of patches; none for a square grid."""
    return {} if grid[0] == grid[1] else {GRID: list(grid)}


def stored_grid(metadata: Mapping, source: str) -> Grid | None:
    """Return the grid that the metadata of a file names; None: no grid is named, so that it is square.

    Raises:
        UserError: it is no pair of whole numbers.
    """
    grid = metadata.get(GRID)
    if grid is None:
        return None
    if not isinstance(grid, (list, tuple)) or len(grid) != 2 or not all(_is_side(side) for side in grid):
        raise UserError(
            f'{source} names a grid of patches that is no pair (rows, columns): the file is damaged, use another.'
        )
    return int(grid[0]), int(grid[1])


def _is_side(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 < value < MAX_ROWS


def square_side(patches: int) -> Grid | None:
    """Return the square grid of a number of patches; None: they form no square."""
    side = math.isqrt(max(patches, 0))
    return (side, side) if side and side**2 == patches else None


def rules_of(model: nn.Layer) -> WeightRules:
    """Return the weight rules of a model; default rules for other layers."""
    return getattr(model, 'weight_rules', DEFAULT_RULES)
