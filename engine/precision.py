# SPDX-License-Identifier: Apache-2.0
"""Mixed precision (AMP): autocast, loss scaling and float32 master weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import numpy as np
import paddle
from paddle import Tensor, nn

import ops
from engine.distributed import Context
from engine.paddle_private import LossScaler
from models.layers.batch_norm import SyncBatchNorm
from utils.environment import has_bfloat16
from utils.errors import UserError


class Precision:
    """Precision of forward and backward passes: float32, or mixed precision (AMP).

    On a GPU AMP_LEVEL and AMP_DTYPE apply. On a CPU with bfloat16 instructions, the operators of `ops` compute in bfloat16 in
    training; weights, gradients and the residual stream are in float32.

    Attributes:
        enabled: True in mixed precision on a GPU.
        half_operators: True in mixed precision on a CPU.
        scaler: loss scaling; off unless AMP_DTYPE is float16, on a GPU.

    Raises:
        UserError: the GPU does not support AMP_DTYPE.
    """

    def __init__(self, config, on_gpu: bool):
        self.enabled = config.AMP and on_gpu
        self.half_operators = config.AMP and not on_gpu and cpu_obstacle() is None
        self.options = {'level': config.AMP_LEVEL, 'dtype': config.AMP_DTYPE}
        if self.enabled:
            _check_support(config.AMP_DTYPE)
        self.scaler = LossScaler(enable=self.enabled and config.AMP_DTYPE == 'float16')

    @property
    def is_mixed(self) -> bool:
        """True in mixed precision, on any device."""
        return self.enabled or self.half_operators

    @property
    def half_weights(self) -> bool:
        """True if parameters are in half precision (AMP_LEVEL O2)."""
        return self.enabled and self.options['level'] == 'O2'

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context of a training pass."""
        return paddle.amp.auto_cast(**self.options) if self.enabled else ops.bfloat16(self.half_operators)

    def evaluation(self) -> contextlib.AbstractContextManager:
        """Return the context of an evaluation: float32, unless the weights are in half precision."""
        return self.autocast() if self.half_weights else contextlib.nullcontext()

    def cast(self, model: nn.Layer) -> None:
        """Cast the parameters of a model to half precision at level O2, without those of normalization that need float32."""
        if self.half_weights:
            paddle.amp.decorate(model, **self.options, excluded_layers=[SyncBatchNorm])

    def check_loss_scale(self) -> None:
        """Raise UserError if float16 overflows at every step."""
        if self.scaler.is_enable() and self.scaler.state_dict()['scale'].item() < 1.0:
            raise UserError('the loss scale fell below 1: float16 overflows at every step. Use AMP_DTYPE bfloat16.')


def cpu_obstacle() -> str | None:
    """Return why there is no mixed precision on this CPU; None: there is."""
    if not has_bfloat16():
        return 'this processor has no instructions for bfloat16 (avx512_bf16, amx_bf16)'
    return None if ops.load() else 'the operators in C++ are not there (see docs/install.md)'


def describe_cpu_precision() -> str:
    """Return what AMP does on this CPU."""
    obstacle = cpu_obstacle()
    return f'float32, since {obstacle}' if obstacle else 'bfloat16 products and float32 weights'


def _check_support(dtype: str) -> None:
    """Raise UserError if the GPU lacks a half-precision type: Paddle would train in float32 with only a warning."""
    supported = {'bfloat16': paddle.amp.is_bfloat16_supported, 'float16': paddle.amp.is_float16_supported}
    if not supported[dtype]():
        needed, other = ('8.0', 'AMP_DTYPE to float16') if dtype == 'bfloat16' else ('7.0', 'AMP to False')
        raise UserError(
            f'AMP_DTYPE is {dtype}, but this GPU does not support it (compute capability {needed} or higher is needed): '
            f'set {other}.'
        )


class MasterWeights:
    """Float32 weights of a model, which optimizer, EMA and checkpoints use.

    They are the parameters themselves, except for parameters that `Precision.cast` casts to half precision (level O2).
    Those have float32 copies with their names, so a checkpoint does not depend on the level. Gradients are accumulated,
    averaged over the ranks and clipped in float32.

    Attributes:
        model: the model, cast by this class.
        parameters: structured name -> float32 parameter.
        has_copies: True at level O2; then this class averages gradients, and not DataParallel.
    """

    def __init__(self, model: nn.Layer, precision: Precision):
        self.model = model
        exact = {name: parameter.clone() for name, parameter in model.named_parameters() if precision.half_weights}
        precision.cast(model)
        self.parameters: dict[str, Tensor] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        for name, parameter in model.named_parameters():
            self.parameters[name] = parameter
            if parameter.dtype in (paddle.float16, paddle.bfloat16):
                self.parameters[name] = _float32_copy(parameter, exact[name])
                self._copies.append((parameter, self.parameters[name]))

    @property
    def has_copies(self) -> bool:
        return bool(self._copies)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's state dict with the float32 weights."""
        return {**self.model.state_dict(), **self.parameters}

    @paddle.no_grad()
    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the copies from the arrays that were loaded into the model."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for _, copy in self._copies:
            if names[id(copy)] in arrays:
                copy.set_value(arrays[names[id(copy)]].astype('float32'))

    @paddle.no_grad()
    def collect_gradients(self) -> None:
        """Add the gradients of a micro-batch to those of the copies."""
        for parameter, copy in self._copies:
            if parameter.grad is None:
                continue
            gradient = parameter.grad.astype('float32')
            if copy.grad is None:
                copy.grad_ = gradient  # assigning to `grad` would copy it, and wait
            else:
                copy.grad.add_(gradient)
            parameter.clear_gradient(set_to_zero=False)

    def average_gradients(self, context: Context) -> None:
        """Average the gradients over the ranks, if there are copies."""
        if self._copies:
            context.average([p.grad for p in self.parameters.values() if p.grad is not None])

    @paddle.no_grad()
    def publish(self) -> None:
        """Cast the copies to the parameters of the model, after an optimizer step."""
        for parameter, copy in self._copies:
            paddle.assign(copy.astype(parameter.dtype), parameter)


def _float32_copy(parameter: Tensor, exact: Tensor) -> Tensor:
    """Return a float32 parameter with the value `exact` and the name and attributes of `parameter`."""
    copy = paddle.create_parameter(parameter.shape, 'float32', default_initializer=nn.initializer.Constant(0.0))
    copy.set_value(exact)
    copy.name = parameter.name
    copy.stop_gradient = parameter.stop_gradient
    copy.optimize_attr = parameter.optimize_attr
    return copy
