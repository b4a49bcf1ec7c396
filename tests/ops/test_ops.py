# SPDX-License-Identifier: Apache-2.0
"""The operators for the CPU compute what plain layers compute, forward and backward; bfloat16 stays close."""

import concurrent.futures

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paddle import nn

import ops
from config import get_config
from engine.precision import Precision
from models import build_model
from models.gmlp import GatedMlp, SpatialGatingUnit
from models.layers import Attention, Block, LayerNorm, Linear, Mlp, TokenState
from models.layers.patch_embed import project_patches
from models.ms_mlp import shifted_conv
from models.registry import config_file
from tests.conftest import assert_close
from utils.environment import has_bfloat16

pytestmark = pytest.mark.skipif(not ops.load(), reason='no C++ compiler')
bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason='no instructions for bfloat16')

EXACT, HALF = 1e-6, 2e-2


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype('float32')


def results(function, arrays) -> list[np.ndarray]:
    """The output, and the gradients of all inputs for a fixed gradient of the output."""
    tensors = [paddle.to_tensor(array, stop_gradient=False) for array in arrays]
    y = function(*tensors)
    (y * paddle.to_tensor(numbers(99, *y.shape))).sum().backward()
    return [y.numpy(), *(tensor.grad.numpy() for tensor in tensors)]


def compare(operator, plain, arrays, half=False, tolerance=None) -> None:
    with ops.bfloat16(half):
        actual = results(operator, arrays)
    for ours, expected in zip(actual, results(plain, arrays)):
        assert ours.dtype == np.float32 and ours.shape == expected.shape
        # Sums of a few numbers near 1 may be near 0.
        scale = max(float(np.abs(expected).max()), 1.0)
        assert np.abs(ours - expected).max() <= scale * (tolerance or (HALF if half else EXACT))


