# SPDX-License-Identifier: Apache-2.0
"""Which images each process sees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import samplers
from datasets.samplers import EvalSampler, RepeatedSampler, TrainSampler
from tests.conftest import golden
from utils.errors import UserError

sizes, worlds = st.integers(1, 60), st.integers(1, 9)


@settings(deadline=None, derandomize=True)
@given(sizes, worlds, st.integers(0, 3))
def test_training_covers_the_data(size, world, epoch):
    """All ranks together: a permutation, continued from its start to a multiple of the world size."""
    sampler = TrainSampler(size, world, seed=1)
    parts = [sampler.epoch(epoch, rank) for rank in range(world)]
    assert all(len(indices) == sampler.length(rank) for rank, (indices, _) in enumerate(parts))
    merged = np.stack([indices for indices, _ in parts], 1).reshape(-1)
    repeats = np.stack([repeats for _, repeats in parts], 1).reshape(-1)
    assert sorted(merged[:size]) == list(range(size))
    assert np.array_equal(merged, np.resize(merged[:size], len(merged)))
    assert np.array_equal(repeats, np.arange(len(merged)) // size)


def test_training_order_depends_on_seed_and_epoch():
    first = TrainSampler(50, 1, seed=0).epoch(0, 0)[0]
    assert np.array_equal(first, TrainSampler(50, 1, seed=0).epoch(0, 0)[0])
    assert not np.array_equal(first, TrainSampler(50, 1, seed=0).epoch(1, 0)[0])
    assert not np.array_equal(first, TrainSampler(50, 1, seed=1).epoch(0, 0)[0])


@settings(deadline=None, derandomize=True)
@given(sizes, worlds)
def test_evaluation_counts_each_image_once(size, world):
    sampler = EvalSampler(size, world)
    parts = [sampler.epoch(0, rank)[0] for rank in range(world)]
    assert [len(part) for part in parts] == [sampler.length(rank) for rank in range(world)]
    assert sorted(np.concatenate(parts)) == list(range(size))
    assert all((part % world == rank).all() for rank, part in enumerate(parts))


def test_repeated_augmentation_like_deit(monkeypatch):
    reference = golden('evit-sampler')
    for place, case in enumerate(reference.meta['cases']):
        order = reference[f'in/order{place}']
        monkeypatch.setattr(samplers, 'permutation', lambda *_, order=order: order)
        if case['n'] < 256:
            with pytest.raises(UserError, match='at least 256 training images, but there are 200'):
                RepeatedSampler(case['n'], case['world'], 0)
            continue
        sampler = RepeatedSampler(case['n'], case['world'], 0)
        for rank in range(case['world']):
            indices, repeats = sampler.epoch(case['epoch'], rank)
            assert np.array_equal(indices, reference[f'out/ra{place}/rank{rank}'])
            assert len(indices) == sampler.length(rank)
            # copy number r of an image is its draw r
            places = np.arange(rank, case['world'] * len(indices), case['world'])
            assert np.array_equal(repeats, places % 3)


def test_repeated_augmentation_unshuffled(monkeypatch):
    reference = golden('lambda_vit-rasampler')
    size = int(reference['in/n'][0])
    monkeypatch.setattr(samplers, 'permutation', lambda *_: np.arange(size))
    for world, rank, length, *_ in reference['out/sizes']:
        expected = reference.get(f'out/idx_world{world}_rank{rank}')
        sampler = RepeatedSampler(size, int(world), 0)
        assert sampler.length(int(rank)) == length
        if expected is not None:
            assert np.array_equal(sampler.epoch(0, int(rank))[0], expected)


def test_repeated_augmentation_of_imagenet():
    assert RepeatedSampler(1281167, 8, 0).length(3) == 160128
