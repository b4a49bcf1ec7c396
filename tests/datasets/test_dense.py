# SPDX-License-Identifier: Apache-2.0
"""Transforms of dense prediction against mmsegmentation's, with its draws."""

import numpy as np
import pytest
from PIL import Image

from config import get_config
from datasets.batch import to_device
from datasets.dense import (
    ClassCrop,
    Distortion,
    Pad,
    PhotometricDistortion,
    ScaledImages,
    ScaledResize,
    dense_transform,
    distort,
    hue_shifted,
    linear,
    resized,
    saturated,
    scaled_size,
    window_size,
)
from datasets.loader import Batch
from datasets.sample import IMAGE_SIZE, VALID, LabelMap, Placement, Plane, Sample
from datasets.segmentation import LABELS, LabelCoding, label_table
from datasets.transforms import FastFlip
from tests.conftest import golden
from utils.errors import UserError

MEAN, STD = np.array([123.675, 116.28, 103.53]) / 255, np.array([58.395, 57.12, 57.375]) / 255


class Replay:
    """A generator that returns given draws, in order."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def next(self, *args):
        return self.draws.pop(0)

    random = uniform = integers = next


def test_sizes():
    g = golden('segmentation-resize')
    for (height, width), scale, size, test in zip(g['in/hw'], g['out/scale'], g['out/size'], g['out/test_size']):
        assert scaled_size((height, width), scale.tolist()) == tuple(size)
        assert ScaledImages((2048, 512), [1.0], None).size((width, height), 1.0) == tuple(test[::-1])
    draws = [ScaledResize((2048, 512), (0.5, 2.0)).draw((4, 3), Replay(u), {}) for u in g['in/u']]
    assert [draw.size for draw in draws] == [scaled_size((4, 3), scale.tolist()) for scale in g['out/drawn_scale']]


def test_sizes_of_several_scales_with_windows():
    for height, width, ratio, *expected in golden('segmentation-resize')['out/multi_scale'].tolist():
        size = (int(width), int(height))
        found = ScaledImages((2048, 512), [0.5, 1.0], 512).size(size, ratio)
        assert found == (expected[1], expected[0]) == window_size(size, max(int(512 * ratio), 512))


@pytest.mark.parametrize('index', range(6))
def test_resizing(index):
    g = golden('segmentation-resize')
    height, width = g['in/targets'][index].tolist()
    assert np.abs(resized(g['in/rgb'], (width, height)).astype(int) - g[f'out/rgb{index}']).max() <= 1
    whole = Placement((0, 0, *g['in/labels'].shape[::-1]), (width, height))
    np.testing.assert_array_equal(LabelMap(g['in/labels']).placed(whole).pixels, g[f'out/labels{index}'])


def test_crops_with_a_limit_for_one_class():
    g = golden('segmentation-crop')
    crop = ClassCrop(tuple(g.meta['crop_size']), g.meta['cat_max_ratio'])
    for (scene, _, drawn, *expected), candidates in zip(g['out/choice'].tolist(), g['in/candidates']):
        labels = LabelMap(g[f'in/labels{scene}'])
        rng = Replay(*candidates.reshape(-1).tolist())
        left, top, right, bottom = crop.draw(labels.pixels.shape[::-1], rng, {LABELS: labels}).box
        assert [top, left, bottom - top, right - left] == expected
        assert len(rng.draws) == 2 * (11 - drawn)


def test_operations_on_colors():
    g = golden('segmentation-photometric')
    rgb = g['in/rgb']
    for index in range(5):
        np.testing.assert_array_equal(linear(rgb, offset=g['in/beta'][index]), g['out/brightness'][index])
        np.testing.assert_array_equal(linear(rgb, g['in/alpha'][index]), g['out/contrast'][index])
        np.testing.assert_array_equal(saturated(rgb, g['in/alpha'][index]), g['out/saturation'][index])
        np.testing.assert_array_equal(hue_shifted(rgb, g['in/hue_delta'][index]), g['out/hue'][index])


def replay(row):
    """The draws of a row of the golden in the order in which they are made."""
    brightness, beta, mode, contrast, alpha, saturation, factor, hue, delta = row
    drawn = [brightness, *([beta] if brightness else []), mode]
    contrasts = [contrast, *([alpha] if contrast else [])]
    drawn += contrasts if mode else []
    drawn += [saturation, *([factor] if saturation else []), hue, *([delta] if hue else [])]
    return Replay(*drawn, *([] if mode else contrasts))


def test_photometric_distortion():
    g = golden('segmentation-photometric')
    for row, expected in zip(g['in/draws'], g['out/distorted']):
        rng = replay(row.tolist())
        np.testing.assert_array_equal(PhotometricDistortion()(g['in/rgb'], rng), expected)
        assert not rng.draws


def test_draws_of_a_distortion_cover_their_ranges():
    draws = [PhotometricDistortion().draw(np.random.default_rng(seed)) for seed in range(400)]
    for name, low, high in (
        ('brightness', -32, 32),
        ('contrast', 0.5, 1.5),
        ('saturation', 0.5, 1.5),
        ('hue', -18, 17),
    ):
        values = [getattr(draw, name) for draw in draws if getattr(draw, name) is not None]
        assert 150 < len(values) < 250
        assert low <= min(values) and max(values) <= high
        assert min(values) - low < 0.1 * (high - low) > high - max(values)
    assert {draw.contrast_first for draw in draws} == {False, True}


def test_stored_values_with_the_zero_reduced():
    reduced = golden('segmentation-pipeline')['out/reduced_0_to_255']
    np.testing.assert_array_equal(label_table(254, 255, LabelCoding(reduce_zero=True))[:256], reduced)


@pytest.mark.parametrize('index', range(4))
def test_the_whole_transform(index):
    g = golden('segmentation-pipeline')
    drawn, crop = g.meta['draws'][index], tuple(g.meta['crop_size'])
    sample = Sample(g['in/rgb'], {LABELS: LabelMap(g['out/labels'])})
    height, width = drawn['resized']
    whole = Placement((0, 0, *g['in/rgb'].shape[1::-1]), (width, height))
    assert scaled_size(g['in/rgb'].shape[:2], drawn['scale']) == (height, width)
    sample = Sample(resized(sample.image, (width, height)), sample.placed(whole))
    offsets = [offset for pair in drawn['crops'] for offset in pair]
    sample = ClassCrop(crop, 0.75).joint(sample, Replay(*offsets))
    sample = FastFlip(0.5).joint(sample, Replay(0.0 if drawn['flip'] else 0.9))
    assert np.abs(sample.image.astype(int) - g[f'out/geometric{index}_rgb']).max() <= 1
    np.testing.assert_array_equal(sample.targets[LABELS].pixels, g[f'out/geometric{index}_labels'])
    sample = Pad(crop).joint(Sample(g[f'out/distorted{index}_rgb'], sample.targets), None)
    np.testing.assert_array_equal(sample.targets[LABELS].pixels, g[f'out/final{index}_labels'])
    assert tuple(sample.targets[VALID]) == g[f'out/distorted{index}_rgb'].shape[:2]
    batch = Batch(sample.image[None], {VALID: sample.targets[VALID][None]}, np.zeros(1, 'int64'))
    np.testing.assert_allclose(to_device(batch, MEAN, STD).images.numpy()[0], g[f'out/image{index}'], atol=1e-5)


def test_evaluation_keeps_the_label_map():
    g = golden('segmentation-pipeline')
    labels = LabelMap(g['out/labels'])
    sample = ScaledImages(g.meta['img_scale'], [1.0, 0.5], None).joint(Sample(g['in/rgb'], {LABELS: labels}))
    assert np.abs(sample.image.astype(int) - g['out/eval_rgb']).max() <= 1
    assert sample.targets[LABELS] is labels
    assert tuple(sample.targets[IMAGE_SIZE]) == labels.pixels.shape
    assert [image.shape for image in sample.arrays()['scales']] == [(24, 34, 3)]


OPTIONS = [
    *(
        'TRAIN.TASK',
        'segmentation',
        'MODEL.TYPE',
        'segmenter',
        'DATA.CROP_SIZE',
        (24, 40),
        'DATA.IMAGE_SCALE',
        (128, 32),
    ),
]


def test_configured_transforms():
    config, rng = get_config(opts=OPTIONS), np.random.default_rng(0)
    transform = dense_transform(config, True, [Plane(LABELS, (24, 40))])
    picture = Image.fromarray(rng.integers(0, 256, (45, 50, 3)).astype('uint8'))
    labels = LabelMap(rng.integers(0, 3, (45, 50)).astype('uint8'))
    one, same, other = (transform(Sample(picture, {LABELS: labels}), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.image.shape == (24, 40, 3)
    assert one.arrays()[LABELS].shape == (24, 40)
    np.testing.assert_array_equal(one.image, same.image)
    assert not np.array_equal(one.image, other.image)
    height, width = one.targets[VALID]
    assert (one.arrays()[LABELS][height:] == 255).all() and (one.arrays()[LABELS][:, width:] == 255).all()
    whole = dense_transform(config, False)(Sample(picture), None)
    assert whole.image.shape == (32, 36, 3)
    gray = get_config(opts=[*OPTIONS, 'DATA.IMAGE_CHANNELS', 1, 'TRAIN.PHOTOMETRIC', False])
    assert dense_transform(gray, True)(Sample(picture, {LABELS: labels}), np.random.default_rng(1)).image.shape == (
        24,
        40,
        1,
    )
    with pytest.raises(UserError, match='TRAIN.PHOTOMETRIC'):
        dense_transform(get_config(opts=[*OPTIONS, 'DATA.IMAGE_CHANNELS', 1]), True)


def test_nothing_drawn_changes_nothing():
    rgb = golden('segmentation-photometric')['in/rgb']
    np.testing.assert_array_equal(distort(rgb, Distortion(None, True, None, None, None)), rgb)