def plain_attention(num_heads, scale, key_bias=None):
    def compute(qkv):
        batch, tokens, channels = qkv.shape
        parts = qkv.reshape([batch, tokens, 3, num_heads, channels // 3 // num_heads]).transpose([2, 0, 3, 1, 4])
        logits = paddle.matmul(parts[0] * scale, parts[1], transpose_y=True)
        logits = logits if key_bias is None else logits + key_bias.reshape([batch, 1, 1, tokens])
        return paddle.matmul(F.softmax(logits), parts[2]).transpose([0, 2, 1, 3]).flatten(2)

    return compute


def plain_gated_mlp(x, w1, b1, scale, shift, spatial, spatial_bias, w2, b2):
    u, v = F.gelu(F.linear(x, w1, b1)).chunk(2, axis=-1)
    v = F.layer_norm(v, v.shape[-1:], scale, shift, 1e-5)
    gate = paddle.matmul(spatial, v, transpose_x=True) + spatial_bias.unsqueeze(-1)
    return F.linear(u * gate, w2, b2)


halves = pytest.mark.parametrize('half', [False, pytest.param(True, marks=bfloat16)])


@halves
@given(st.integers(1, 5), st.integers(1, 37), st.integers(1, 40))
def test_linear(half, rows, inputs, outputs):
    arrays = [numbers(1, 2, rows, inputs), numbers(2, inputs, outputs), numbers(3, outputs)]
    compare(ops.linear, F.linear, arrays, half, None if half else 2e-6)


@given(st.integers(1, 5), st.integers(2, 130), st.sampled_from([1e-6, 1e-5]))
def test_layer_norm(rows, channels, epsilon):
    arrays = [3 * numbers(1, 2, rows, channels) + 1, numbers(2, channels), numbers(3, channels)]
    compare(
        lambda *inputs: ops.layer_norm(*inputs, epsilon),
        lambda x, weight, bias: F.layer_norm(x, [channels], weight, bias, epsilon),
        arrays,
        tolerance=1e-5,  # two channels: differences of nearly equal numbers
    )


@halves
@given(st.integers(1, 5), st.integers(1, 24), st.integers(1, 70))
def test_mlp(half, rows, channels, hidden):
    arrays = [numbers(1, 2, rows, channels), numbers(2, channels, hidden), numbers(3, hidden), numbers(4, hidden, 7)]
    compare(
        ops.mlp,
        lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
        [*arrays, numbers(5, 7)],
        half,
        4e-2 if half else 3e-6,
    )


@halves
@pytest.mark.parametrize('biased', [False, True])
@given(st.integers(1, 4), st.integers(1, 30), st.sampled_from([1, 3]), st.sampled_from([8, 20]))
def test_attention(half, biased, batch, tokens, heads, dim):
    key_bias = paddle.to_tensor(numbers(2, batch, tokens)) if biased else None
    compare(
        lambda qkv: ops.attention(qkv, heads, dim**-0.5, key_bias).astype('float32'),
        plain_attention(heads, dim**-0.5, key_bias),
        [numbers(1, batch, tokens, 3 * heads * dim)],
        half,
        4e-2 if half else 2e-6,
    )


@halves
@given(st.integers(1, 3), st.integers(1, 20), st.integers(8, 24))  # with few channels LayerNorm is ill-conditioned
def test_gated_mlp(half, batch, tokens, hidden):
    arrays = [numbers(1, batch, tokens, 12), numbers(2, 12, 2 * hidden), numbers(3, 2 * hidden), numbers(4, hidden)]
    arrays += [
        numbers(5, hidden),
        numbers(6, tokens, tokens),
        numbers(7, tokens),
        numbers(8, hidden, 12),
        numbers(9, 12),
    ]
    operator = lambda x, *weights: ops.gated_mlp(x, *weights, epsilon=1e-5)  # noqa: E731
    compare(operator, plain_gated_mlp, arrays, half, 0.1 if half else 1e-5)


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(
        st.tuples(st.integers(1, 23), st.sampled_from([1, 3, 5, 7]), st.integers(-12, 12)), min_size=1, max_size=4
    ),
)
def test_shifted_convs(batch, height, width, groups):
    """Channels that are no multiple of a vector, kernels larger than the map, shifts beyond it."""
    dims, kernels, shifts = map(list, zip(*groups))
    sizes = [(dim, kernel, kernel) for dim, kernel in zip(dims, kernels)]
    arrays = [numbers(1, batch, height, width, sum(dims)), numbers(3, sum(dims))]
    arrays += [numbers(4 + branch, number, *size)[0] for number, size in enumerate(sizes, 1) for branch in (0, 1)]

    def plain(x, bias, *weights):
        parts = []
        for part, shift, *pair in zip(x.transpose([0, 3, 1, 2]).split(dims, 1), shifts, weights[::2], weights[1::2]):
            rolls = (0, shift), (shift, 0)
            parts.append(sum(shifted_conv(part, w.unsqueeze(1), roll) for w, roll in zip(pair, rolls)))
        return paddle.concat(parts, 1).transpose([0, 2, 3, 1]) + bias

    def operator(x, bias, *weights):
        flat = paddle.concat([weight.flatten() for weight in weights])
        return ops.shifted_convs(x, flat, bias, dims, kernels, shifts)

    compare(operator, plain, arrays, tolerance=1e-5)


def test_gradients_are_those_of_the_values():
    """Central differences along a random direction."""
    arrays = [numbers(1, 2, 3, 8), numbers(2, 8, 16), numbers(3, 16), numbers(4, 16, 8), numbers(5, 8)]
    directions = [numbers(seed, *array.shape) for seed, array in enumerate(arrays, 10)]
    gradients = results(ops.mlp, arrays)[1:]
    expected = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions))

    def value(step: float) -> float:
        moved = [paddle.to_tensor(array + step * direction) for array, direction in zip(arrays, directions)]
        y = ops.mlp(*moved)
        return float((y.astype('float64') * paddle.to_tensor(numbers(99, *y.shape)).astype('float64')).sum())

    assert (value(2e-3) - value(-2e-3)) / 4e-3 == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize('values', [[1e4, -1e4], [300.0, -300.0], [0.0, -0.0], [88.0, -12.9]])
