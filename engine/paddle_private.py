# SPDX-License-Identifier: Apache-2.0
"""All use of Paddle's private API: attributes of its objects that begin with an underscore.

Checked on Paddle 3.3.1. A later version may rename any of it: run tests/engine/test_paddle_private.py on it first.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import Tensor
from paddle.optimizer import Optimizer

MASTER_WEIGHT = 'master_weight'  # kind of the float32 copies of weights in half precision


def accumulators(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """State of an optimizer by kind and by Paddle's automatic name of the parameter. It is empty before the first step."""
    state = dict(optimizer._accumulators)
    master = getattr(optimizer, '_master_weights', None)
    return {**state, MASTER_WEIGHT: master} if master else state


def accumulator_names(optimizer: Optimizer) -> set[str]:
    """The kinds of state that an optimizer may keep, such as `moment1`."""
    return {MASTER_WEIGHT, *(getattr(optimizer, name) for name in dir(optimizer) if name.endswith('_acc_str'))}


def create_accumulators(optimizer: Optimizer, wanted: Callable[[Tensor], bool]) -> None:
    """Create the initial state of the parameters that are `wanted`, as their first step would."""
    block = paddle.static.default_main_program().global_block()
    for group in optimizer._param_groups:
        parameters = [parameter for parameter in group['params'] if wanted(parameter)]
        optimizer._create_accumulators(block, {**group, 'params': parameters})


class ScaledMomentum(paddle.optimizer.Momentum):
    """Momentum on gradients that a subclass changes."""

    def scaled(self, weight: Tensor, gradient: Tensor, group: dict) -> Tensor:
        """The gradient to step with.

        Args:
            weight: in float32 where master weights are kept, else as the model has it.
            group: settings of the parameter group.
        """
        raise NotImplementedError

    def _append_optimize_op(self, block, param_and_grad):
        parameter, gradient = param_and_grad['params']
        weight = self._master_weights.get(parameter.name, parameter)
        gradient = self.scaled(weight, gradient, param_and_grad)
        return super()._append_optimize_op(block, {**param_and_grad, 'params': (parameter, gradient)})
