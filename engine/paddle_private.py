# SPDX-License-Identifier: Apache-2.0
"""Uses of Paddle's private API (attributes with a leading underscore).

models/paddle_private.py and ops/extension.py have the others.

Checked on Paddle 3.3.1. A later version may rename them: run tests/engine/test_paddle_private.py on it first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import paddle
from paddle import Tensor
from paddle.optimizer import Optimizer

from engine.flat import Layout
from utils import device

OPERATORS = paddle._C_ops
# Operators that let the host wait for a GPU: their result has as many values as their arguments say; `roi_align` reads its
# numbers of regions, if they are a tensor.
WAITING = ('nonzero', 'masked_select', 'unique', 'unique_consecutive', 'bincount', 'nms', 'roi_align')


def accumulators(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer state by kind and by automatic parameter name; it is empty before the first step."""
    if isinstance(optimizer, FusedLamb):
        optimizer.store_powers()
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


class _Fused:
    """Part of optimizers that update all parameters of a group together."""

    def _ready(self, group: dict) -> bool:
        """Create the state of the parameters; return False if there is nothing to update, as after an overflow."""
        overflow = bool(self._get_auxiliary_var('found_inf'))
        self._set_auxiliary_var('found_inf', overflow)  # GradScaler reads it; the other groups need not read the device
        if overflow or not group['params']:
            return False
        self._create_global_learning_rate()
        block = paddle.static.default_main_program().global_block()
        self._create_accumulators(block, {**group, 'params': [parameter for parameter, _ in group['params']]})
        return True

    def _state(self, kind: str, parameter: Tensor) -> Tensor:
        return self._accumulators[kind][parameter.name]

    def _layout(self, parameters: list[Tensor]) -> Layout:
        """Return the layout of parameters, which is built once; some may have no gradient in some steps."""
        names = tuple(parameter.name for parameter in parameters)
        if names not in self._layouts:
            self._layouts[names] = Layout(parameters)
        return self._layouts[names]


class FusedMomentum(_Fused, paddle.optimizer.Momentum):
    """SGD with momentum on gradients that a subclass may rescale.

    On a GPU about twenty operations update all parameters of a group, and the last bits differ from those of a CPU. There
    Paddle's operator updates one parameter after the other.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def scaled(self, weight: Tensor, gradient: Tensor, group: dict) -> Tensor:
        """Return the rescaled gradient.

        Args:
            weight: the parameter.
            group: settings of the parameter group.
        """
        return gradient

    def all_scaled(self, layout: Layout, weights: Tensor, gradients: Tensor, group: dict) -> Tensor:
        """Return all rescaled gradients of a group; weights, gradients and result are matrices of the layout."""
        return gradients

    def _append_optimize_op(self, block, param_and_grad):
        parameter, gradient = param_and_grad['params']
        gradient = self.scaled(parameter, gradient, param_and_grad)
        return super()._append_optimize_op(block, {**param_and_grad, 'params': (parameter, gradient)})

    def _create_optimization_pass(self, group, param_group_idx=0):
        if not device.on_gpu():
            return super()._create_optimization_pass(group, param_group_idx)
        if self._ready(group):
            self._update(*map(list, zip(*group['params'])), group)
        return []

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], group: dict) -> None:
        layout = self._layout(parameters)
        weights, joined = layout.join(parameters), layout.join(gradients)
        if group['regularization_method'] == 'l2_decay':
            joined = joined + group['regularization_coeff'] * weights
        joined = self.all_scaled(layout, weights, joined, group)
        velocities = [self._state('velocity', parameter) for parameter in parameters]
        rate = self._create_param_lr((parameters[0], gradients[0]))
        if not self._use_nesterov:
            _momentum(parameters, layout.split(joined), velocities, rate, self._momentum)
            return
        _momentum(parameters, layout.split(joined), velocities, paddle.zeros_like(rate), self._momentum)
        joined = joined + self._momentum * layout.join(velocities)
        _momentum(parameters, layout.split(joined), layout.split(paddle.zeros_like(joined)), rate, 0.0)


def _momentum(
    parameters: list[Tensor], gradients: list[Tensor], velocities: list[Tensor], rate: Tensor, momentum: float
) -> None:
    """Set v to momentum * v + g and w to w - rate * v, for all w of `parameters`; 110 of them per launch."""
    no_master_weights, nesterov, no_decay, half = None, False, [], False
    paddle._C_ops.merged_momentum_(
        parameters, gradients, velocities, [rate], no_master_weights, momentum, nesterov, no_decay, no_decay, half, 1.0
    )


_POWERS = 'beta1_pow_acc', 'beta2_pow_acc'


class _Aged(_Fused):
    """Part of optimizers with a bias correction: parameters with different numbers of steps are updated separately.

    They occur where a parameter has no gradient in some steps. The powers of the betas are known on the host.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self._powers: dict[str, tuple[np.float32, np.float32]] = {}  # of the next step, by name of the parameter

    def _cohorts(self, group: dict) -> list[tuple[tuple[np.float32, np.float32], list[Tensor], list[Tensor]]]:
        """Return (powers, parameters, gradients) of each age, and count a step."""
        cohorts: dict[tuple[np.float32, np.float32], list] = {}
        for parameter, gradient in group['params']:
            powers = self._powers.get(parameter.name) or tuple(
                np.float32(self._state(kind, parameter).item()) for kind in _POWERS
            )
            cohorts.setdefault(powers, []).append((parameter, gradient))
        betas = np.float32(self._beta1), np.float32(self._beta2)
        for powers, pairs in cohorts.items():
            following = tuple(power * beta for power, beta in zip(powers, betas))
            self._powers.update((parameter.name, following) for parameter, _ in pairs)
        return [(powers, *map(list, zip(*pairs))) for powers, pairs in cohorts.items()]