def test_large_numbers_stay_finite(values):
    x = paddle.to_tensor(np.tile(np.array(values, 'float32'), (1, 2, 3)))
    eye, zero = paddle.eye(6), paddle.zeros([6])
    assert_close(ops.mlp(x, eye, zero, eye, zero), F.gelu(x), EXACT)
    assert_close(ops.attention(x, 1, 1.0), plain_attention(1, 1.0)(x), EXACT)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_numbers_that_are_not_finite_stay_so(bad):
    """A loss that is not finite has to end the run, also where operators computed it."""
    x = paddle.to_tensor(np.array([[1.0, bad, 2.0]], 'float32'))
    eye, zero = paddle.eye(3), paddle.zeros([3])
    for half in (False, has_bfloat16()):
        with ops.bfloat16(half):
            outputs = [
                ops.linear(x, eye, zero), ops.mlp(x, eye, zero, eye, zero), ops.layer_norm(x, zero + 1, zero, 1e-6),
                ops.attention(x.unsqueeze(0), 1, 1.0).astype('float32'),
            ]  # fmt: skip
        for output in outputs:
            assert not paddle.isfinite(output).all()


def test_without_gradients_nothing_is_recorded():
    weight, bias = paddle.ones([3, 3]), paddle.zeros([3])
    weight.stop_gradient = False
    with paddle.no_grad():
        assert ops.linear(paddle.ones([2, 3]), weight, bias).stop_gradient
    x = paddle.to_tensor(numbers(1, 2, 3), stop_gradient=False)
    weight.stop_gradient = True
    ops.linear(x, weight, bias).sum().backward()
    assert weight.grad is None and x.grad is not None


def test_empty_batches_have_zero_gradients():
    y, dx, dw, db = results(ops.linear, [numbers(1, 0, 4), numbers(2, 4, 3), numbers(3, 3)])
    assert y.shape == (0, 3) and dx.shape == (0, 4)
    assert not dw.any() and not db.any()


def test_an_empty_batch_of_a_gated_mlp():
    model = GatedMlp(8, 16, 4)
    model(paddle.zeros([0, 4, 8])).sum().backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_layers_without_weight_or_bias(monkeypatch):
    x = paddle.to_tensor(numbers(1, 2, 4, 8))
    mlp, gated = Mlp(8, 16), GatedMlp(8, 16, 4)
    mlp.fc1, mlp.fc2 = Linear(8, 16, bias_attr=False), Linear(16, 8, bias_attr=False)
    gated.fc1, gated.gate.norm = Linear(8, 16, bias_attr=False), LayerNorm(8, weight_attr=False, bias_attr=False)
    layers = [LayerNorm(8, bias_attr=False), LayerNorm(8, weight_attr=False), LayerNorm([4, 8]), mlp, gated]
    ours = [layer(x) for layer in layers]
    monkeypatch.setattr(ops, 'usable', lambda *_: False)
    for layer, y in zip(layers, ours):
        assert_close(y, layer(x), EXACT)


def test_missing_biases_are_float32():
    x, weight = paddle.to_tensor(numbers(1, 2, 8)), paddle.to_tensor(numbers(2, 8, 61))
    paddle.set_default_dtype('float64')
    try:
        assert_close(ops.linear(x, weight, None), paddle.matmul(x, weight), EXACT)
    finally:
        paddle.set_default_dtype('float32')


def test_every_nan_stays_nan_in_bfloat16():
    """CUDA's NaN has all bits set, so that rounding by a sum would make it -0."""
    x = paddle.to_tensor(np.array([[0x7FFFFFFF, 0xFFFFFFFF]], 'uint32').view('float32'))
    with ops.bfloat16():
        assert paddle.isnan(ops.linear(x, paddle.eye(2), None)).all()


@pytest.mark.parametrize('make', [lambda: Linear(8, 8), lambda: LayerNorm(8), lambda: Attention(8, 2)])
def test_second_derivatives_are_errors(make):
    """Paddle would take them as zero."""
    x = paddle.to_tensor(numbers(1, 2, 4, 8), stop_gradient=False)
    y = make()(x)
    y = y[0] if isinstance(y, tuple) else y
    (gradient,) = paddle.grad((y**2).sum(), [x], create_graph=True)
    with pytest.raises(OSError, match='no second derivative; set LEANVIT_OPS=0'):
        (gradient**2).sum().backward()


