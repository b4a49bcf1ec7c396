# SPDX-License-Identifier: Apache-2.0
"""Checks of exported programs before Paddle loads them: PREFIX.json, the program, and PREFIX.pdiparams, its weights.

Paddle trusts both: it allocates what a weight file announces, and runs every operator, also those that write files. Its
earlier format (.pdmodel) comes with a file that Paddle unpickles, which can run any code.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from typing import IO, Any

from utils.files import open_regular, read_regular
from utils.formats.limits import MAX_DIMS, MAX_SIDE, RefusedError
from utils.text import NAME, printable

MAX_PROGRAM = 64 << 20  # bytes; the program of a ViT with 1000 operators has 1 MB
MAX_DESCRIPTION = 1024  # bytes of the description of one array
# Operators of inference programs, of Paddle's dialects builtin (0), operators (1) and control flow (2). All compute tensors from
# tensors. Others may read or write files, call Python, talk to other processes, or never end (while).
_OPERATORS = {
    '0': 'parameter constant combine split slice insert_slice',
    '1': """
        data feed fetch full full_ full_int_array full_like full_with_tensor full_batch_size_like assign assign_ assign_value
        assign_value_ assign_out_ share_data share_data_ shape shape64 numel arange range_v2 linspace eye empty empty_like cast
        abs acos acosh asin asinh atan atan2 atanh ceil cos cosh erf erfinv exp expm1 floor log log10 log1p log2 logit
        reciprocal round rsqrt sign sin sinh sqrt square tan tanh trunc isfinite isinf isnan scale scale_ increment increment_
        add add_ add_n subtract subtract_ multiply multiply_ divide divide_ floor_divide remainder elementwise_pow pow fmax fmin
        maximum minimum clip clip_ lerp grid_sample equal equal_all not_equal greater_equal greater_than less_equal less_than
        isclose allclose logical_and logical_not logical_or logical_xor bitwise_and bitwise_not bitwise_or bitwise_xor where
        celu elu elu_ gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu leaky_relu_ log_softmax logsigmoid maxout mish
        prelu relu relu_ relu6 selu sigmoid sigmoid_ silu softmax softmax_ softplus softshrink softsign swiglu swish tanh_
        tanh_shrink thresholded_relu dropout
        all amax amin any argmax argmin argsort cummax cummin cumprod cumsum kthvalue logcumsumexp logsumexp max mean mean_all
        median min mode norm p_norm prod reduce_as sum topk var std unique_consecutive
        addmm baddbmm bmm dot einsum inverse kron matmul mm mv outer cross cdist bincount histogram
        batch_norm batch_norm_ sync_batch_norm_ group_norm instance_norm layer_norm rms_norm lp_norm l2_norm renorm
        conv2d conv2d_bias conv2d_transpose conv2d_transpose_bias conv3d conv3d_transpose depthwise_conv2d
        depthwise_conv2d_transpose deformable_conv pool2d pool3d lp_pool2d max_pool2d_with_index unpool fold unfold pad pad3d
        affine_channel affine_grid bicubic_interp bilinear_interp linear_interp nearest_interp trilinear_interp pixel_shuffle
        pixel_unshuffle channel_shuffle shuffle_channel temporal_shift roi_align roi_pool nms
        fused_attention flash_attn flash_attn_unpadded memory_efficient_attention
        broadcast_tensors concat crop diag diag_embed diagonal expand expand_as expand_v2 flatten flatten_ flip gather gather_nd
        index_add index_fill index_put index_sample index_select index_select_strided masked_fill masked_select meshgrid
        moveaxis multiplex nonzero one_hot put_along_axis repeat_interleave repeat_interleave_with_tensor_index reshape reshape_
        reverse roll rot90 scatter scatter_nd_add select_input searchsorted sequence_mask set_value set_value_
        set_value_with_tensor set_value_with_tensor_ shard_index slice split split_with_num squeeze squeeze_ stack strided_slice
        swapaxes take_along_axis tile transpose tril triu tril_triu unbind unfold unique unsqueeze unsqueeze_ unstack view_dtype
        view_shape view_slice tensor_unfold bitwise_left_shift bitwise_right_shift embedding embedding_with_scaled_gradient if
        """,
    '2': 'yield',
}
_ALLOWED = {f'{dialect}.{name}' for dialect, names in _OPERATORS.items() for name in names.split()} | {
    'p'
}  # p: parameter
_SIZES = {
    0: 1,
    1: 2,
    2: 4,
    3: 8,
    4: 2,
    5: 4,
    6: 8,
    20: 1,
    21: 1,
    22: 2,
    23: 8,
    24: 16,
}  # VarType of framework.proto: bytes


def check_program(path: str) -> None:
    """Check a program in Paddle's JSON format.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such program, or has operators that models do not need; the text says what.
    """
    try:
        content = json.loads(read_regular(path, MAX_PROGRAM))
        magic, program = content['base_code']['magic'], content['program']
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError('the program is not in the JSON format of Paddle 3') from None
    if magic != 'pir':
        raise ValueError('the program is not in the JSON format of Paddle 3')
    for name in _operators(program):
        if name not in _ALLOWED:
            raise RefusedError(f"the program has the operator '{printable(name, NAME)}', which models do not need")


def _operators(program: Any) -> Iterator[str]:
    """Yield the names of all operators; JSON is nested less deeply than Python's stack."""
    stack = [program]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            operators = value.get('ops')
            for operator in operators if isinstance(operators, list) else ():
                name = operator.get('#') if isinstance(operator, dict) else None
                yield name if isinstance(name, str) else 'without a name'
            stack += value.values()
        elif isinstance(value, list):
            stack += value


def check_parameters(path: str) -> None:
    """Check that the arrays of a .pdiparams file are those that fill it.

    Raises:
        OSError: the file cannot be read.
        ValueError: an array of another size; the text says so.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        while file.tell() < size:
            try:
                count = _array_size(file)
            except (struct.error, KeyError, IndexError):
                raise ValueError('the weights are damaged: an array without a description') from None
            if count > size - file.tell():
                raise ValueError('the weights are damaged: an array is larger than the file')
            file.seek(count, 1)


def _array_size(file: IO[bytes]) -> int:
    """Read the description of the next array and return its size in bytes."""
    version, levels, inner, length = struct.unpack('<IQIi', file.read(20))
    if version or levels or inner or not 0 <= length <= MAX_DESCRIPTION:
        raise KeyError
    fields = list(_varints(file.read(length)))
    sides = [value for field, value in fields if field == 2]
    if len(sides) > MAX_DIMS or not all(side < MAX_SIDE for side in sides):
        raise KeyError
    return math.prod(sides) * _SIZES[next(value for field, value in fields if field == 1)]


def _varints(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (field, value) of a protobuf message of integers, packed or not."""
    place, end, packed = 0, -1, 0
    while place < len(data):
        if place >= end:
            key, place = _varint(data, place)
            packed = key >> 3
            end = place
            if key & 7 == 2:  # packed
                length, place = _varint(data, place)
                end = place + length
                continue
            if key & 7:
                raise KeyError
        value, place = _varint(data, place)
        yield packed, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
