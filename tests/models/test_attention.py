# SPDX-License-Identifier: Apache-2.0
"""Attention by the fused kernel, which only GPUs take, against separate operators."""

import sys

import numpy as np
import paddle
import paddle.incubate.nn.memory_efficient_attention
import paddle.nn.functional as F
import pytest
from paddle.nn.functional import flash_attention, sdpa

from models.layers import attention
from models.layers.attention import CLASS_ROW, Attention, RelativeAttention, with_channels, with_key_bias
from models.layers.windowed_attention import DecomposedAttention, WindowedAttention
from tests.models.test_vision_transformer import tiny


@pytest.fixture
def calls(monkeypatch):
    """Forces the fused kernel, and lists the options of its calls."""
    options, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(attention, '_fused_kernel', lambda x: True)
    monkeypatch.setattr(
        attention.F, 'scaled_dot_product_attention', lambda *a, **o: (options.append(o), kernel(*a, **o))[1]
    )
    return options


def both(monkeypatch, layer, x, **biases):
    """Output and gradients (of the input and of the parameters) by separate operators, then by the fused kernel."""
    results = []
    for fused in (False, True):
        monkeypatch.setattr(attention, '_fused_kernel', lambda x, fused=fused: fused)
        x = x.detach()
        x.stop_gradient = False
        layer.clear_gradients()
        y, _ = layer(x, **biases)
        (y * paddle.arange(y.size, dtype='float32').reshape(y.shape).sin()).sum().backward()
        results.append([y.numpy(), x.grad.numpy(), *(parameter.grad.numpy() for parameter in layer.parameters())])
    return zip(*results)


@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize('heads', [1, 4])
def test_the_fused_kernel_computes_the_same(calls, monkeypatch, biased, heads):
    paddle.seed(0)
    layer, x = Attention(32, heads), paddle.randn([3, 7, 32])
    biases = {'key_bias': paddle.log(paddle.randint(1, 50, [3, 1, 1, 7]).astype('float32'))} if biased else {}
    for expected, found in both(monkeypatch, layer, x, **biases):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert len(calls) == 1


def test_a_bias_per_key_survives_half_precision():
    """Its two channels hold 16 bits of log(size); one would hold 8, an error of 0.01 in a score."""
    bias = paddle.log(paddle.arange(1, 198).astype('float32')).reshape([1, 1, 1, 197])
    q = k = v = paddle.zeros([1, 197, 1, 64], 'bfloat16')
    q, k, v = with_key_bias(q, k, v, bias)
    assert {part.shape[-1] for part in (q, k, v)} == {72} and {str(part.dtype) for part in (q, k, v)} == {
        'paddle.bfloat16'
    }
    scores = (q.astype('float64')[0, :, 0] @ k.astype('float64')[0, :, 0].t()) / 72**0.5
    np.testing.assert_allclose(scores.numpy(), np.broadcast_to(bias.numpy()[0, 0], (197, 197)), atol=1e-4)
    assert not v.astype('float32').any()


def test_dropout_acts_in_training_only(calls):
    layer, x = Attention(32, 4, attn_drop_rate=0.5), paddle.randn([3, 7, 32])
    layer.eval()
    assert np.array_equal(layer(x)[0], layer(x)[0])
    layer.train()
    assert not np.array_equal(layer(x)[0], layer(x)[0])
    assert [(call['dropout_p'], call['training']) for call in calls] == [(0.0, True)] * 2 + [(0.5, True)] * 2


@pytest.mark.parametrize('training', [True, False])
def test_the_kernel_of_float32_keeps_what_its_backward_pass_needs(monkeypatch, training):
    """It stores log(sum(exp(scores))) only if `training` is set; layers in evaluation mode may need gradients, too."""
    module, kept = sys.modules['paddle.incubate.nn.memory_efficient_attention'], []

    def kernel(q, k, v, attn_bias, p, scale, training):
        assert attn_bias is None and p == 0.0 and scale is None
        kept.append(training)
        return flash_attention._math_attention(q, k, v)[0]

    monkeypatch.setattr(module, 'memory_efficient_attention', kernel)
    monkeypatch.setattr(sdpa, 'select_sdp_for_sdpa', lambda parameters: 'mem_efficient')
    layer, x = Attention(32, 4), paddle.randn([3, 7, 32])
    layer.training = training
    for expected, found in both(monkeypatch, layer, x):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert kept == [True]


@pytest.mark.parametrize(
    'make',
    [
        lambda: DecomposedAttention(32, 4, (3, 2)),
        lambda: DecomposedAttention(32, 4, (5, 4)),  # another grid: the tables are interpolated
        lambda: WindowedAttention(32, 4, 2),
        lambda: WindowedAttention(32, 4, 2, relative=False),
    ],
)
def test_decomposed_positions_are_fused(calls, monkeypatch, make):
    """Row and column of a key become channels, through which gradients reach the tables."""
    paddle.seed(0)
    layer, x = make(), paddle.randn([3, 6, 32])
    tables = [parameter for name, parameter in layer.named_parameters() if name.startswith('rel_pos')]
    for table in tables:
        table.set_value(paddle.randn(table.shape))
    results = list(both(monkeypatch, layer, x, grid=(3, 2)))
    for expected, found in results:
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert len(calls) == 1 and all(np.abs(expected).max() > 1e-3 for expected, _ in results)


