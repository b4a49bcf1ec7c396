# SPDX-License-Identifier: Apache-2.0
"""What an architecture knows about its weights: their names elsewhere, and how to take those of other models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from paddle import nn


class Start(NamedTuple):
    """How training starts from the weights of another kind of model. The classifier is not part of it.

    Attributes:
        renamed: name in the file -> name in the model; missing ones are equal.
        unused: name in the file that is not used -> reason.
        initial: name in the model that keeps its initial value -> reason.
    """

    renamed: Mapping[str, str] = MappingProxyType({})
    unused: Mapping[str, str] = MappingProxyType({})
    initial: Mapping[str, str] = MappingProxyType({})


class WeightRules:
    """Rules of an architecture for its weights. A model class holds one instance, `weight_rules`.

    Attributes:
        head: prefixes of the classifier's parameters, which depend on the number of classes.
        optional_parts: parts that a configuration adds: pattern of their names, key, its value where only a file or only
            the model has them.
    """

    head: tuple[str, ...] = ('head.',)
    optional_parts: Sequence[tuple[str, str, str, str]] = ()

    def rename(self, name: str) -> str | None:
        """Our name of a parameter of the published PyTorch weights; None: it is known and not used here."""
        return name

    def layout(self, name: str, array: np.ndarray) -> np.ndarray:
        """An array of the published weights, by its published name, where our layer keeps it in another layout. Linear
        layers, which PyTorch stores transposed, need no rule."""
        return array

    def metadata(self, model: nn.Layer) -> dict:
        """Configuration keys and values that shapes do not show; they are stored with the weights and compared on loading."""
        return {}

    def unused(self, model: nn.Layer, arrays: Mapping[str, np.ndarray], source: str) -> dict[str, str]:
        """Name -> reason of the arrays, under the model's names, that the model does not use.

        Raises:
            UserError: the arrays contradict the model.
        """
        return {}

    def resize(self, model: nn.Layer, name: str, array: np.ndarray) -> np.ndarray:
        """A position embedding of another resolution, in that of the model; any other array as it is."""
        return array

    def start(self, model: nn.Layer, names: Collection[str]) -> Start:
        """How training starts from a file with the arrays `names`, of another kind of model."""
        return Start()

    def is_head(self, name: str) -> bool:
        """Whether a parameter is one of the classifier."""
        return name.startswith(self.head)

    def count_classes(self, state: Mapping) -> int | None:
        """Number of classes of the classifier in a state dict; 0 without one, None where its parts disagree."""
        shapes = [tuple(value.shape) for name, value in state.items() if self.is_head(name)]
        counts = {shape[-1] for shape in shapes if shape}
        return counts.pop() if len(counts) == 1 else None if counts else 0


DEFAULT_RULES = WeightRules()


def rules_of(model: nn.Layer) -> WeightRules:
    """The rules of a model; those without any exception for a layer that has none."""
    return getattr(model, 'weight_rules', DEFAULT_RULES)
