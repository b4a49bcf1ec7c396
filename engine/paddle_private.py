# SPDX-License-Identifier: Apache-2.0
"""All uses of Paddle's private API (attributes with a leading underscore).

Checked on Paddle 3.3.1. A later version may rename them: run tests/engine/test_paddle_private.py on it first.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import Tensor
from paddle.optimizer import Optimizer

MASTER_WEIGHT = 'master_weight'  # kind of the float32 copies of weights in half precision


def accumulators(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer state by kind and by automatic parameter name; it is empty before the first step."""
    state = dict(optimizer._accumulators)
    master = getattr(optimizer, '_master_weights', None)
    return {**state, MASTER_WEIGHT: master} if master else state


def accumulator_names(optimizer: Optimizer) -> set[str]:
    """Return the kinds of state that an optimizer may hold, such as `moment1`."""
    return {MASTER_WEIGHT, *(getattr(optimizer, name) for name in dir(optimizer) if name.endswith('_acc_str'))}


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
            weight: the master weight in float32, or the parameter itself if there is none.
            group: settings of the parameter group.
        """
        raise NotImplementedError

    def _append_optimize_op(self, block, param_and_grad):
        parameter, gradient = param_and_grad['params']
        weight = self._master_weights.get(parameter.name, parameter)
        gradient = self.scaled(weight, gradient, param_and_grad)
        return super()._append_optimize_op(block, {**param_and_grad, 'params': (parameter, gradient)})
