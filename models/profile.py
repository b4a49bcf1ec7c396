# SPDX-License-Identifier: Apache-2.0
"""Count parameters and multiply-accumulates (MACs) of a model without running it.

The model is traced to Paddle's intermediate representation (PIR), in which every operator has static shapes. Only the
multiplications of convolutions, linear layers and matrix products count, as in the papers; normalization, activations,
softmax, additions and data movement do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import paddle
from paddle import nn

from models.layers import ToMeReducer, shapes_only
from models.registry import build_model
from utils.errors import UserError

# Operators that may take a parameter of two or more dimensions: sums, elementwise products and data movement.
_FREE = {
    f'pd_op.{name}'
    for name in (
        'add', 'cast', 'concat', 'divide', 'expand', 'expand_as', 'flatten', 'gather', 'gather_nd', 'index_select',
        'multiply', 'reshape', 'roll', 'share_data_', 'slice', 'split', 'split_with_num', 'squeeze', 'stack',
        'strided_slice', 'subtract', 'tile', 'transpose', 'unsqueeze', 'unbind', 'bicubic_interp', 'bilinear_interp',
    )
} | {'builtin.combine'}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """Cost of one forward pass.

    Attributes:
        params: number of parameters, buffers not included.
        macs: MACs of the batch.
        by_kind: `macs` split into 'conv', 'linear' (one factor is a parameter) and 'matmul' (no factor is).
        matching: MACs of the token matching of ToMe; not part of `macs`, as in its paper.
    """

    params: int
    macs: int
    by_kind: dict[str, int]
    matching: int = 0


class UncountedOperator(UserError, NotImplementedError):
    """A model uses an operator whose MACs are unknown; a wrong count would be worse."""


def profile(model: nn.Layer, input_shape: Sequence[int] = (1, 3, 224, 224)) -> Profile:
    """Count parameters, and the MACs of a forward pass in evaluation mode for `input_shape` [B, C, H, W].

    Raises:
        UncountedOperator: the model uses an operator with multiplications that this function cannot count.
    """
    training = model.training
    model.eval()
    try:
        program = _trace(model, input_shape)
    finally:
        model.train() if training else model.eval()
    by_kind = dict.fromkeys(('conv', 'linear', 'matmul', 'matching'), 0)
    for op in program.global_block().ops:
        count = _COUNTERS.get(op.name())
        if count is None:
            _check_free(op)
        else:
            kind, macs = count(op)
            by_kind['matching' if _owner(op) == ToMeReducer.__name__ else kind] += macs
    params = sum(math.prod(p.shape) for p in model.parameters())
    matching = by_kind.pop('matching')
    return Profile(params, sum(by_kind.values()), by_kind, matching)


def profile_config(config, input_shape: Sequence[int]) -> Profile:
    """Count those of the model of a configuration, which is built without initial weights; see `profile`."""
    with shapes_only():
        model = build_model(config)
    return profile(model, input_shape)


def _trace(model: nn.Layer, input_shape: Sequence[int]):
    # All shapes are static, so that control flow needs no conversion.
    forward = paddle.jit.not_to_static(lambda x: model(x))

    def run(x):
        return forward(x)

    spec = [paddle.static.InputSpec(list(input_shape), 'float32')]
    return paddle.jit.to_static(run, input_spec=spec, full_graph=True).concrete_program.main_program


def _owner(op) -> str:
    """Return the class name of the layer that created an operator."""
    return op.attrs().get('struct_name', '').rstrip('/').rpartition('/')[2]


def _shapes(op) -> list[list[int]]:
    return [list(value.shape) for value in op.operands_source()]


def _size(op) -> int:
    return math.prod(op.results()[0].shape)


def _conv(op) -> tuple[str, int]:
    """Count: each output value is a sum over [in / groups, kh, kw]."""
    return 'conv', _size(op) * math.prod(_shapes(op)[1][1:])


def _conv_transpose(op) -> tuple[str, int]:
    """Count: each input value is multiplied by [out / groups, kh, kw]."""
    x, weight = _shapes(op)[:2]
    return 'conv', math.prod(x) * math.prod(weight[1:])


def _matmul(op) -> tuple[str, int]:
    """Count: each output value is a sum over the shared axis of the factors."""
    x = _shapes(op)[0]
    shared = x[-2] if op.attrs().get('transpose_x') and len(x) > 1 else x[-1]
    return 'linear' if any(map(_is_parameter, op.operands_source()[:2])) else 'matmul', _size(op) * shared


def _attention(op) -> tuple[str, int]:
    """Count both matrix products of fused attention, q [B, N, H, d] and k, v [B, M, H, d]."""
    q, k = _shapes(op)[:2]
    return 'matmul', 2 * math.prod(q) * k[1]


def _unknown(op):
    raise UncountedOperator(f'cannot count the multiplications of {op.name()}; use a matmul instead.')


def _check_free(op) -> None:
    """Raise UncountedOperator if an operator that is not counted may multiply a matrix or a larger parameter."""
    if op.name() not in _FREE and any(_is_parameter(value) and len(value.shape) > 1 for value in op.operands_source()):
        _unknown(op)


def _is_parameter(value) -> bool:
    """Return whether a value is a parameter, possibly transposed, reshaped or cast."""
    op = value.get_defining_op()
    while op is not None and op.name() in ('pd_op.transpose', 'pd_op.reshape', 'pd_op.cast', 'pd_op.unsqueeze'):
        op = op.operands_source()[0].get_defining_op()
    return op is not None and op.name() == 'builtin.parameter'


_COUNTERS = {
    'pd_op.conv2d': _conv,
    'pd_op.depthwise_conv2d': _conv,
    'pd_op.conv2d_transpose': _conv_transpose,
    'pd_op.matmul': _matmul,
    'pd_op.linear_v2': _matmul,  # `F.linear` with a bias, on GPU builds
    'pd_op.bmm': _matmul,
    'pd_op.flash_attn': _attention,
    'pd_op.memory_efficient_attention': _attention,
    **dict.fromkeys(('pd_op.einsum', 'pd_op.addmm', 'pd_op.baddbmm', 'pd_op.conv3d', 'pd_op.bilinear'), _unknown),
}
