# SPDX-License-Identifier: Apache-2.0
"""In-place parameter initializers that the published models were trained with."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import initializer

# Standard deviation of a unit normal distribution truncated at +-2.
_TRUNCATED_STD = 0.87962566103423978

_without_values = contextvars.ContextVar('without_values', default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Create parameters without values in this block, for models of which only the shapes are needed: five times as fast."""
    token = _without_values.set(True)
    try:
        with paddle.LazyGuard():
            yield
    finally:
        _without_values.reset(token)


def trunc_normal_(parameter: Tensor, std: float = 0.02) -> None:
    """Initialize from a normal distribution truncated at the absolute values +-2 (timm; no effect for small `std`)."""
    initializer.TruncatedNormal(std=std, a=-2.0, b=2.0)(parameter)


def lecun_normal_(conv: nn.Conv2D) -> None:
    """Initialize the weight by a normal distribution truncated at two sigma, with variance 1 / fan_in; the bias by 0."""
    std = math.sqrt(1.0 / fan_in(conv)) / _TRUNCATED_STD
    initializer.TruncatedNormal(std=std, a=-2 * std, b=2 * std)(conv.weight)
    initializer.Constant(0.0)(conv.bias)


def torch_conv_(conv: nn.Conv2D) -> None:
    """Initialize weight and bias uniformly in +-sqrt(1 / fan_in), PyTorch's default, which DeiT keeps."""
    bound = math.sqrt(1.0 / fan_in(conv))
    for parameter in filter(lambda values: values is not None, (conv.weight, conv.bias)):
        initializer.Uniform(-bound, bound)(parameter)


def xavier_uniform_(linear: nn.Linear, bias_std: float = 0.0) -> None:
    """Initialize the weight uniformly in +-sqrt(6 / (in + out)), a bias by a normal distribution with `bias_std`."""
    initializer.XavierUniform()(linear.weight)
    if linear.bias is not None:
        initializer.Normal(std=bias_std)(linear.bias) if bias_std else initializer.Constant(0.0)(linear.bias)


def init_linear_(layer: nn.Layer) -> None:
    """Initialize a linear layer as Vision Transformers do: weights by `trunc_normal_`, zero biases; skip other layers."""
    if isinstance(layer, nn.Linear):
        trunc_normal_(layer.weight)
        if layer.bias is not None:
            initializer.Constant(0.0)(layer.bias)


def scale_(parameter: Tensor, factor: float) -> None:
    """Multiply a parameter by a number."""
    if not _without_values.get():
        parameter.set_value(parameter * factor)


def copy_(parameter: Tensor, source: Tensor) -> None:
    """Copy the values of another parameter."""
    if not _without_values.get():
        parameter.set_value(source)


def fix_(parameter: Tensor, values: np.ndarray) -> None:
    """Set a parameter and freeze it: it is part of the state dict, but not trained."""
    parameter.set_value(values)
    parameter.stop_gradient = True


def fan_in(conv: nn.Conv2D) -> int:
    """Return the number of inputs of each output."""
    return math.prod(conv.weight.shape[1:])