def test_views_of_stride_kernels_are_read_right():
    x = paddle.to_tensor(numbers(1, 6, 5))
    weight, bias = paddle.to_tensor(numbers(2, 6, 4)), paddle.to_tensor(numbers(3, 4))
    before = paddle.get_flags('FLAGS_use_stride_kernel')
    paddle.set_flags({'FLAGS_use_stride_kernel': True})
    try:
        view = x.transpose([1, 0])
        assert not view.is_contiguous()
        assert_close(ops.linear(view, weight, bias), x.numpy().T @ weight.numpy() + bias.numpy(), EXACT)
    finally:
        paddle.set_flags(before)


@pytest.mark.parametrize(
    'call',
    [
        lambda x, w: ops.linear(x, w[1:], None),
        lambda x, w: ops.linear(x, w, w[0, 1:]),
        lambda x, w: ops.layer_norm(x, w[0], w[0, 1:], 1e-6),
        lambda x, w: ops.mlp(x, w, w[0], w[:3], w[0]),
        lambda x, w: ops.mlp(x, w, w[0, :3], w, w[0]),
        lambda x, w: ops.attention(x, 3, 1.0),
        lambda x, w: ops.attention(x, 2, 1.0, paddle.zeros([2, 9])),
        lambda x, w: ops.shifted_convs(x[None], w[0], w[0], [6], [1], [0]),
        lambda x, w: ops.shifted_convs(x[None], w.flatten()[:10], w[0, :5], [5], [1], [0]),
        lambda x, w: ops.gated_mlp(x, w, w[0], w[0, :3], w[0, :3], w[:2, :2], w[0, :2], w[:3], w[0], epsilon=1e-5),
        lambda x, w: ops.shifted_convs(x[None], w.flatten()[:12], w[0], [6], [], []),
        lambda x, w: ops.shifted_convs(x[None], w.flatten()[:12], w[0], [-2, 8], [1, 1], [0, 0]),
        lambda x, w: ops.shifted_convs(x[None], paddle.ones([48]), w[0], [6], [2], [0]),
    ],
)
def test_shapes_that_do_not_fit_are_errors(call):
    """The kernels would read beyond the end of a tensor, and an exception of another kind would end the process."""
    with pytest.raises(
        ValueError, match=r'has the shape \[.*\] and needs|no multiple of 3 times|differ in length|odd kernel'
    ):
        call(paddle.ones([2, 5, 6]), paddle.ones([6, 6]))


# ---------------------------------------------------------------------------------------------------- layers
def test_layers_use_the_operators(monkeypatch):
    """In dygraph on the CPU; the classes of Paddle give the same numbers."""
    calls, run = [], ops._run
    monkeypatch.setattr(ops, '_run', lambda name, *rest: calls.append(name) or run(name, *rest))
    x = paddle.to_tensor(numbers(1, 2, 9, 24))
    block = Block(24, Attention(24, 3))
    block(x, TokenState(0, 9))
    assert calls == ['layer_norm', 'linear', 'attention', 'linear', 'layer_norm', 'mlp']
    for ours, plain in ((Linear(24, 5), nn.Linear(24, 5)), (LayerNorm(24), nn.LayerNorm(24))):
        plain.set_state_dict(ours.state_dict())
        assert_close(ours(x), plain(x), EXACT)


def test_layers_that_a_user_replaces_or_watches_are_called(monkeypatch):
    """An operator for several layers would skip another activation, LoRA, or a hook."""

    class LoRA(Linear):
        def forward(self, x):
            return super().forward(x) + 1

    x, calls = paddle.to_tensor(numbers(1, 2, 9, 24)), []
    relu, none, lora, hooked, attention = *(Mlp(24, 48) for _ in range(4)), Attention(24, 3)
    none.act = nn.Identity()
    relu.act, lora.fc2, attention.qkv = nn.ReLU(), LoRA(48, 24), LoRA(24, 72)
    hooked.fc1.register_forward_post_hook(lambda *_: calls.append('fc1'))
    models = [(relu, nn.ReLU()), (none, nn.Identity()), (lora, nn.GELU()), (hooked, nn.GELU())]
    for mlp, act in models:
        assert_close(mlp(x), mlp.fc2(act(mlp.fc1(x))), EXACT)
    assert len(calls) == 2
    ours = attention(x)[0]
    monkeypatch.setattr(ops, 'usable', lambda *_: False)
    assert_close(ours, attention(x)[0], EXACT)


