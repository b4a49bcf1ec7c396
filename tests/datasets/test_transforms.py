# SPDX-License-Identifier: Apache-2.0
"""The transforms and random erasing."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config import get_config
from datasets import batch as batching
from datasets.augment import BICUBIC, BILINEAR, AutoAugment, ColorJitter, RandAugment
from datasets.batch import to_device
from datasets.erasing import RandomErasing
from datasets.loader import Batch
from datasets.sample import VALID
from datasets.transforms import (
    CenterCrop,
    FastFlip,
    FastResizedCrop,
    PaddedCrop,
    RandomFlip,
    RandomResizedCrop,
    ResizeShort,
    Squash,
    as_pillow,
    build_transform,
    two_view_transform,
)
from tests.conftest import golden


def picture(pixels) -> Image.Image:
    return Image.fromarray(pixels.astype('uint8'))


def config_of(**keys):
    return get_config(None, [item for key, value in keys.items() for item in (key.replace('__', '.'), value)])


def normalized(pixels: np.ndarray, mean, std) -> np.ndarray:
    """[C, H, W] as the model gets it."""
    zeros = np.zeros(1, 'int64')
    return to_device(Batch(pixels[None], {}, zeros), mean, std).images.numpy()[0]


# ---------------------------------------------------------------------------------------------------- evaluation
def test_evaluation_like_paddlevit():
    reference = golden('paddlevit_conventions-eval_transform')
    for place, case in enumerate(reference.meta['cases']):
        config = config_of(DATA__IMAGE_SIZE=case['IMAGE_SIZE'], DATA__CROP_PCT=case['CROP_PCT'])
        pixels = build_transform(config, training=False).image(picture(reference[f'in/image{place}']), None)
        np.testing.assert_allclose(
            normalized(pixels, case['mean'], case['std']), reference[f'out/tensor{place}'], atol=1e-5
        )


def test_evaluation_like_evit():
    """Resized and cropped above 32 pixels, untouched at 32."""
    reference = golden('evit-transform')
    for place, case in enumerate(reference.meta['cases']):
        config = config_of(DATA__IMAGE_SIZE=case['input_size'])
        pixels = build_transform(config, training=False).image(picture(reference[f'in/img{place}']), None)
        x = normalized(pixels, reference.meta['mean'], reference.meta['std'])
        np.testing.assert_allclose(x, reference[f'out/x{place}'], atol=1e-5)


def test_resize_table():
    """floor(size / 0.875) is timm's int(256 / 224 * size) at all sizes."""
    for size, short in golden('evit-transform')['out/resize_table']:
        if size > 32:
            resize = build_transform(config_of(DATA__IMAGE_SIZE=int(size)), training=False).steps[0]
            assert resize.size == short


@pytest.mark.parametrize(('size', 'expected'), [((1, 7), (16, 112)), ((7, 1), (112, 16)), ((300, 299), (16, 16))])
def test_resize_short(size, expected):
    assert ResizeShort(16, BICUBIC)(Image.new('RGB', size)).size == expected


def noise(width: int, height: int) -> Image.Image:
    return picture(np.random.default_rng(0).integers(0, 256, (height, width, 3)))


@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize(
    ('short', 'long', 'exact'), [(3, 96, True), (50, 1600, True), (3, 97, False), (1, 4000, False), (50, 2222, False)]
)
@pytest.mark.parametrize('resample', [BICUBIC, BILINEAR])
def test_thin_pictures(short, long, exact, resample, turned):
    """Up to 32 times as long as wide as resized whole and then cropped, to the last bit; beyond nearly so."""
    image = noise(*((long, short) if turned else (short, long)))
    for size, side in ((24, 21), (25, 16), (24, 24)):
        crop = CenterCrop(side)
        whole = image.resize(tuple(int(size * length / short) for length in image.size), resample)
        found = np.asarray(crop(ResizeShort(size, resample)(image)), int)
        difference = np.abs(found - np.asarray(crop(whole), int))
        assert difference.max() <= (0 if exact else 2)
        assert difference.mean() < 0.05


