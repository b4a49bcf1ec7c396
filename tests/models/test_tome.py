# SPDX-License-Identifier: Apache-2.0
"""Token merging against the original's numbers."""

import functools

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.exported import Predictor, save_program
from models.layers import TokenState, take_tokens
from models.layers.tome import Matching, match, match_groups, merge_schedule
from models.profile import profile
from models.vision_transformer import VisionTransformer
from models.weights.convert import port_state_dict
from tests.conftest import assert_close, golden
from tests.models.helpers import load, vision_transformer
from tests.models.test_vision_transformer import build, tiny
from utils.errors import UserError

MATCHES = golden('lambda_vit-tome_match')
FUNCTIONS = golden('lambda_vit-tome_functions')


def arrays(reference, prefix: str) -> dict:
    """The entries of a case, without its prefix."""
    return {name[len(prefix) :]: value for name, value in reference.items() if name.startswith(prefix)}


@pytest.mark.parametrize('case', MATCHES.meta['cases'], ids=lambda case: str(case['case']))
def test_matching(case):
    given_, expected = arrays(MATCHES, f'in/c{case["case"]}_'), arrays(MATCHES, f'out/c{case["case"]}_')
    x, size = paddle.to_tensor(given_['x']), paddle.to_tensor(given_['size'])
    matching = match(paddle.to_tensor(given_['metric']), case['r'], case['class_token'], case['distill_token'])
    if case['r_effective'] == 0:
        assert matching is None
        return
    np.testing.assert_array_equal(matching.unmerged.numpy() // 2, expected['unm_idx'])
    np.testing.assert_array_equal(matching.sources.numpy() // 2, expected['src_idx'])
    np.testing.assert_array_equal(matching.destinations, expected['dst_idx'])
    for mode in ('sum', 'mean', 'amax'):
        assert_close(matching.merge(x, mode), expected[f'merge_{mode}'], 1e-5)
    for name, sizes in (('wavg', None), ('wavg_sized', size)):
        merged, merged_size = matching.merge_weighted(x, sizes)
        assert_close(merged, expected[f'{name}_x'], 1e-5)
        assert_close(merged_size, expected[f'{name}_size'], 1e-5)
    source = matching.merge_source(paddle.eye(case['T']).expand([case['B'], -1, -1]))
    np.testing.assert_array_equal(source, expected['source'])
    if 'unmerge' in expected:
        assert_close(matching.unmerge(paddle.to_tensor(expected['merge_mean'])), expected['unmerge'], 1e-5)


@pytest.mark.parametrize('case', FUNCTIONS.meta['kth'], ids=lambda case: str(case['case']))
def test_matching_in_groups(case):
    given_, expected = arrays(FUNCTIONS, f'in/kth{case["case"]}_'), arrays(FUNCTIONS, f'out/kth{case["case"]}_')
    x = paddle.to_tensor(given_['x'])
    matching = match_groups(paddle.to_tensor(given_['metric']), case['k'])
    np.testing.assert_array_equal(matching.destinations, expected['dst_idx'])
    merged = matching.merge(x, 'mean')
    assert_close(merged, expected['merged'], 1e-5)
    assert_close(matching.merge(x), expected['sum'], 1e-5)
    assert_close(matching.unmerge(merged), expected['unmerged'], 1e-5)


def test_merging_twice_keeps_sizes_and_sources():
    x, size, source = paddle.to_tensor(FUNCTIONS['in/chain_x']), None, paddle.eye(18).expand([2, -1, -1])
    tokens = x
    for step, r in ((1, 3), (2, 2)):
        matching = match(paddle.to_tensor(FUNCTIONS[f'in/chain_metric{step}']), r)
        tokens, size = matching.merge_weighted(tokens, size)
        source = matching.merge_source(source)
        for name, value in (('x', tokens), ('size', size), ('source', source)):
            assert_close(value, FUNCTIONS[f'out/chain_{name}{step}'], 1e-5)
    np.testing.assert_array_equal(source.sum(-1), size.squeeze(-1))
    assert_close(paddle.matmul(source, x) / size, tokens, 1e-5)


@pytest.mark.parametrize('case', FUNCTIONS.meta['parse_r'], ids=lambda case: str(case['case']))
def test_schedules(case):
    r = tuple(case['r']) if case['kind'] == 'tuple' else case['r']
    assert merge_schedule(r, case['num_layers']) == case['result']


def test_a_schedule_cannot_be_negative():
    with pytest.raises(UserError, match='cannot merge -2 tokens'):
        merge_schedule((2, -2.0), 4)


def test_equal_tokens_go_by_position():
    matching = match(paddle.ones([1, 301, 8]), 3)
    assert matching.sources.tolist() == [[2, 4, 6]]
    assert matching.destinations.tolist() == [[0, 0, 0]]
    matching = match(paddle.ones([1, 300, 8]), 3, distill_token=True)
    assert matching.destinations.tolist() == [[1, 1, 1]]


def test_a_key_of_zeros_is_like_no_other():
    metric = paddle.randn([1, 9, 4])
    metric[:, 4] = 0.0
    matching = match(metric, 2)
    x, size = matching.merge_weighted(paddle.ones([1, 9, 3]))
    np.testing.assert_allclose(x, 1, 1e-6)
    assert size.sum().item() == 9


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(4, 40),
    r=st.integers(1, 25),
    prefix=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_invariants(tokens, r, prefix, seed):
    """Protected tokens stay in front, no token is lost, and undoing a merge of copies changes nothing."""
    rng = np.random.default_rng(seed)
    metric = paddle.to_tensor(rng.normal(size=(3, tokens, 5)).astype('float32'))
    matching = match(metric, r, prefix >= 1, prefix == 2)
    if matching is None:
        assert min(r, (tokens - prefix) // 2) < 1
        return
    eye = paddle.eye(tokens).expand([3, -1, -1])
    source = matching.merge_source(eye)
    assert source.shape == [3, tokens - min(r, (tokens - prefix) // 2), tokens]
    np.testing.assert_array_equal(source.sum(1), 1)  # each token is in exactly one
    np.testing.assert_array_equal(source.numpy()[:, :prefix, :prefix], np.eye(prefix)[None].repeat(3, 0))
    assert (source.numpy()[:, :prefix].sum(-1)[:, :1] == 1).all() or prefix == 0  # nothing joins the class token
    x = paddle.to_tensor(rng.normal(size=(3, tokens, 2)).astype('float32'))
    merged, size = matching.merge_weighted(x)
    assert_close(merged, paddle.matmul(source, x) / source.sum(-1, keepdim=True), 1e-5)
    assert_close(matching.unmerge(merged), paddle.matmul(source, merged, transpose_x=True), 1e-6)
    assert_close((merged * size).sum(1), x.sum(1), 1e-4)
    assert isinstance(matching, Matching)


def test_gradients_reach_every_token():
    x = paddle.randn([2, 9, 3])
    x.stop_gradient = False
    merged, _ = match(paddle.randn([2, 9, 4]), 3).merge_weighted(x)
    merged.sum().backward()
    assert_close(x.grad.sum([1, 2]), np.full(2, 6 * 3), 1e-5)
    assert (x.grad.numpy() > 0).all()


# ---------------------------------------------------------------------------------------------------- models
def outputs_of_blocks(model: VisionTransformer, x: np.ndarray):
    """Logits, final state, and after each block its tokens and their sizes."""
    seen = []
    hooks = [block.register_forward_post_hook(lambda _, __, out: seen.append(out)) for block in model.blocks]
    with paddle.no_grad():
        tokens, state = model.forward_tokens(paddle.to_tensor(x), trace=True)
        logits = model.forward_head(tokens)
    for hook in hooks:
        hook.remove()
    return logits, state, [tokens for tokens, _ in seen], [state.size for _, state in seen]


def check(model: VisionTransformer, x: np.ndarray, expected: dict) -> None:
    """Compares with the entries of a run of a golden."""
    logits, state, tokens, sizes = outputs_of_blocks(model, x)
    assert_close(logits, expected['logits'])
    assert [t.shape[1] for t in tokens] == expected['tokens_per_block'].tolist()
    assert [count + model.num_prefix for count in state.counts] == expected['tokens_per_block'].tolist()
    assert_close(state.size, expected['size'], 1e-6)
    if 'source' in expected:
        np.testing.assert_array_equal(state.source, expected['source'])
    np.testing.assert_array_equal(state.source.sum(-1, keepdim=True), state.size)
    for i, (token, size) in enumerate(zip(tokens, sizes)):
        if f'tokens_block{i}' in expected:
            assert_close(token, expected[f'tokens_block{i}'])
        if f'size_block{i}' in expected:
            assert_close(size, expected[f'size_block{i}'], 1e-6)


@pytest.mark.parametrize('name', ['tome_deit', 'tome_removed', 'tome_removed_schedule'])
def test_models(name):
    g = golden(f'lambda_vit-{name}')
    model = build(g.meta['ctor'], removed_layers=g.meta['done_layer'])
    fit = port_state_dict(model, g.group('sd'))
    model.set_state_dict(fit)
    model.eval()
    assert_close(model(paddle.to_tensor(g['in/x'])), g['out/logits_no_merge'])
    for run in g.meta['runs']:
        r = tuple(run['r']) if run['r_kind'] == 'tuple' else run['r']
        model.merge_tokens(r, g.meta['start_idx'], run['prop_attn'])
        check(model, g['in/x'], arrays(g, f'out/{run["run"]}_'))
    model.merge_tokens(0)
    assert_close(model(paddle.to_tensor(g['in/x'])), g['out/logits_no_merge'])


def test_distillation_token():
    g = golden('lambda_vit-tome_distilled')
    model = load(build(g.meta['ctor'], distilled=True), g.group('sd'))
    model.eval()
    assert_close(model(paddle.to_tensor(g['in/x'])), g['out/logits_no_merge'])
    model.merge_tokens(g.meta['r'], prop_attn=g.meta['prop_attn'])
    check(model, g['in/x'], arrays(g, 'out/'))


def test_gradients_recompute_and_types():
    """Training with merging: the same gradients with recompute, in any precision."""
    x = paddle.randn([2, 3, 32, 32])
    model = tiny(drop_path_rate=0.2)
    model.merge_tokens(3)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        paddle.seed(1)
        model(x).square().mean().backward()
        results.append([parameter.grad.numpy() for parameter in model.parameters()])
        model.clear_gradients()
    for plain, again in zip(*results):
        np.testing.assert_array_equal(plain, again)
        assert np.abs(plain).max() > 0
    assert model.to(dtype='float64')(x.astype('float64')).dtype == paddle.float64


@pytest.mark.parametrize('fuse', [False, True])
def test_evit_then_tome_in_one_block(fuse):
    """Of 16 patches 8 are kept (and one fused), then 3 merged; what the tokens stand for follows both."""
    model = tiny(keep_rate=[1, 0.5, 1], fuse_token=fuse)
    model.merge_tokens([2, 3, 1])
    model.eval()
    x = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype('float32')
    _, state, tokens, sizes = outputs_of_blocks(model, x)
    assert state.counts == (14, 7 + fuse - 3, 7 + fuse - 4)
    dense = model.embed(paddle.to_tensor(x))
    kept = state.indices[0]
    assert kept.shape == [2, 7]
    assert sizes[1].sum().item() <= 2 * 17 if fuse else sizes[1].sum().item() < 2 * 17
    source = state.source
    assert source.shape == [2, 1 + 7 + fuse - 4, dense.shape[1]]
    assert source.sum(1).max().item() == 1  # no patch is in two tokens
    assert (source.sum() == (2 * 17 if fuse else sizes[2].sum())).item()
    model.merge_tokens(0)
    assert model.forward_tokens(paddle.to_tensor(x))[1].counts == (16, 8 + fuse, 8 + fuse)


def test_keys_of_reduced_tokens_are_those_that_are_merged():
    """EViT keeps all but the least attended; merging by keys then equals matching the kept keys by hand."""
    model = tiny(keep_rate=[0.5, 1, 1])
    model.merge_tokens([3])
    model.eval()
    x = model.embed(paddle.randn([2, 3, 32, 32]))
    block = model.blocks[0]
    state = TokenState(1, 16)
    _, maps = block.attn(block.norm1(x), need_maps=True, need_keys=True)
    after, after_state = block(x, state)
    kept = after_state.indices[0]
    keys = paddle.concat([maps.keys[:, :1], take_tokens(maps.keys[:, 1:], kept)], axis=1)
    mixed = x + block.attn(block.norm1(x))[0]
    mixed = paddle.concat([mixed[:, :1], take_tokens(mixed[:, 1:], kept)], axis=1)
    merged, size = match(keys, 3).merge_weighted(mixed)
    merged = merged + block.mlp(block.norm2(merged))
    assert_close(after, merged, 1e-6)
    np.testing.assert_array_equal(after_state.size, size)


def test_pooling_averages_over_the_tokens_before_merging():
    model = tiny(global_pool=True, depth=1)
    model.blocks[0].mlp.fc2.weight.set_value(paddle.zeros_like(model.blocks[0].mlp.fc2.weight))
    model.eval()
    x = paddle.randn([2, 3, 32, 32])
    means = []
    for r in (0, 5):
        model.merge_tokens(r)
        means.append(model.forward_features(x)[:, 1:].mean(1).numpy())
    np.testing.assert_allclose(*means, 1e-4, 1e-5)


def test_export(tmp_path):
    paddle.seed(0)
    model = tiny(distilled=True, removed_layers=[1], keep_rate=[1, 1, 0.5], fuse_token=True)
    model.merge_tokens(3)
    save_program(model, [3, 32, 32], str(tmp_path / 'model'))
    predictor = Predictor(str(tmp_path / 'model'))
    for batch in (1, 3):
        x = paddle.randn([batch, 3, 32, 32])
        assert_close(predictor(x.numpy()), model(x), 1e-5)
    program = (tmp_path / 'model.json').read_text()
    assert 'scatter_nd_add' in program and 'index_add' not in program  # which paddle2onnx does not know


# ---------------------------------------------------------------------------------------------------- cost
PROFILE = golden('lambda_vit-profile')
SIZES = {'tiny': (192, 3), 'small': (384, 6), 'base': (768, 12)}


@functools.lru_cache(maxsize=1)
def sized(arch: str, *removed: int) -> VisionTransformer:
    dim, heads = SIZES[arch.split('_')[1]]
    return vision_transformer(embed_dim=dim, num_heads=heads, removed_layers=removed)


@pytest.mark.parametrize('row', range(len(PROFILE.meta['rows'])))
def test_cost(row, zero_weights):
    expected = PROFILE.meta['rows'][row]
    model = sized(expected['arch'], *expected['removed'])
    model.merge_tokens(expected['r'], expected['start_idx'])
    cost = profile(model)
    assert (cost.params, cost.macs) == (expected['params'], expected['macs'])
    assert cost.matching == expected['tome_score_macs']
    narrow = vision_transformer(embed_dim=8, num_heads=1, removed_layers=expected['removed'])  # as many tokens
    narrow.merge_tokens(expected['r'], expected['start_idx'])
    counts = narrow.forward_tokens(paddle.randn([1, 3, 224, 224]))[1].counts
    assert [1 + count for count in counts] == PROFILE['out/tokens_after_block'][row].tolist()