def test_replaced_parts_of_a_layer_are_called(monkeypatch):
    """Another gate, dropout or `forward` of an object, and hooks on the gate and the attention dropout."""

    class Closed(SpatialGatingUnit):
        def forward(self, x):
            return super().forward(x) * 0

    x, calls = paddle.to_tensor(numbers(1, 2, 9, 24)), []
    closed, gated, halved = (GatedMlp(24, 48, 9) for _ in range(3))
    attention, mlp, patched = Attention(24, 3), Mlp(24, 48), Mlp(24, 48)
    closed.gate, halved.gate, mlp.hidden_drop = Closed(48, 9), Linear(48, 24), nn.ReLU()
    patched.fc1.forward = lambda x, forward=patched.fc1.forward: forward(x) * 0
    gated.gate.register_forward_post_hook(lambda *_: calls.append('gate'))
    attention.attn_drop.register_forward_post_hook(lambda *_: calls.append('attn_drop'))
    layers = [closed, gated, halved, attention, mlp, patched]
    run = lambda: [y[0] if isinstance(y, tuple) else y for y in (layer(x) for layer in layers)]  # noqa: E731
    ours = run()
    assert calls == ['gate', 'attn_drop']
    monkeypatch.setattr(ops, 'usable', lambda *_: False)
    for y, expected in zip(ours, run()):
        assert_close(y, expected, EXACT)


@pytest.mark.parametrize('options', [{'stride': 2}, {'stride': 4, 'padding': 1}, {'stride': 4, 'padding': 'SAME'}])
def test_other_convolutions_than_of_patches(options):
    conv, x = nn.Conv2D(3, 6, 4, **options), paddle.to_tensor(numbers(1, 2, 3, 18, 18))
    assert_close(project_patches(x, conv, 4), conv(x).transpose([0, 2, 3, 1]), EXACT)


def test_monte_carlo_dropout():
    """Dropout layers in training mode drop, also in a model in evaluation mode."""
    x = paddle.to_tensor(numbers(1, 2, 9, 24))
    layers = Mlp(24, 48, 0.5), GatedMlp(24, 48, 9, 0.5), Attention(24, 3, attn_drop_rate=0.5)
    for layer in layers:
        layer.eval()
        getattr(layer, 'attn_drop', None) and layer.attn_drop.train()
        getattr(layer, 'drop', None) and layer.drop.train()
        first, second = (layer(x) for _ in range(2))
        first, second = (first[0], second[0]) if isinstance(first, tuple) else (first, second)
        assert not paddle.equal_all(first, second)


@bfloat16
@pytest.mark.parametrize('make', [lambda: nn.Linear(24, 24), lambda: nn.Sequential(Linear(24, 24), nn.Linear(24, 24))])
def test_a_replaced_projection_reads_float32(make):
    attention, x = Attention(24, 3), paddle.to_tensor(numbers(1, 2, 9, 24))
    attention.proj = make()
    exact = attention(x)[0]
    with ops.bfloat16():
        assert_close(attention(x)[0], exact, HALF)


@pytest.mark.parametrize('full_graph', [None, True])
def test_to_static(full_graph):
    for layer in (Linear(8, 4), LayerNorm(8), Mlp(8, 16), GatedMlp(8, 16, 4)):
        layer.eval()
        x = paddle.to_tensor(numbers(1, 2, 4, 8))
        expected = layer(x)
        assert_close(paddle.jit.to_static(layer, full_graph=full_graph)(x), expected, EXACT)


def test_other_types_use_the_layers_of_paddle(monkeypatch):
    x, calls = paddle.to_tensor(numbers(1, 2, 24)), []
    monkeypatch.setattr(ops, '_run', lambda *_: calls.append(_))
    for make in (lambda: LayerNorm(24), lambda: Linear(24, 8), lambda: Mlp(24, 8)):
        layer = make()
        layer.to(dtype='float64')
        assert layer(x.astype('float64')).dtype == paddle.float64
        layer.to(dtype='bfloat16')
        with pytest.raises(RuntimeError, match='bfloat16'):  # for which Paddle has no layers on the CPU
            layer(x.astype('bfloat16'))
    assert not calls