@pytest.mark.parametrize('size', [(1, 30000), (30000, 1), (2, 400_000), (400_000, 2)])
@pytest.mark.parametrize(
    ('training', 'keys'),
    [
        (False, {}),
        (False, {'DATA__EVAL_CROP': 'squash'}),
        (False, {'DATA__IMAGE_SIZE': 32}),
        (True, {}),
        (True, {'DATA__FAST_RESIZE': False}),
        (True, {'DATA__CROP': 'padded'}),
        (True, {'DATA__IMAGE_SIZE': 32}),
        (True, {'DATA__IMAGE_CHANNELS': 1}),
        ('views', {'TRAIN__RAND_AUGMENT': False, 'TRAIN__RANDOM_ERASE_PROB': 0.0}),
    ],
)
def test_memory_does_not_grow_with_the_shape(monkeypatch, size, training, keys):
    """No step makes a picture that is large beside the picture itself and the result."""
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, 'resize', lambda self, size, *args: made.append(size) or resize(self, size, *args))
    image = Image.new('RGB', size, (9, 9, 9))
    config = config_of(**keys)
    transform = two_view_transform(config) if training == 'views' else build_transform(config, training)
    transform.image(image, np.random.default_rng(0))
    side = keys.get('DATA__IMAGE_SIZE', 224)
    assert made or 'FAST_RESIZE' not in keys
    assert all(width * height <= 50 * side**2 for width, height in made)


@pytest.mark.parametrize(('size', 'keys'), [(16, {}), (48, {}), (48, {'DATA__INTERPOLATION': 'bilinear'})])
def test_squash(size, keys):
    """Both sides are resized, nothing is cut; what has the size already stays as it is."""
    transform = build_transform(config_of(DATA__IMAGE_SIZE=size, DATA__EVAL_CROP='squash', **keys), training=False)
    image = picture(np.random.default_rng(0).integers(0, 256, (50, 90, 3)))
    expected = image.resize((size, size), BILINEAR if keys else BICUBIC)
    assert isinstance(transform.steps[0], Squash)
    assert np.array_equal(transform.image(image), np.asarray(expected))
    assert np.array_equal(transform.image(expected), np.asarray(expected))


def test_gray():
    """A gray model gets [H, W, 1], with the luminance of the picture."""
    config = config_of(DATA__IMAGE_SIZE=8, DATA__IMAGE_CHANNELS=1)
    for training in (False, True):
        pixels = build_transform(config, training).image(
            Image.new('RGB', (8, 8), (77, 77, 77)), np.random.default_rng(0)
        )
        assert pixels.shape == (8, 8, 1)
        assert pixels.dtype == np.uint8
    evaluated = build_transform(config, training=False).image(Image.new('RGB', (8, 8), (77, 77, 77)), None)
    assert (evaluated == 77).all()


# ---------------------------------------------------------------------------------------------------- training
def test_order_of_training_steps():
    def kinds(**keys):
        steps = build_transform(config_of(**keys), training=True).steps
        return [as_pillow if step is as_pillow else type(step) for step in steps]

    exact, plain = {'DATA__FAST_RESIZE': False}, {'TRAIN__RAND_AUGMENT': False, 'TRAIN__COLOR_JITTER': 0.0}
    for policy, keys in (
        (RandAugment, {}),
        (ColorJitter, {'TRAIN__RAND_AUGMENT': False}),
        (AutoAugment, {'TRAIN__RAND_AUGMENT': False, 'TRAIN__AUTO_AUGMENT': True}),
    ):
        assert kinds(**keys) == [FastResizedCrop, FastFlip, as_pillow, policy]
        assert kinds(**exact, **keys) == [RandomResizedCrop, RandomFlip, policy]
    for fast in (True, False):
        policy = build_transform(config_of(DATA__FAST_RESIZE=fast), training=True).steps[-1]
        assert policy.styles.style('Rotate', np.random.default_rng(0)).fast is fast
    assert kinds(**plain) == [FastResizedCrop, FastFlip]
    assert kinds(**plain, TRAIN__HFLIP=0.0) == [FastResizedCrop]
    assert kinds(**plain, DATA__IMAGE_CHANNELS=1) == [RandomResizedCrop, RandomFlip]
    assert kinds(DATA__IMAGE_SIZE=32)[:3] == [ResizeShort, PaddedCrop, RandomFlip]
    assert kinds(DATA__IMAGE_SIZE=33)[0] is FastResizedCrop
    assert kinds(DATA__IMAGE_SIZE=32, DATA__CROP='resized')[0] is FastResizedCrop
    assert kinds(DATA__IMAGE_SIZE=64, DATA__CROP='padded')[1] is PaddedCrop