def test_channels_beyond_the_limit_of_the_kernel_are_not_fused(calls):
    """ViTDet's images of 1024 pixels need 192 channels per head."""
    for side, fits in ((14, True), (64, True), (65, False)):
        assert DecomposedAttention(64, 1, (2, 2)).fuses((side, side), None) is fits
    assert not DecomposedAttention(64, 1, (2, 2)).fuses((2, 2), paddle.zeros([1, 1, 1, 4]))


def test_decomposed_positions_survive_half_precision():
    """A bias of bfloat16 is scaled by sqrt(d') once, which rounds it once more."""
    paddle.seed(0)
    queries, keys = paddle.randn([1, 6, 1, 5]), paddle.eye(5)[paddle.to_tensor([0, 1, 2, 3, 4, 0])]
    q = k = v = paddle.zeros([1, 6, 1, 64], 'bfloat16')
    q, k, v = with_channels(q, k, v, queries, keys)
    assert {part.shape[-1] for part in (q, k, v)} == {72}
    scores = (q.astype('float64')[0, :, 0] @ k.astype('float64')[0, :, 0].t()) / 72**0.5
    np.testing.assert_allclose(scores.numpy(), (queries[0, :, 0] @ keys.t()).numpy(), rtol=2**-7)
    assert not v.astype('float32').any()


def test_biases_per_pair_of_tokens_are_not_fused(calls):
    """The kernel has no gradient for them, and they are no product of few channels."""
    RelativeAttention(32, 4, (2, 3))(paddle.randn([2, 7, 32]))
    Attention(32, 4)(paddle.randn([2, 7, 32]), bias=paddle.zeros([4, 7, 7]))
    assert not calls


@pytest.mark.parametrize('biased', [False, True])
def test_the_class_row_needs_no_attention_matrix(calls, monkeypatch, biased):
    """Output and weights of the class token, and their gradients, equal those of the unfused path; so do its bits."""
    paddle.seed(0)
    layer, x = Attention(32, 4), paddle.randn([3, 7, 32])
    bias = paddle.log(paddle.randint(1, 50, [3, 1, 1, 7]).astype('float32')) if biased else None
    rows = []

    def with_row(x):
        y, maps = layer(x, need_maps=CLASS_ROW, key_bias=bias)
        assert maps.logits is None or not attention._fused_kernel(x)
        rows.append(maps.weights[:, :, 0])
        return y + (rows[-1].mean(1) * paddle.arange(7.0).sin()).sum(-1).reshape([3, 1, 1]), maps

    with_row.clear_gradients, with_row.parameters = layer.clear_gradients, layer.parameters
    for expected, found in both(monkeypatch, with_row, x):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert [row.shape for row in rows] == [[3, 4, 7]] * 2 and len(calls) == 1
    np.testing.assert_allclose(rows[1], rows[0], 1e-6)
    monkeypatch.setattr(attention, '_fused_kernel', lambda x: True)
    assert layer(x, need_maps=CLASS_ROW, key_bias=bias)[1].weights.shape == [3, 4, 1, 7]


@pytest.mark.parametrize('merged', [0, 2])
def test_evit_is_fused_in_all_blocks(calls, monkeypatch, merged):
    """Also with ToMe's token sizes; the weights of the fused token carry gradients to queries and keys."""
    paddle.seed(0)
    model = tiny(keep_rate=[1, 0.5, 0.5], fuse_token=True)
    model.merge_tokens(merged)
    images, results = paddle.randn([2, 3, 32, 32]), []
    for fused in (True, False):
        monkeypatch.setattr(attention, '_fused_kernel', lambda x, fused=fused: fused)
        model.clear_gradients()
        tokens, state = model.forward_tokens(images)
        (tokens * paddle.arange(tokens.size, dtype='float32').reshape(tokens.shape).sin()).sum().backward()
        results.append([tokens, *state.scores, *(parameter.grad.clone() for parameter in model.blocks.parameters())])
        assert len(calls) == 3
    for found, expected in zip(*results):
        np.testing.assert_allclose(found, expected, 1e-4, 1e-4)
    assert len(state.scores) == 2


def test_the_class_row_of_dropped_or_biased_weights_is_not_fused(calls):
    """The kernel draws dropout of its own; a bias per pair of tokens is no part of the class row."""
    layer, x = Attention(32, 4, attn_drop_rate=0.5), paddle.randn([3, 6, 32])
    assert layer(x, need_maps=CLASS_ROW)[1].weights.shape == [3, 4, 6, 6] and not calls
    layer.eval()
    assert layer(x, need_maps=CLASS_ROW)[1].weights.shape == [3, 4, 1, 6] and len(calls) == 1
    weights = DecomposedAttention(32, 4, (3, 2))(x, need_maps=CLASS_ROW, grid=(3, 2))[1].weights
    assert weights.shape == [3, 4, 6, 6] and len(calls) == 1


def test_tome_and_removed_attention_are_fused(calls, monkeypatch):
    """ToMe in all blocks, with proportional attention from the second one on; a block without attention calls nothing."""
    paddle.seed(0)
    model = tiny(removed_layers=[1])
    model.merge_tokens(2)
    model.eval()
    images = paddle.randn([2, 3, 32, 32])
    fused = model(images)
    assert len(calls) == len(model.blocks) - 1
    monkeypatch.setattr(attention, '_fused_kernel', lambda x: False)
    np.testing.assert_allclose(fused, model(images), atol=1e-5)
