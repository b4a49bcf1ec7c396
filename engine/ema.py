# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import paddle
from paddle import Tensor

from engine.precision import MasterWeights
from models.weights.match import STATISTICS_SUFFIXES
from utils import device


class ModelEma:
    """EMA of the weights after each optimizer step: average <- decay * average + (1 - decay) * weight (timm's ModelEmaV2).

    Parameters and the statistics of normalization layers are averaged in float32. Other buffers, such as index tables and
    the weight of the decaying attention, are copied. Create it after pretrained weights are loaded.

    Args:
        weights: float32 weights of `model`; None: the model's own.
    """

    def __init__(self, model: paddle.nn.Layer, decay: float, weights: MasterWeights | None = None):
        self.model = model
        self.decay = decay
        self.weights = model if weights is None else weights
        state = self.weights.state_dict()
        parameters = {name for name, _ in model.named_parameters()}
        averaged = {n: value for n, value in state.items() if n in parameters or n.endswith(STATISTICS_SUFFIXES)}
        self._order = list(state)
        self._copied = {name: _float32(value).clone() for name, value in state.items() if name not in averaged}
        self._averages = (_Joined if device.on_gpu() else _Separate)(averaged)

    @property
    def average(self) -> dict[str, Tensor]:
        """The averages by name."""
        values = {**self._averages.values(), **self._copied}
        return {name: values[name] for name in self._order}

    @paddle.no_grad()
    def update(self) -> None:
        """Update the averages with the current weights."""
        self._averages.update(self.decay)
        state = self.model.state_dict() if self._copied else {}
        for name, value in self._copied.items():
            paddle.assign(state[name].astype('float32'), value)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Load the averages into the model for the block, then restore its own weights."""
        state = self.model.state_dict()
        kept = {name: value.clone() for name, value in state.items()}
        self._write(state, self.average)
        try:
            yield
        finally:
            self._write(state, kept)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    @paddle.no_grad()
    def set_state_dict(self, state: dict) -> None:
        """Load averages from a checkpoint; the caller has checked names and shapes."""
        tensors = {n: value if isinstance(value, Tensor) else paddle.to_tensor(value) for n, value in state.items()}
        tensors = {name: value.astype('float32') for name, value in tensors.items()}
        for name in self._copied.keys() & tensors.keys():
            self._copied[name].set_value(tensors.pop(name))
        self._averages.set(tensors)

    @staticmethod
    def _write(state: dict, values: dict) -> None:
        for name, value in state.items():
            value.set_value(values[name].astype(value.dtype))


class _Separate:
    """Averages of weights, each updated by operations of its own.

    Args:
        weights: tensors by name, which the optimizer changes in place.
    """

    def __init__(self, weights: dict[str, Tensor]):
        self._weights = weights
        self._average = {name: _float32(value).clone() for name, value in weights.items()}

    def values(self) -> dict[str, Tensor]:
        return self._average

    def set(self, values: dict[str, Tensor]) -> None:
        """Replace the averages of some names."""
        for name, value in values.items():
            self._average[name].set_value(value)

    def update(self, decay: float) -> None:
        for name, average in self._average.items():
            average.scale_(decay)
            average.add_(self._weights[name] * (1.0 - decay))


class _Joined:
    """The same in one tensor, updated by two operations instead of three per weight. The last bits differ.

    `Tensor.lerp_` with a number would copy it from the host each time, and wait.
    """

    def __init__(self, weights: dict[str, Tensor]):
        self._weights = weights
        self._average = _joined(list(weights.values()))
        self._step: tuple[float, Tensor] | None = None  # (1 - decay), also as a tensor

    def values(self) -> dict[str, Tensor]:
        parts = self._average.split([math.prod(value.shape) for value in self._weights.values()])
        return {name: part.reshape(value.shape) for part, (name, value) in zip(parts, self._weights.items())}

    def set(self, values: dict[str, Tensor]) -> None:
        """Replace the averages of some names."""
        self._average = _joined(list({**self.values(), **values}.values()))

    def update(self, decay: float) -> None:
        if self._step is None or self._step[0] != 1.0 - decay:
            self._step = 1.0 - decay, paddle.full([1], 1.0 - decay)
        self._average.lerp_(_joined(list(self._weights.values())), self._step[1])


def _joined(values: list[Tensor]) -> Tensor:
    """Concatenate tensors of any shapes -> [number of values] float32."""
    return paddle.concat([_float32(value).flatten() for value in values])


def _float32(value: Tensor) -> Tensor:
    return value if value.dtype == paddle.float32 else value.astype('float32')
