# SPDX-License-Identifier: Apache-2.0
"""Operators in C++ for float32 tensors on the CPU: faster forward and backward passes of the layers of Transformers and gMLP.

They compute what the layers of Paddle compute, to rounding. Matrix products are oneDNN's, from the library in the Paddle
package. Within `bfloat16()` they multiply in bfloat16 with sums in float32, and keep wide intermediate results in bfloat16.
Layers call them where `usable(x)` is true, and Paddle's operators otherwise: on GPUs, in exported programs, without a compiler.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence

import paddle
from paddle import Tensor

from ops.extension import load, run_operator

__all__ = [
    'attention',
    'bfloat16',
    'gated_mlp',
    'in_bfloat16',
    'keep_type',
    'layer_norm',
    'linear',
    'load',
    'mlp',
    'shifted_convs',
    'usable',
]

_half = contextvars.ContextVar('half', default=False)  # of each thread
_CPU = paddle.CPUPlace()


@paddle.jit.not_to_static
def usable(x: Tensor, *parameters: Tensor | None) -> bool:
    """Return whether the operators can compute a layer: in dygraph on the CPU, and the library is there (see `load`).

    Parameters and input are float32. Within `bfloat16()` an input may be in bfloat16, the result of another operator.
    """
    float32 = x.dtype == paddle.float32 or (_half.get() and x.dtype == paddle.bfloat16)
    return (
        float32
        and paddle.in_dynamic_mode()
        and x.place == _CPU  # Paddle's to_static without `full_graph` fails on `is_cpu_place`
        and all(p is None or p.dtype == paddle.float32 for p in parameters)
        and load()
    )


@contextlib.contextmanager
def bfloat16(enabled: bool = True) -> Iterator[None]:
    """Compute in bfloat16 in this block, and in the backward pass of what it computes."""
    token = _half.set(enabled)
    try:
        yield
    finally:
        _half.reset(token)


def in_bfloat16() -> bool:
    """Return whether this code runs within `bfloat16()`."""
    return _half.get()


def keep_type(function: Callable) -> Callable:
    """Return a function that computes in the type of this call wherever it runs, as the recomputation of a block does."""
    half = _half.get()

    @functools.wraps(function)
    def run(*inputs):
        with bfloat16(half):
            return function(*inputs)

    return run


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """Normalize over the last dimension (https://arxiv.org/abs/1607.06450), in float32. [..., C] -> [..., C]."""
    weight = _ones(x.shape[-1]) if weight is None else weight
    return _run('layer_norm', _float32(x), weight, _bias(bias, x.shape[-1]), epsilon)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, half_output: bool = False) -> Tensor:
    """[..., C] -> [..., D], with weights [C, D].

    Args:
        half_output: within `bfloat16()`, return bfloat16 instead of float32.
    """
    half = _half.get()
    return _run('linear', x, weight, _bias(bias, weight.shape[1]), half, half and half_output, not x.stop_gradient)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """Linear, exact GELU, Linear: [..., C] -> [..., D]."""
    bias1, bias2 = _bias(bias1, weight1.shape[1]), _bias(bias2, weight2.shape[1])
    return _run('mlp', x, weight1, bias1, weight2, bias2, _half.get())


def gated_mlp(x: Tensor, *weights: Tensor | None, epsilon: float) -> Tensor:
    """Linear, exact GELU, spatial gating unit, Linear (gMLP, https://arxiv.org/abs/2105.08050): [B, N, C] -> [B, N, C].

    Args:
        weights: weight and bias of the first linear layer, of the LayerNorm of the gate, of the map over the tokens [N, N],
            and of the last linear layer. None: zeros for a bias, ones for the weight of the LayerNorm.
        epsilon: of that LayerNorm.
    """
    w1, b1, scale, shift, spatial, spatial_bias, w2, b2 = weights
    hidden, half = w1.shape[1], w2.shape[0]
    scale = _ones(half) if scale is None else scale
    norm = scale, _bias(shift, half)
    gate = spatial, _bias(spatial_bias, spatial.shape[1])
    return _run('gated_mlp', x, w1, _bias(b1, hidden), *norm, *gate, w2, _bias(b2, w2.shape[1]), epsilon, _half.get())


def attention(qkv: Tensor, num_heads: int, scale: float, key_bias: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T + bias) v: packed queries, keys and values [B, N, 3 C] -> [B, N, C].

    Args:
        key_bias: added to the logits of each key, [B, N]; it gets no gradient.
    """
    return _run('attention', qkv, _zeros(0) if key_bias is None else key_bias, num_heads, scale, _half.get())


def shifted_convs(
    x: Tensor, weight: Tensor, bias: Tensor, dims: Sequence[int], kernels: Sequence[int], shifts: Sequence[int]
) -> Tensor:
    """Sum of two depthwise convolutions of each channel group, one of the map rolled to the right and one of it rolled down.

    Mixing of MS-MLP (https://arxiv.org/abs/2202.06510), with zero padding after the roll: [B, H, W, C] -> [B, H, W, C].

    Args:
        weight: kernels [c, k, k] of both branches for each group in turn, flat and concatenated.
        bias: [C].
        dims, kernels, shifts: channels c, kernel size k (odd) and shift in pixels of each group.
    """
    return _run('shifted_convs', _float32(x), weight, bias, list(dims), list(kernels), list(shifts))


def _run(name: str, x: Tensor, *arguments) -> Tensor:
    """Call an operator; its first output is the result, and the rest is kept for the backward pass.

    Raises:
        ValueError: shapes or types do not fit.
    """
    x = x if x.is_contiguous() else x.contiguous()  # Paddle's stride kernels make views
    if not paddle.is_grad_enabled():  # Paddle would record the operator for the backward pass all the same
        x, *arguments = (a.detach() if isinstance(a, Tensor) and not a.stop_gradient else a for a in (x, *arguments))
    try:
        return run_operator(f'leanvit_{name}', x, *arguments)[0]
    except OSError as error:  # Paddle's class for errors of such operators; its text ends with a line of the C++ code
        raise ValueError(str(error).splitlines()[0]) from None


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype == paddle.float32 else x.astype('float32')


def _bias(bias: Tensor | None, size: int) -> Tensor:
    return _zeros(size) if bias is None else bias


@functools.lru_cache(maxsize=64)
def _zeros(size: int) -> Tensor:
    return paddle.zeros([size], 'float32')


@functools.lru_cache(maxsize=64)
def _ones(size: int) -> Tensor:
    return paddle.ones([size], 'float32')
