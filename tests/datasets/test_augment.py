# SPDX-License-Identifier: Apache-2.0
"""Every operation on pictures against the originals; what the policies draw."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from datasets import augment
from datasets.augment import BICUBIC, BILINEAR, INCREASING, INCREASING_PADDLEVIT, NEAREST, ORIGINAL, Style, StyleSampler
from tests.conftest import golden


def picture(pixels) -> Image.Image:
    return Image.fromarray(pixels.astype('uint8'))


def assert_same(image: Image.Image, expected, name: str) -> None:
    assert np.array_equal(np.asarray(image, 'int64'), expected), name


# ---------------------------------------------------------------------------------------------------- operations
def test_paddlevit_operations():
    """Each operation, level and sign of PaddleViT's policies: the argument and the pixels."""
    reference = golden('paddlevit_conventions-augment_ops')
    image = picture(reference['in/image'])
    canvas = StyleSampler('paddlevit', 'bicubic', (1, 2, 3))
    operations = {**ORIGINAL, **INCREASING_PADDLEVIT}
    checked = set()
    for case, arguments in reference.meta['args'].items():
        name, level, sign = case.split('_')
        if name in operations:
            operation = operations[name]
            severity = float(level) / 10 * (-1 if sign == 'n' else 1)
            assert arguments == pytest.approx([] if operation.argument is None else [operation.argument(severity)])
            style = canvas.style(name, np.random.default_rng(0))
            assert_same(operation(image, float(level), sign == 'n', style), reference[f'out/{case}'], case)
            checked.add(name)
    assert checked == set(operations)


def test_timm_operations():
    """rand-m9-mstd0.5-inc1: arguments over all levels, pixels at level 9 with both signs."""
    reference = golden('evit-randaug')
    image, style = picture(reference['in/img']), Style(BICUBIC, (124, 116, 104))
    assert reference.meta['ops'] == list(INCREASING)
    for place, (name, operation) in enumerate(INCREASING.items()):
        for level, argument in zip(reference['in/levels'], reference['out/args'][place]):
            expected = -999 if operation.argument is None else operation.argument(float(level) / 10)
            assert argument == pytest.approx(expected, rel=1e-6, abs=1e-6)
        for sign in 'pn':
            assert_same(operation(image, 9, sign == 'n', style), reference[f'out/op{place}{sign}'], name + sign)


def test_timm_operations_at_other_magnitudes():
    """Among them 10, where posterising leaves no bit."""
    reference = golden('ms_mlp-randaug')
    image, style = picture(reference['in/img']), Style(BICUBIC, (124, 116, 104))
    for case, expected in reference.group('out').items():
        name, magnitude, sign = case.split('_')
        assert_same(INCREASING[name](image, float(magnitude), sign == 'm', style), expected, case)


def test_enhancement_primitives():
    reference = golden('mocov3-augops')
    image, jitter = picture(reference['in/img']), reference.meta['jitter']
    assert_same(augment.solarize(image, 128), reference['out/solarize'], 'solarize')
    assert_same(augment.brightness(image, jitter['brightness']), reference['out/brightness'], 'brightness')
    assert_same(augment.contrast(image, jitter['contrast']), reference['out/contrast'], 'contrast')
    assert_same(augment.color(image, jitter['saturation']), reference['out/saturation'], 'saturation')


GEOMETRIC = [name for name, operation in INCREASING.items() if operation.geometric]


@pytest.mark.parametrize(('resample', 'bound'), [(BILINEAR, 0.9), (BICUBIC, 1.3)])
@pytest.mark.parametrize('name', GEOMETRIC)
def test_opencv_stays_close_to_pillow(name, resample, bound):
    """The same motion and fill color, of both signs; pixels differ by rounding and by the sharpness of the filter."""
    smooth = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(smooth).resize((112, 90), BICUBIC)
    for negative in (False, True):
        exact, fast = (
            np.asarray(INCREASING[name](image, 7, negative, Style(resample, (124, 116, 104), fast)), int)
            for fast in (False, True)
        )
        assert np.abs(exact - fast).mean() < bound
        filled = (exact == (124, 116, 104)).all(-1)
        assert filled.mean() > 0.02
        assert (fast[filled] == (124, 116, 104)).all(-1).mean() > 0.75


