# SPDX-License-Identifier: Apache-2.0
"""Number of classes of the classifier in a weight file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from paddle import nn

from models.weights.rules import rules_of

BOX_SIDES = 4  # numbers per class of a detector's box predictor


def match_classes(model: nn.Layer, arrays: Mapping[str, np.ndarray]) -> None:
    """Set the number of classes to that of the weights, if both have a classifier."""
    classes = stored_classes(model, arrays)
    if classes and model.num_classes and classes != model.num_classes:
        model.reset_classifier(classes)


def stored_classes(model: nn.Layer, arrays: Mapping[str, np.ndarray]) -> int | None:
    """Number of classes of the classifier in the weights, see `WeightRules.count_classes`.

    None where the arrays could not be that classifier: a file can announce any number in an array without numbers, and a
    classifier of that many would be allocated for it.
    """
    rules, ours = rules_of(model), model.num_classes
    arrays = rules.adopt(model, arrays)
    classes = rules.count_classes(arrays)
    heads = {name: tuple(target.shape) for name, target in model.state_dict().items() if rules.is_head(name)}
    pairs = [(arrays[name].shape, shape) for name, shape in heads.items() if name in arrays]

    def fits(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        return len(stored) == len(shape) and all(
            a == b or _counts_classes(a, classes, b, ours) for a, b in zip(stored, shape)
        )

    if classes and ours and not (all(fits(*pair) for pair in pairs) and any(math.prod(a) > classes for a, _ in pairs)):
        return None
    return classes


def _counts_classes(theirs: int, classes: int, ours: int, own_classes: int) -> bool:
    """Return True for sides that are the same multiple of the two numbers of classes, or one more (the background)."""
    return any(
        theirs == factor * classes + more and ours == factor * own_classes + more
        for factor in (1, BOX_SIDES)
        for more in (0, 1)
    )
