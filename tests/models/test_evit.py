# SPDX-License-Identifier: Apache-2.0
"""EViT's token reduction against the original's numbers."""

import functools

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import nn

from models.layers import Attention, Block, EViTReducer, TokenState
from models.profile import profile
from models.vision_transformer import VisionTransformer
from tests.conftest import assert_close, golden
from tests.models.helpers import load, to_ours
from tests.models.test_vision_transformer import build, tiny
from utils.errors import UserError


def run(model: VisionTransformer, x: np.ndarray, arguments: dict):
    tokens, state = model.forward_tokens(paddle.to_tensor(x), **arguments)
    return model.forward_head(tokens), model.forward_head(tokens, pre_logits=True), state


@pytest.mark.parametrize('mode', ['fuse', 'drop'])
@pytest.mark.parametrize('name', ['depth12', 'depth4'])
def test_models(name, mode):
    g = golden(f'evit-{name}')
    model = load(build(g.meta['ctor'], fuse_token=mode == 'fuse'), g.group('sd'))
    model.eval()
    for case, arguments in g.meta['runs'].items():
        x = g[f'in/x{arguments.pop("size", "")}']
        expected = g.group(f'out/{mode}/{case}')
        with paddle.no_grad():
            logits, features, state = run(model, x, arguments)
        assert list(state.counts) == expected['left_tokens'].tolist(), case
        assert len(state.indices) == expected['n_idx'].item(), case
        for i, (index, scores) in enumerate(zip(state.indices, state.scores)):
            np.testing.assert_array_equal(index, expected[f'idx{i}'], err_msg=case)
            assert_close(scores, expected[f'cls_attn{i}'])
        assert_close(logits, expected['logits'])
        assert_close(features, expected['features'])


@pytest.mark.parametrize('mode', ['fuse', 'drop'])
def test_block(mode):
    g = golden('evit-block')
    block = Block(24, Attention(24, 3), [EViTReducer(0, 0.5, fuse=mode == 'fuse')])
    load(block, g.group('sd'))
    block.eval()
    x = paddle.to_tensor(g['in/x'])
    for rate in g.meta['rates']:
        expected = g.group(f'out/r{round(rate * 100):03d}')
        y, state = block(x, TokenState(1, 17, [rate], [None]))
        assert_close(block.attn(block.norm1(x))[0], expected['attn_out'])
        assert_close(y, expected[f'{mode}/y'])
        assert state.num_body == y.shape[1] - 1 == expected[f'{mode}/n_tokens'].item()
        if 'idx' in expected:
            kept = state.indices[0].numpy()
            np.testing.assert_array_equal(kept, expected['idx'])
            assert_close(state.scores[0], expected['cls_attn'])
            rest = [np.setdiff1d(np.arange(17), row) for row in kept]
            np.testing.assert_array_equal(rest, expected['complement'])
        else:
            assert state.indices == ()


@pytest.mark.parametrize('mode', ['fuse', 'drop'])
def test_gradients(mode):
    g = golden('evit-grad')
    model = load(build(g.meta['ctor'], fuse_token=mode == 'fuse'), g.group('sd'))
    model.train()
    x = paddle.to_tensor(g['in/x'], stop_gradient=False)
    logits = model(x, keep_rate=g.meta['forward_keep_rate'])
    loss = F.cross_entropy(logits, paddle.to_tensor(g['in/target']), soft_label=True)
    loss.backward()
    expected = g.group(f'out/{mode}')
    assert_close(loss, expected['loss'].item(), 1e-5)
    np.testing.assert_allclose(x.grad, expected['grad_x'], 1e-3, 1e-4)
    grads = to_ours(model, g.group(f'out/{mode}/grad'))
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad, grads.pop(name), 1e-3, 1e-4, err_msg=name)
    assert not grads


def test_the_rate_set_on_the_model_holds_until_it_is_unset():
    g = golden('evit-depth4')
    model = load(build(g.meta['ctor']), g.group('sd'))
    model.eval()
    x = paddle.to_tensor(g['in/x'])
    default = model(x).numpy()
    model.set_keep_rate(0.95)
    assert_close(model(x), g['out/drop/rate095/logits'])
    model.set_keep_rate(1.0)
    assert model.forward_tokens(x)[1].counts == (49, 49, 49, 49)
    model.set_keep_rate(None)
    np.testing.assert_array_equal(model(x), default)


