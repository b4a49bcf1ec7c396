# SPDX-License-Identifier: Apache-2.0
"""Token merging against the original's numbers."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.layers.tome import Matching, match, match_groups, merge_schedule
from tests.conftest import assert_close, golden
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