def test_fill_is_the_mean_color():
    config = config_of(DATA__IMAGENET_MEAN=[0.485, 0.456, 0.406])
    assert build_transform(config, training=True).steps[-1].styles.mean == (124, 116, 104)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32))
def test_crop_box_lies_inside(width, height, seed):
    crop = RandomResizedCrop(16, (0.08, 1.0), (3 / 4, 4 / 3), (BICUBIC,))
    left, top, right, bottom = crop.box(width, height, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crop_box_statistics():
    """Area uniform in [0.08, 1] where it fits, ratio within 3/4 to 4/3, center crop for extreme shapes."""
    crop = RandomResizedCrop(16, (0.08, 0.5), (3 / 4, 4 / 3), (BICUBIC,))
    rng = np.random.default_rng(0)
    boxes = np.array([crop.box(1000, 1000, rng) for _ in range(3000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    shares = widths * heights / 1e6
    assert 0.079 < shares.min() < 0.09
    assert 0.49 < shares.max() < 0.501
    assert abs(shares.mean() - 0.29) < 0.01
    assert (widths / heights).min() > 0.745
    assert (widths / heights).max() < 1.34
    assert abs(np.log(widths / heights).mean()) < 0.01
    assert crop.box(1000, 10, rng) == (493, 0, 506, 10)
    assert crop.box(10, 1000, rng) == (0, 493, 10, 506)


def test_crop_and_resize_like_torchvision():
    reference = golden('mocov3-augops')
    crop, expected = reference.meta['crop_resize'], reference['out/crop_resize']
    transform = RandomResizedCrop(crop['out'], (0.08, 1), (3 / 4, 4 / 3), (BILINEAR,))
    transform.box = lambda *_: (
        crop['left'],
        crop['top'],
        crop['left'] + crop['width'],
        crop['top'] + crop['height'],
    )
    assert np.array_equal(np.asarray(transform(picture(reference['in/img']), None), 'int64'), expected)


def test_padded_crop():
    """Shifts by at most the padding, all shifts occur, and what comes in is black."""
    image = picture(np.full((32, 32, 3), 255))
    crop = PaddedCrop(32, 4)
    black = {
        (int((pixels[:, 16] == 0).sum()), int((pixels[16] == 0).sum()))
        for pixels in (np.asarray(crop(image, np.random.default_rng(seed)))[..., 0] for seed in range(400))
    }
    assert black == {(row, column) for row in range(5) for column in range(5)}


def test_flip():
    image = picture(np.arange(12).reshape(2, 2, 3))
    flipped = np.asarray(RandomFlip(1.0)(image, np.random.default_rng(0)))
    assert np.array_equal(flipped, np.asarray(image)[:, ::-1])
    count = sum(RandomFlip(0.5)(image, np.random.default_rng(seed)) is not image for seed in range(400))
    assert 150 < count < 250


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear', 'random'])
def test_interpolation(interpolation):
    config = config_of(DATA__INTERPOLATION=interpolation)
    crop = build_transform(config, training=True).steps[0]
    assert (
        crop.resamples == {'bicubic': (BICUBIC,), 'bilinear': (BILINEAR,), 'random': (BILINEAR, BICUBIC)}[interpolation]
    )
    resize = build_transform(config, training=False).steps[0]
    assert resize.resample == (BILINEAR if interpolation == 'bilinear' else BICUBIC)


# ---------------------------------------------------------------------------------------------------- erasing
def erased_maps(mode: str, count: int = 1, shape=(64, 48, 3), probability: float = 1.0):
    """(mask, values) [C, H, W] for many seeds."""
    erasing = RandomErasing(probability, mode, count)
    for seed in range(300):
        erase = erasing(shape, np.random.default_rng(seed))
        if erase is not None:
            height, width, channels = shape
            mask, values = np.zeros(channels * height * width, bool), np.zeros(channels * height * width, 'float32')
            assert len(np.unique(erase[0])) == len(erase[0])
            mask[erase[0]], values[erase[0]] = True, erase[1]
            yield mask.reshape(channels, height, width), values.reshape(channels, height, width)


def test_erasing_one_box():
    shares = []
    for mask, _ in erased_maps('const'):
        assert (mask == mask[0]).all()
        rows, columns = np.flatnonzero(mask[0].any(1)), np.flatnonzero(mask[0].any(0))
        assert mask[0][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # filled
        assert len(rows) < 64
        assert len(columns) < 48
        assert 0.25 < len(rows) / len(columns) < 4
        shares.append(mask.mean())
    assert len(shares) == 300
    assert 0.015 < min(shares) < 0.03
    assert 0.3 < max(shares) < 0.35
    assert abs(np.mean(shares) - (0.02 + 1 / 3) / 2) < 0.01


def test_erasing_modes():
    pixel = np.concatenate([values[mask] for mask, values in erased_maps('pixel')])
    assert abs(pixel.mean()) < 0.01
    assert abs(pixel.std() - 1) < 0.01
    for mask, values in erased_maps('rand'):
        assert all(len(np.unique(values[channel][mask[channel]])) == 1 for channel in range(3))
        assert len(np.unique(values[mask])) == 3
    assert all((values == 0).all() for _, values in erased_maps('const'))


def test_erasing_probability():
    assert 50 < len(list(erased_maps('const', probability=0.25))) < 100
    assert not list(erased_maps('const', probability=0.0))


def test_erasing_several_boxes():
    """Up to three boxes, which share the area between them and may overlap."""
    shares = [mask[0].mean() for mask, _ in erased_maps('pixel', count=3)]
    assert max(shares) < 0.36
    assert len(shares) == 300


def test_erasing_on_the_device():
    """Erased values replace normalized ones at their place, nothing else changes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    labels = np.array([1, 2])
    positions = np.array([0, 59, 60, 119, 77])
    values = np.array([1.5, -2, 3, 4, 5], 'float32')
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    plain = to_device(Batch(images, {'label': labels}, labels), mean, std).images
    batch = to_device(Batch(images, {'label': labels}, labels, erase=(positions, values)), mean, std)
    erased, out_labels = batch.images, batch.targets['label']
    expected = np.ascontiguousarray(((images / 255.0 - mean) / std).transpose(0, 3, 1, 2), 'float32')
    np.testing.assert_allclose(plain.numpy(), expected, atol=2e-6)
    expected.reshape(-1)[positions] = values
    np.testing.assert_allclose(erased.numpy(), expected, atol=2e-6)
    assert out_labels.tolist() == [1, 2]


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('erased', [0, 7])
@pytest.mark.parametrize('padded', [False, True])
def test_normalizing_on_cpu_and_device(channels, erased, padded):
    """Two ways to the same numbers, to the last bit."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 9, 8, channels), dtype=np.uint8)
    images.flat[:256] = np.arange(256)[: images.size]
    positions = rng.permutation(images.size)[:erased]
    erase = (positions, rng.standard_normal(erased, dtype='float32')) if erased else None
    scale, shift = rng.uniform(0.01, 0.02, (2, channels, 1, 1)).astype('float32')
    labels = np.zeros(3, 'int64')
    valid = np.array([(5, 6), (9, 8), (1, 1)]) if padded else None
    batch = Batch(images, {'label': labels, **({VALID: valid} if padded else {})}, labels, erase=erase)
    one = batching._on_this_cpu(images, erase, scale, shift, valid).numpy()
    tensors = {name: paddle.to_tensor(array) for name, array in batching._arrays(batch).items()}
    other = batching._normalized(tensors, paddle.to_tensor(scale), paddle.to_tensor(shift)).numpy()
    assert one.shape == (3, channels, 9, 8)
    assert np.array_equal(one, other)
    if padded and not erased:
        assert not one[0, :, 5:].any() and not one[0, :, :, 6:].any() and one[0, :, :5, :6].any() and one[1].any()
