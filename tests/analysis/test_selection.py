# SPDX-License-Identifier: Apache-2.0
"""Entropies and selected layers against reference values."""

import math

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.selection import FEATURE, HEAD, ChannelStatistics, branch_entropies, entropy, select_layers
from engine.distributed import Context
from tests.conftest import assert_close, golden
from tests.models.helpers import load
from tests.models.test_vision_transformer import build, tiny
from utils.errors import UserError

ALONE = Context(0, 1, False)
ENTROPY, NOSE = golden('lambda_vit-entropy'), golden('lambda_vit-nose')


def gathered(samples: np.ndarray, *sizes: int) -> ChannelStatistics:
    """Accumulate samples in batches of these sizes, then the rest."""
    statistics = ChannelStatistics()
    for batch in filter(len, np.split(samples, np.cumsum(sizes))):
        statistics.add(paddle.to_tensor(batch))
    return statistics


@pytest.mark.parametrize('sizes', [(), (16, 16, 16), (1, 40, 2)])
def test_entropies(sizes):
    values = {}
    for name, target, key in (
        ('feat_full', FEATURE, 'H_feature_full'),
        ('feat_skipped', FEATURE, 'H_feature_skipped'),
        ('logits_full', HEAD, 'H_head_full'),
        ('logits_skipped', HEAD, 'H_head_skipped'),
    ):
        values[key] = entropy(gathered(ENTROPY[f'in/{name}'], *sizes), target, ALONE)
        assert values[key] == pytest.approx(ENTROPY[f'out/{key}'].item(), abs=1e-4)
    assert values['H_feature_full'] - values['H_feature_skipped'] == pytest.approx(
        ENTROPY['out/TE_feature'].item(), abs=1e-4
    )
    assert values['H_head_full'] - values['H_head_skipped'] == pytest.approx(ENTROPY['out/TE_head'].item(), abs=1e-4)
    constants = 16 * (0.5 * math.log(2 * math.pi) + 0.5)
    assert values['H_feature_full'] + constants == pytest.approx(
        ENTROPY['out/H_feature_full_with_constants'].item(), abs=1e-4
    )
    assert abs(values['H_feature_full'] - ENTROPY['out/wrong_mean_of_per_batch_H'].item()) > 0.1
    tokens = ENTROPY['in/tokens'].reshape(-1, 16)
    assert entropy(gathered(tokens, *sizes), FEATURE, ALONE) == pytest.approx(
        ENTROPY['out/H_layer_tokens'].item(), abs=1e-4
    )
    deviations = gathered(ENTROPY['in/feat_full'], *sizes).std(ALONE)
    assert_close(np.log(deviations), ENTROPY['out/log_sigma_per_channel_full'], 1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99), st.sampled_from([0.0, 1e4]))
def test_batches_change_nothing(sizes, seed, offset):
    """Also far from zero, where a sum of squares loses all digits."""
    samples = np.random.default_rng(seed).normal(offset, 1e-3, (sum(sizes) + 1, 3))
    np.testing.assert_allclose(gathered(samples, *sizes).std(ALONE, 1), samples.std(0, ddof=1), 1e-8)


def test_processes_change_nothing():
    """Two processes with unequal shards."""
    samples = np.random.default_rng(0).normal(5.0, 1.0, (30, 4))
    shares = [gathered(samples[:7], 3), gathered(samples[7:], 5, 9)]

    class Meeting:
        """All-reduce between two threads, in call order."""

        def __init__(self, mine, other):
            self.mine, self.other, self.place = mine, other, 0

        def sum(self, values):
            count = self.mine.count + self.other.count
            mean = (self.mine.mean * self.mine.count + self.other.mean * self.other.count) / count
            brought = [
                paddle.to_tensor([self.other.count], 'float64'),
                self.other.mean * (self.other.count / count),
                self.other.deviations + (self.other.mean - mean).square() * self.other.count,
            ][self.place]
            self.place += 1
            return values + brought

    for mine, other in (shares, shares[::-1]):
        np.testing.assert_allclose(mine.std(Meeting(mine, other)), samples.std(0), 1e-12)


def test_a_channel_that_never_changes_stays_finite():
    samples = np.ones((8, 3))
    samples[:, 0] = np.arange(8)
    value = entropy(gathered(samples), FEATURE, ALONE)
    assert np.isfinite(value) and value < -1000
    with pytest.raises(UserError, match='1 images are too few'):
        entropy(gathered(samples[:1]), HEAD, ALONE)


@pytest.mark.parametrize('target', [HEAD, FEATURE])
@pytest.mark.parametrize('size', [20, 96])
def test_selection(target, size):
    model = load(build(NOSE.meta['ctor']), NOSE.group('sd'))
    images = NOSE['in/images']
    batches = lambda step: (paddle.to_tensor(images[i : i + size]) for i in range(0, len(images), size))  # noqa: E731
    steps = list(select_layers(model, batches, NOSE.meta['steps'], ALONE, target))
    assert [step.chosen for step in steps] == NOSE[f'out/{target}_order'].tolist()
    for i, step in enumerate(steps):
        assert step.base == pytest.approx(NOSE[f'out/{target}_H_base'][i], abs=2e-3)
        expected = {
            layer: value for layer, value in enumerate(NOSE[f'out/{target}_TE'][i].tolist()) if not math.isnan(value)
        }
        assert step.transfer == pytest.approx(expected, abs=2e-3)
        for layer, value in step.entropies.items():
            assert value == pytest.approx(NOSE[f'out/{target}_H_candidate'][i, layer], abs=2e-3)
    assert [block.attn_weight for block in model.blocks] == [1.0] * 6


def test_of_equal_layers_the_first_goes():
    model = tiny(depth=4)
    for block in model.blocks:  # attention that adds nothing
        block.attn.proj.weight.set_value(paddle.zeros_like(block.attn.proj.weight))
    images = paddle.randn([6, 3, 32, 32])
    assert [step.chosen for step in select_layers(model, lambda step: [images], 3, ALONE)] == [0, 1, 2]


def test_branches():
    """Branch outputs as the blocks make them, of all tokens."""
    model = tiny(removed_layers=[1])
    model.eval()
    images = paddle.randn([6, 3, 32, 32])
    found = branch_entropies(model, [images[:4], images[4:]], ALONE)
    assert set(found['attn']) == {0, 2} and set(found['mlp']) == {0, 1, 2}
    x = model.embed(images)
    block = model.blocks[0]
    attention = block.attn(block.norm1(x))[0]
    perceptron = block.mlp(block.norm2(x + attention))
    for name, output in (('attn', attention), ('mlp', perceptron)):
        expected = np.log(output.numpy().reshape(-1, 24).astype('float64').std(0)).sum()
        assert found[name][0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize('number', [0, 3])
def test_mistakes(number):
    with pytest.raises(UserError, match=f'cannot select {number} attention layers: the model has 3'):
        next(select_layers(tiny(), lambda step: [], number, ALONE))
