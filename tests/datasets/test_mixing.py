# SPDX-License-Identifier: Apache-2.0
"""Mixup, CutMix and soft targets against timm."""

import numpy as np
import paddle
import pytest

from datasets.mixing import Mixup, cutmix_box, mix_targets
from tests.conftest import golden
from utils.errors import UserError


class Given:
    """A stand-in for the random generator that returns given numbers, whatever distribution is asked for."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def __getattr__(self, name):
        return lambda *args, **kw: self.numbers.pop(0)


def assert_mixed(mixup, images, labels, rng, expected_images, expected_targets):
    mixed, targets = mixup(paddle.to_tensor(images), paddle.to_tensor(labels), rng)
    np.testing.assert_allclose(mixed.numpy(), expected_images, atol=1e-6)
    np.testing.assert_allclose(targets.numpy(), expected_targets, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- originals
def test_seeded_calls_in_all_modes():
    """Numpy's older generator, seeded alike, gives timm's images, targets and weights."""
    reference = golden('ms_mlp-mixup')
    images, labels = reference['in/x'], reference['in/y']
    for place, case in enumerate(reference.meta['configs']):
        settings = dict(case['mixup'])
        mixup = Mixup(smoothing=settings.pop('label_smoothing'), **settings)
        out = (reference[f'out/{place}_x'], reference[f'out/{place}_y'])
        assert_mixed(mixup, images, labels, np.random.RandomState(case['numpy_seed']), *out)
        _, shares = mixup.draw(4, 12, 10, np.random.RandomState(case['numpy_seed']))
        np.testing.assert_allclose(shares, reference[f'out/{place}_lam'], atol=1e-6)


def test_given_and_seeded_cases():
    reference = golden('evit-mixup')
    images, labels, meta = reference['in/x'], reference['in/label'], reference.meta
    for place, case in enumerate(meta['fixed']):
        cutmix = case['kind'] == 'cutmix'
        numbers = [0.0, 0.0 if cutmix else 0.9, case['lam'], *(case['centre_yx'] or [])]
        out = (reference[f'out/x{place}'], reference[f'out/target{place}'])
        assert_mixed(Mixup(7), images, labels, Given(*numbers), *out)
    for place, case in enumerate(meta['seeded'], len(meta['fixed'])):
        out = (reference[f'out/x{place}'], reference[f'out/target{place}'])
        assert_mixed(Mixup(7, mode=case['mode']), images, labels, np.random.RandomState(case['numpy_seed']), *out)
    for place, case in enumerate(meta['targets']):
        targets = mix_targets(paddle.to_tensor(labels), 7, np.array([case['lam']]), case['smoothing'])
        np.testing.assert_allclose(targets.numpy(), reference[f'out/tgt{place}'], atol=1e-6)


def test_stream_of_draws():
    """Twelve batches in a row from one generator: kind, weight after the area correction, box."""
    reference = golden('evit-mixup')
    rng = np.random.RandomState(reference.meta['stream_seed'])
    mixup = Mixup(7)
    for cutmix, _, share, y0, y1, x0, x1 in reference['out/stream']:
        maps, shares = mixup.draw(4, 224, 224, rng)
        np.testing.assert_allclose(shares, [share], rtol=1e-6)
        expected = np.full((224, 224), share, 'float32')
        if cutmix:
            expected[:] = 1
            expected[int(y0) : int(y1), int(x0) : int(x1)] = 0
        np.testing.assert_allclose(maps[0], expected, rtol=1e-6)


def test_targets_and_box_rule():
    reference = golden('gmlp-losses')
    labels = paddle.to_tensor(reference['in/labels'])
    for case in 'abc':
        targets = mix_targets(labels, 12, reference[f'in/lam_{case}'], float(reference[f'in/smoothing_{case}'][0]))
        np.testing.assert_allclose(targets.numpy(), reference[f'out/target_{case}'], atol=1e-6)
    for (height, width, cy, cx), share, expected, corrected in zip(
        reference['in/bbox_cases_H_W_cy_cx'].tolist(),
        reference['in/bbox_cases_lam'],
        reference['out/bbox_cases_y1_y2_x1_x2'].tolist(),
        reference['out/bbox_cases_lam_corrected'],
    ):
        box = cutmix_box(height, width, share, cy, cx)
        assert list(box) == expected
        y0, y1, x0, x1 = box
        assert 1 - (y1 - y0) * (x1 - x0) / (height * width) == pytest.approx(corrected, rel=1e-6)


def test_images_of_losses_golden(monkeypatch):
    reference = golden('gmlp-losses')
    images, labels = reference['in/x'], reference['in/labels']
    mixed, _ = Mixup(12)(paddle.to_tensor(images), paddle.to_tensor(labels), Given(0.0, 0.9, 0.3))
    np.testing.assert_allclose(mixed.numpy(), reference['out/mixup'], atol=1e-6)
    mixup = Mixup(12)
    monkeypatch.setattr(mixup, '_box', lambda *_: reference['in/bbox_y1_y2_x1_x2'].tolist())
    mixed, _ = mixup(paddle.to_tensor(images), paddle.to_tensor(labels), Given(0.0, 0.0, 0.5))
    np.testing.assert_allclose(mixed.numpy(), reference['out/cutmix'], atol=1e-6)
    _, shares = mixup.draw(6, 10, 14, Given(0.0, 0.0, 0.5))
    np.testing.assert_allclose(shares, reference['out/cutmix_lam'], atol=1e-6)


def test_mae_lite_mixing():
    reference = golden('mae_lite-mix_loss')
    images, labels, meta = reference['in/x'], reference['in/target'], reference.meta
    lam, cut = meta['mixup_lam'], meta['cutmix']
    for smoothing, key in ((0.0, 's0'), (0.1, 's1')):
        out = (reference['out/mixup_x'], reference[f'out/mixup_target_{key}'])
        assert_mixed(Mixup(10, smoothing=smoothing), images, labels, Given(0.0, 0.9, lam), *out)
    rng = Given(0.0, 0.0, cut['lam'], cut['cy'], cut['cx'])
    assert_mixed(Mixup(10), images, labels, rng, reference['out/cutmix_x'], reference['out/cutmix_target_s1'])


# ---------------------------------------------------------------------------------------------------- properties
@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('size', [1, 2, 5])
def test_any_batch_size(mode, size):
    """Targets sum to one; pixels come from the image or its partner; a lone or middle image of pairs stays."""
    images = np.random.default_rng(0).random((size, 3, 8, 8), 'float32')
    labels = np.arange(size)
    for seed in range(10):
        mixed, targets = Mixup(6, mode=mode)(
            paddle.to_tensor(images), paddle.to_tensor(labels), np.random.default_rng(seed)
        )
        assert mixed.shape == [size, 3, 8, 8]
        np.testing.assert_allclose(targets.numpy().sum(1), 1, rtol=1e-5)
        low, high = np.minimum(images, images[::-1]), np.maximum(images, images[::-1])
        assert (mixed.numpy() >= low - 1e-6).all()
        assert (mixed.numpy() <= high + 1e-6).all()
        if size % 2:
            np.testing.assert_allclose(mixed.numpy()[size // 2], images[size // 2], rtol=1e-6)


def test_nothing_drawn_leaves_images_alone():
    """No mixing: the same tensor comes back, targets are smoothed."""
    images, labels = paddle.rand([4, 3, 8, 8]), paddle.to_tensor([0, 1, 2, 3])
    for mode in ('batch', 'pair', 'elem'):
        mixed, targets = Mixup(5, prob=0.0, mode=mode)(images, labels, np.random.default_rng(0))
        assert mixed is images
        np.testing.assert_allclose(targets.numpy(), np.eye(5, dtype='float32')[:4] * 0.9 + 0.02, atol=1e-7)


def test_probabilities():
    """Mixing at all with `prob`, cutmix with `switch_prob`, one kind alone when the other is off."""

    def kinds(**settings):
        mixup, rng = Mixup(5, **settings), np.random.default_rng(0)
        cutmix = mixed = 0
        for _ in range(600):
            maps, _ = mixup.draw(2, 40, 40, rng)
            if maps is not None:
                mixed += 1
                cutmix += set(np.unique(maps)) <= {0.0, 1.0}
        return mixed / 600, cutmix / max(mixed, 1)

    mixed, cutmix = kinds(prob=0.3, switch_prob=0.7)
    assert 0.24 < mixed < 0.36
    assert 0.6 < cutmix < 0.8
    assert kinds(cutmix_alpha=0.0)[1] == 0
    assert kinds(mixup_alpha=0.0)[1] == 1


def test_minmax_box():
    """Sides between the given shares, box inside; switches cutmix on by itself."""
    mixup, rng = Mixup(5, mixup_alpha=0.0, cutmix_alpha=0.0, cutmix_minmax=(0.25, 0.5)), np.random.default_rng(0)
    for _ in range(100):
        maps, shares = mixup.draw(2, 40, 60, rng)
        rows, columns = (maps[0] == 0).any(1).sum(), (maps[0] == 0).any(0).sum()
        assert 10 <= rows < 20
        assert 15 <= columns < 30
        assert shares[0] == pytest.approx(1 - rows * columns / 2400, rel=1e-6)


def test_wrong_minmax():
    with pytest.raises(UserError, match='CUTMIX_MINMAX'):
        Mixup(5, cutmix_minmax=(0.8, 0.3))