def test_dropout_of_hidden_activations_and_weights_is_not_skipped():
    x = paddle.ones([2, 9, 24])
    for layer in (Mlp(24, 48, drop_rate=0.5), Attention(24, 3, attn_drop_rate=0.5)):
        run = lambda layer=layer: layer(x) if isinstance(layer, Mlp) else layer(x)[0]  # noqa: E731
        assert not paddle.equal_all(run(), run())
        layer.eval()
        assert paddle.equal_all(run(), run())


SMALL = ['DATA.IMAGE_SIZE', 64, 'MODEL.TRANS.EMBED_DIM', 48, 'MODEL.TRANS.NUM_HEADS', 3, 'MODEL.NUM_CLASSES', 4]
MODELS = {
    'gmlp_digits': [],
    'deit_small_patch16_224': SMALL,
    'evit_small_patch16_224_k05_fuse': SMALL,
    'lambda_base_01346_tome_r24': [*SMALL, 'MODEL.TOME.R', 1],
    'ms_mlp_tiny_patch4_shift5_224': ['DATA.IMAGE_SIZE', 64, 'MODEL.NUM_CLASSES', 4],
}


def losses(name: str, half: bool = False, recompute: bool = False) -> list[float]:
    """Losses of three training steps."""
    config = get_config(config_file(name), ['MODEL.DROPPATH', 0.1, *MODELS[name]])
    paddle.seed(7)
    model = build_model(config)
    model.train()
    model.set_grad_checkpointing(recompute)
    optimizer = paddle.optimizer.SGD(0.05, model.parameters())
    shape = (4, config.DATA.IMAGE_CHANNELS, config.DATA.IMAGE_SIZE, config.DATA.IMAGE_SIZE)
    images, labels = paddle.to_tensor(numbers(3, *shape)), paddle.to_tensor([0, 1, 2, 3])
    found = []
    for step in range(3):
        paddle.seed(step)
        with ops.bfloat16(half):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        found.append(float(loss))
    return found


@pytest.mark.parametrize('name', MODELS)
def test_models_train_as_with_plain_layers(name, monkeypatch):
    ours = losses(name)
    monkeypatch.setattr(ops, 'usable', lambda *_: False)
    assert ours == pytest.approx(losses(name), rel=1e-4)
    assert ours[2] != ours[0]


@bfloat16
@pytest.mark.parametrize('name', ['gmlp_digits', 'deit_small_patch16_224', 'evit_small_patch16_224_k05_fuse'])
def test_bfloat16_stays_close(name):
    exact, half = losses(name), losses(name, half=True)
    assert half != exact and half == pytest.approx(exact, rel=2e-2)


@bfloat16
@pytest.mark.parametrize('name', ['gmlp_digits', 'deit_small_patch16_224'])
def test_recomputed_blocks_keep_their_type(name):
    """The backward pass recomputes them outside of `bfloat16()`."""
    assert losses(name, half=True, recompute=True) == losses(name, half=True)
    assert losses(name, recompute=True) == losses(name)


def test_each_thread_has_its_precision():
    with ops.bfloat16(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert ops.in_bfloat16() and not pool.submit(ops.in_bfloat16).result()


def test_precision_on_the_cpu(monkeypatch):
    from engine import precision

    def starts_half(amp: bool) -> bool:
        with Precision(get_config(opts=['AMP', amp]), on_gpu=False).autocast():
            return ops.in_bfloat16()

    monkeypatch.setattr(precision, 'has_bfloat16', lambda: True)
    assert starts_half(True) and not starts_half(False) and not ops.in_bfloat16()
    assert precision.describe_cpu_precision() == 'bfloat16 products and float32 weights'
    monkeypatch.setattr(precision, 'has_bfloat16', lambda: False)
    assert not starts_half(True)
    assert 'avx512_bf16' in precision.describe_cpu_precision()
    monkeypatch.setattr(precision, 'has_bfloat16', lambda: True)
    monkeypatch.setattr(ops, 'load', lambda: False)
    assert not starts_half(True)
    assert 'docs/install.md' in precision.describe_cpu_precision()
