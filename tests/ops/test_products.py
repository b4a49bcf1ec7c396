# SPDX-License-Identifier: Apache-2.0
"""Matrix products of the operators: the set-up of a shape is kept while it is used, and products over no elements are the bias."""

import ctypes

import numpy as np
import paddle
import pytest

import ops
from ops import extension
from tests.conftest import assert_close

pytestmark = pytest.mark.skipif(not ops.load(), reason='no C++ compiler')


@pytest.fixture
def created():
    """The number of products that were set up in this process."""
    library = ctypes.CDLL(extension.build())
    library.leanvit_created_products.restype = ctypes.c_int64
    return library.leanvit_created_products


def test_a_shape_in_use_is_kept_while_others_come_and_go(created):
    """As with multi-scale training or a schedule of keep rates: only new shapes are set up."""
    weight, before = paddle.ones([3, 5]), created()
    for rows in range(2, 302):
        for size in (1, rows):
            assert_close(ops.linear(paddle.ones([size, 3]), weight, None), np.full([size, 5], 3.0))
    assert created() - before <= 301


def test_old_shapes_are_dropped(created):
    weight = paddle.ones([3, 7])
    for rows in range(1, 302):
        ops.linear(paddle.ones([rows, 3]), weight, None)
    before = created()
    ops.linear(paddle.ones([301, 3]), weight, None)
    assert created() == before
    ops.linear(paddle.ones([1, 3]), weight, None)
    assert created() == before + 1


def test_products_over_no_elements_are_the_bias():
    weight, bias = paddle.ones([0, 4]), paddle.to_tensor([1.0, 2.0, 3.0, 4.0])
    x, first, zero = paddle.ones([2, 3, 6]), paddle.ones([6, 0]), paddle.zeros([0])
    expected = np.tile(bias.numpy(), (2, 3, 1))
    assert_close(ops.linear(paddle.ones([2, 3, 0]), weight, bias), expected)
    assert_close(ops.mlp(x, first, zero, weight, bias), expected)
    assert not ops.linear(paddle.ones([2, 3, 0]), weight, None).any()
