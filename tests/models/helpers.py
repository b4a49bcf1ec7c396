# SPDX-License-Identifier: Apache-2.0
"""Upstream PyTorch arrays into our layers, as the weight converter does it."""

import paddle
from paddle import nn


def linear_weights(layer: nn.Layer) -> set[str]:
    """Names of the weights that PyTorch stores transposed."""
    return {
        f'{name}.weight'.lstrip('.')
        for name, part in layer.named_sublayers(include_self=True)
        if isinstance(part, nn.Linear)
    }


def to_ours(layer: nn.Layer, arrays: dict) -> dict:
    """Renames with the layer's `upstream_name`, where it has one, and transposes the weights of linear layers."""
    rename = getattr(layer, 'upstream_name', lambda name: name)
    arrays = {rename(name): array for name, array in arrays.items()}
    transposed = linear_weights(layer)
    return {name: array.T if name in transposed else array for name, array in arrays.items()}


def load(layer: nn.Layer, arrays: dict) -> nn.Layer:
    """Loads upstream arrays; every name and shape must fit."""
    arrays = to_ours(layer, arrays)
    shapes = {name: list(value.shape) for name, value in layer.state_dict().items()}
    assert {name: list(a.shape) for name, a in arrays.items()} == shapes
    layer.set_state_dict({name: paddle.to_tensor(a) for name, a in arrays.items()})
    return layer