def test_nearest_neighbor_is_pillows():
    image = picture(np.random.default_rng(0).integers(0, 256, (20, 30, 3)))
    for name in GEOMETRIC:
        exact, fast = (INCREASING[name](image, 7, False, Style(NEAREST, (1, 2, 3), fast)) for fast in (False, True))
        assert exact.tobytes() == fast.tobytes()


@pytest.mark.parametrize('bits', range(9))
def test_posterize_like_pillow(bits):
    image = picture(np.arange(256).reshape(16, 16))
    expected = np.zeros((16, 16)) if bits == 0 else np.asarray(ImageOps.posterize(image, bits))
    assert_same(augment.posterize(image, bits), expected, bits)


# ---------------------------------------------------------------------------------------------------- policies
@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('space', ['timm', 'paddlevit'])
def test_policies_keep_size_and_mode(space, mode):
    image = picture(np.random.default_rng(0).integers(0, 256, (12, 15, 3))).convert(mode)
    canvas = StyleSampler(space, 'random', 128 if mode == 'L' else (128, 128, 128))
    for policy in (augment.RandAugment(2, 9, canvas), augment.AutoAugment(canvas), augment.ColorJitter(0.4, 0.4, 0.4)):
        for seed in range(60):
            result = policy(image, np.random.default_rng(seed))
            assert (result.size, result.mode) == (image.size, mode)


def test_randaugment_draws():
    """Two of fifteen with replacement, each applied half of the time, both signs, magnitude N(9, 0.5) in [0, 10]."""
    calls = []

    def record(name):
        return lambda image, magnitude, negative, style: calls.append((name, magnitude, negative)) or image

    policy = augment.RandAugment(2, 9, StyleSampler('timm', 'bicubic', (0, 0, 0)))
    policy.operations = {name: record(name) for name in INCREASING}
    runs = 4000
    rng = np.random.default_rng(0)
    for _ in range(runs):
        policy(None, rng)
    names, magnitudes, signs = zip(*calls)
    magnitudes = np.array(magnitudes)
    assert abs(len(calls) / (2 * runs) - 0.5) < 0.03
    assert abs(np.mean(signs) - 0.5) < 0.03
    counts = np.array([names.count(name) for name in INCREASING])
    assert abs(counts / len(calls) - 1 / 15).max() < 0.02
    assert abs(magnitudes.mean() - 9) < 0.03
    assert abs(magnitudes[magnitudes < 10].std() - 0.5) < 0.05
    assert magnitudes.max() == 10.0


def test_interpolation_of_operations():
    rng = np.random.default_rng(0)
    drawn = {StyleSampler('timm', 'random', 7).style('Rotate', rng) for _ in range(50)}
    assert drawn == {Style(BILINEAR, 7), Style(BICUBIC, 7)}
    assert StyleSampler('timm', 'bilinear', 7).style('Rotate', rng) == Style(BILINEAR, 7)
    assert StyleSampler('paddlevit', 'bicubic', (1, 2, 3)).style('Rotate', rng) == Style(NEAREST, (0, 0, 0))
    assert StyleSampler('paddlevit', 'bicubic', 7).style('ShearX', rng) == Style(NEAREST, 128)


def test_imagenet_policy_is_complete():
    assert len(augment.IMAGENET_POLICY) == 25
    assert {name for pair in augment.IMAGENET_POLICY for name, _, _ in pair} == set(ORIGINAL)


def test_color_jitter_range():
    """Brightness of a gray picture is scaled by 0.6 to 1.4; contrast and saturation leave it alone."""
    image = picture(np.full((4, 4, 3), 100))
    jitter = augment.ColorJitter(0.4, 0.4, 0.4)
    values = [np.asarray(jitter(image, np.random.default_rng(seed)))[0, 0, 0] for seed in range(300)]
    assert 60 <= min(values) < 65
    assert 135 < max(values) <= 140
