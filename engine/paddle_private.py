# SPDX-License-Identifier: Apache-2.0
"""All uses of Paddle's private API (attributes with a leading underscore).

Checked on Paddle 3.3.1. A later version may rename them: run tests/engine/test_paddle_private.py on it first.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import Tensor
from paddle.optimizer import Optimizer


def accumulators(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer state by kind and by automatic parameter name; it is empty before the first step."""
    return dict(optimizer._accumulators)


def accumulator_names(optimizer: Optimizer) -> set[str]:
    """Return the kinds of state that an optimizer may hold, such as `moment1`."""
    return {getattr(optimizer, name) for name in dir(optimizer) if name.endswith('_acc_str')}


def create_accumulators(optimizer: Optimizer, wanted: Callable[[Tensor], bool]) -> None:
    """Create the initial state of the `wanted` parameters, as their first step does."""
    block = paddle.static.default_main_program().global_block()
    for group in optimizer._param_groups:
        parameters = [parameter for parameter in group['params'] if wanted(parameter)]
        optimizer._create_accumulators(block, {**group, 'params': parameters})


class ScaledMomentum(paddle.optimizer.Momentum):
    """SGD with momentum on gradients that a subclass rescales."""

    def scaled(self, weight: Tensor, gradient: Tensor, group: dict) -> Tensor:
        """Return the rescaled gradient.

        Args:
            weight: the parameter.
            group: settings of the parameter group.
        """
        raise NotImplementedError

    def _append_optimize_op(self, block, param_and_grad):
        parameter, gradient = param_and_grad['params']
        gradient = self.scaled(parameter, gradient, param_and_grad)
        return super()._append_optimize_op(block, {**param_and_grad, 'params': (parameter, gradient)})


class LossScaler(paddle.amp.GradScaler):
    """Dynamic loss scaling; one read of the device per step (`found_inf`).

    Paddle's update prints on every rank, and converts a tensor of shape [1] by `float`, which numpy 2.4 refuses.
    """

    def _update(self):
        overflow = bool(self._cache_found_inf)
        self._decr_count = self._decr_count + 1 if overflow else 0
        self._incr_count = 0 if overflow else self._incr_count + 1
        if self._decr_count == self._decr_every_n_nan_or_inf:
            self._scale, self._decr_count = self._scale * self._decr_ratio, 0
        if self._incr_count == self._incr_every_n_steps:
            self._scale, self._incr_count = self._scale * self._incr_ratio, 0
