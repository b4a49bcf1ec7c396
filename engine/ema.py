# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import paddle

from datasets.device import on_gpu
from engine.precision import MasterWeights
from models.weights.match import STATISTICS_SUFFIXES


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
        self.average = {name: value.astype('float32').clone() for name, value in state.items()}
        parameters = {name for name, _ in model.named_parameters()}
        self._copied = [n for n in self.average if n not in parameters and not n.endswith(STATISTICS_SUFFIXES)]
        self._averaged = [(self.average[name], state[name]) for name in self.average if name not in self._copied]

    @paddle.no_grad()
    def update(self) -> None:
        """Update the averages with the current weights."""
        for average, value in self._averaged:
            if on_gpu():  # one operation instead of three; the last bits differ
                average.lerp_(value, 1.0 - self.decay)
            else:
                average.scale_(self.decay)
                average.add_(value * (1.0 - self.decay))
        state = self.model.state_dict() if self._copied else {}
        for name in self._copied:
            paddle.assign(state[name].astype('float32'), self.average[name])

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

    def state_dict(self) -> dict[str, paddle.Tensor]:
        return self.average

    def set_state_dict(self, state: dict) -> None:
        """Load averages from a checkpoint; the caller has checked names and shapes."""
        for name, value in state.items():
            tensor = value if isinstance(value, paddle.Tensor) else paddle.to_tensor(value)
            self.average[name].set_value(tensor.astype('float32'))

    @staticmethod
    def _write(state: dict, values: dict) -> None:
        for name, value in state.items():
            value.set_value(values[name].astype(value.dtype))