class FusedAdamW(_Aged, paddle.optimizer.AdamW):
    """AdamW that updates all parameters of a group by one operation; on the CPU with the bits of Paddle's AdamW."""

    def _create_optimization_pass(self, group, param_group_idx=0):
        if self._ready(group):
            for _, parameters, gradients in self._cohorts(group):
                self._update(parameters, gradients)
        return []

    def _update(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        kinds = 'moment1', 'moment2', *_POWERS
        moment1, moment2, pow1, pow2 = ([self._state(kind, parameter) for parameter in parameters] for kind in kinds)
        no_maxima = no_master_weights = never_skip = None
        no_half_precision = no_global_pow = no_amsgrad = False
        paddle._C_ops.fused_adam_(
            parameters, gradients, self._create_param_lr((parameters[0], gradients[0])), moment1, moment2, no_maxima, pow1, pow2,
            no_master_weights, never_skip, self._beta1, self._beta2, self._epsilon, _CHUNK, float(self._weight_decay), True,
            no_half_precision, no_global_pow, no_amsgrad,
        )  # fmt: skip


_CHUNK = 32768  # values per block of a GPU


class FusedLamb(_Aged, paddle.optimizer.Lamb):
    """Lamb (https://arxiv.org/abs/1904.00962).

    On a GPU about fifty operations update all parameters of a group, and the last bits differ from those of a CPU. There
    Paddle's operator updates one parameter after the other. As in Paddle, the trust ratio is 1 without weight decay.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def store_powers(self) -> None:
        """Set the powers of the betas in the state; `_update` does not, since each would take an operation."""
        for name, powers in self._powers.items():
            for kind, power in zip(_POWERS, powers):
                target = self._accumulators[kind][name]
                target.set_value(paddle.to_tensor([power.item()], target.dtype, place=target.place))

    def _create_optimization_pass(self, group, param_group_idx=0):
        if not device.on_gpu():
            return super()._create_optimization_pass(group, param_group_idx)
        if self._ready(group):
            for powers, parameters, gradients in self._cohorts(group):
                self._update(powers, parameters, gradients)
        return []

    def _update(self, powers: Sequence[np.float32], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        layout, rate = self._layout(parameters), self._create_param_lr((parameters[0], gradients[0]))
        weights, joined = layout.join(parameters), layout.join(gradients)
        unbiased, powered = [], (joined, paddle.square(joined))
        for kind, beta, power, values in zip(('moment1', 'moment2'), (self._beta1, self._beta2), powers, powered):
            moments, beta = [self._state(kind, parameter) for parameter in parameters], float(np.float32(beta))
            _momentum(parameters, layout.split(values * (1.0 - beta)), moments, paddle.zeros_like(rate), beta)
            unbiased.append(layout.join(moments) / (1.0 - float(power)))
        steps = unbiased[0] / (paddle.sqrt(unbiased[1]) + self._epsilon)
        if self._lamb_weight_decay > 0:
            steps = steps + self._lamb_weight_decay * weights
            sizes, lengths = layout.norms(weights), layout.norms(steps)
            both = paddle.logical_and(sizes > 0, lengths > 0)
            steps = steps * layout.spread(paddle.where(both, sizes / lengths, paddle.ones_like(sizes)))
        _momentum(parameters, layout.split(steps), layout.split(paddle.zeros_like(steps)), rate, 0.0)


def squared_norm(tensor: Tensor) -> Tensor:
    """Return the sum of squares as a tensor [1], by one operation."""
    return paddle._C_ops.squared_l2_norm(tensor)


def divide_all(tensors: list[Tensor], divisor: Tensor) -> None:
    """Divide tensors of one type by a 0-D tensor in place, by one operation (that of GradScaler)."""
    paddle._C_ops.check_finite_and_unscale_(tensors, divisor.reshape([1]))


class KeyValueStore:
    """A connection of its own to the key-value store of the process group, which rank 0 serves. Waits until the store is there."""

    def __init__(self):
        address = ':'.join(filter(None, (os.environ.get(name) for name in ('MASTER_ADDR', 'MASTER_PORT'))))
        if ':' not in address:
            address = os.environ.get('PADDLE_MASTER') or os.environ['PADDLE_TRAINER_ENDPOINTS'].partition(',')[0]
        host, _, port = address.rpartition(':')
        serves, waits_for = False, 0  # no other clients
        self._store = paddle.base.core.TCPStore(host, int(port), serves, waits_for, _CONNECT)

    def add(self, name: str, value: int) -> int:
        """Add to the number of a name, at first 0, and return the sum. Other threads run meanwhile.

        Raises:
            ValueError: the store has ended.
        """
        return self._store.add(name, value)


_CONNECT = 3600  # seconds


class LossScaler(paddle.amp.GradScaler):
    """Dynamic loss scaling; one read of the device per step (`found_inf`).

    Paddle's update prints on every rank, and converts a tensor of shape [1] by `float`, which numpy 2.4 refuses.
    """

    @property
    def factor(self) -> Tensor | None:
        """The factor of the loss, a 0-D tensor that need not be read; None: no loss scaling."""
        return self._scale.squeeze(0) if self.is_enable() else None

    def _update(self):
        overflow = bool(self._cache_found_inf)
        self._decr_count = self._decr_count + 1 if overflow else 0
        self._incr_count = 0 if overflow else self._incr_count + 1
        if self._decr_count == self._decr_every_n_nan_or_inf:
            self._scale, self._decr_count = self._scale * self._decr_ratio, 0
        if self._incr_count == self._incr_every_n_steps:
            self._scale, self._incr_count = self._scale * self._incr_ratio, 0