def test_indices_on_request():
    model = tiny(keep_rate=[1, 0.5, 0.5])
    logits, indices = model(paddle.randn([2, 3, 32, 32]), get_idx=True)
    assert logits.shape == [2, 5]
    assert [i.shape for i in indices] == [[2, 8], [2, 4]]
    assert all(i.dtype == paddle.int64 for i in indices)


def test_equal_scores_keep_the_order_of_the_image():
    reducer = EViTReducer(0, 0.5)
    state = TokenState(1, 6, class_attention=paddle.full([1, 7], 1 / 7))
    y, state = reducer(paddle.arange(7.0).reshape([1, 7, 1]), state)
    assert state.indices[0].tolist() == [[0, 1, 2]]
    assert y.flatten().tolist() == [0, 1, 2, 3]


def test_the_distillation_token_is_never_dropped():
    model = tiny(distilled=True, keep_rate=[0.25, 1, 1], fuse_token=True)
    x = paddle.randn([2, 3, 32, 32])
    seen = []
    hook = model.blocks[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.eval()
    model(x)
    dense = model.embed(x)
    dense = dense + model.blocks[0].attn(model.blocks[0].norm1(dense))[0]
    hook.remove()
    assert seen[0].shape == [2, 2 + 4 + 1, 24]
    np.testing.assert_allclose(seen[0][:, :2], model.blocks[0].norm2(dense)[:, :2], 1e-5, 1e-5)


@pytest.mark.parametrize(
    'rate, available, kept', [(0.6, 195, 117), (0.55, 400, 221), (0.7, 196, 138), (0.99, 49, 49), (1.0, 49, 49)]
)
def test_number_of_tokens_is_computed_in_double_precision(rate, available, kept):
    assert EViTReducer(0, 0.5).num_kept(TokenState(1, available, [rate], [None])) == kept


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 1), st.integers(1, 600))
def test_number_of_tokens_is_in_range(rate, available):
    kept = EViTReducer(0, rate).num_kept(TokenState(1, available, [None], [None]))
    assert max(1, rate * available) <= kept <= max(1, rate * available + 1)


def test_published_token_counts():
    after_three = {
        True: {0.9: (178, 162, 147), 0.8: (158, 128, 104), 0.7: (139, 99, 71), 0.6: (119, 73, 45), 0.5: (99, 51, 27)},
        False: {0.9: (177, 160, 144), 0.8: (157, 126, 101), 0.7: (138, 97, 68), 0.6: (118, 71, 43), 0.5: (98, 49, 25)},
    }
    for fuse, table in after_three.items():
        for rate, expected in table.items():
            state, counts = TokenState(1, 196, [None], [None]), []
            for _ in range(3):
                kept = EViTReducer(0, rate, fuse).num_kept(state)
                state = state._replace(num_body=kept + fuse)
                counts.append(state.num_body)
            assert tuple(counts) == expected


def test_errors():
    x = paddle.randn([1, 3, 32, 32])
    with pytest.raises(UserError, match='cannot keep 17 of 16'):
        tiny()(x, tokens=17)
    with pytest.raises(UserError, match='cannot keep 0 of 16'):
        tiny()(x, tokens=0)
    with pytest.raises(UserError, match='2 values for 3 blocks'):
        tiny()(x, keep_rate=[0.5, 0.5])
    with pytest.raises(UserError, match=r'\(0, 1\]'):
        tiny(keep_rate=0.0)


_COSTS = golden('evit-macs')['out/macs'].tolist()


@functools.lru_cache(maxsize=1)
def _dense(dim: int, heads: int, size: int, classes: int) -> VisionTransformer:
    return VisionTransformer(size, 16, 3, classes, dim, 12, heads)


@pytest.mark.parametrize('row', sorted(_COSTS), ids=lambda row: '-'.join(map(str, row[:6])))
def test_cost(row, zero_weights):
    dim, heads, size, classes, rate, fuse, *drop_loc, params, macs, _ = row
    model = _dense(dim, heads, size, classes)
    for i, block in enumerate(model.blocks):
        block.reducers = nn.LayerList([EViTReducer(i, rate / 1000 if i in drop_loc else 1.0, bool(fuse))])
    cost = profile(model, [1, 3, size, size])
    assert (cost.params, cost.macs) == (params, macs)
