# SPDX-License-Identifier: Apache-2.0
"""The two views of MoCo-v3: their primitives against the originals, what they draw, and their way to the model."""

import io

import numpy as np
import paddle
import pytest
import simplejpeg
from PIL import Image

from config import get_config
from datasets import augment, build_dataloader, build_dataset, views
from datasets import batch as batching
from datasets.augment import BILINEAR, ColorJitter
from datasets.batch import to_device
from datasets.images import open_image
from datasets.loader import Batch
from datasets.transforms import (
    FastResizedCrop,
    RandomFlip,
    RandomResizedCrop,
    Transform,
    as_pillow,
    build_transform,
    two_view_transform,
)
from datasets.views import Views, random_blur, view_steps
from tests.conftest import golden
from utils.errors import UserError

PLAIN = {'TRAIN__RAND_AUGMENT': False, 'TRAIN__RANDOM_ERASE_PROB': 0.0}
RECIPE = {'DATA__VIEWS': 2, 'DATA__INTERPOLATION': 'bilinear', **PLAIN}


def config_of(**keys):
    keys = {**RECIPE, **keys}
    return get_config(None, [item for key, value in keys.items() for item in (key.replace('__', '.'), value)])


def photograph(width: int = 96, height: int = 72, mode: str = 'RGB') -> Image.Image:
    """A smooth picture in which no part is like another."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([127 + 120 * np.sin(x / 17), 255 * y / height, 127 + 120 * np.cos(x / 29 + y / 11)], -1)
    return Image.fromarray(pixels.astype('uint8')).convert(mode)


# ---------------------------------------------------------------------------------------------------- primitives
def test_primitives():
    reference = golden('mocov3-augops')
    image = Image.fromarray(reference['in/img'].astype('uint8'))
    found = {
        'hue': augment.hue(image, reference.meta['jitter']['hue']),
        'gray3': augment.grayscale(image),
        'hflip': RandomFlip(1.0)(image, np.random.default_rng(0)),
        'solarize': augment.solarize(image, views.THRESHOLD),
        **{f'blur_{radius:g}': augment.blur(image, radius) for radius in (0.1, 0.7, 1.3, 2.0)},
    }
    for name, result in found.items():
        assert np.array_equal(np.asarray(result, 'int64'), reference[f'out/{name}']), name


def test_normalized_like_torchvision():
    reference = golden('mocov3-augops')
    images = reference['in/img'].astype('uint8')[None, None]
    x = to_device(Batch(images, {}, np.zeros(1)), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).images
    np.testing.assert_allclose(x.numpy()[0, 0], reference['out/tensor_norm'], atol=1e-6)


def test_hue_of_known_colors():
    """A third of the circle takes red to green and to blue; gray has no hue to turn."""
    red = Image.new('RGB', (2, 2), (255, 0, 0))
    third = 85 / 255
    assert augment.hue(red, third).getpixel((0, 0)) == pytest.approx((0, 255, 0), abs=6)
    assert augment.hue(red, -third).getpixel((0, 0)) == pytest.approx((0, 0, 255), abs=6)
    for shift in (-0.1, 0.0, 0.1):
        assert augment.hue(Image.new('RGB', (1, 1), (99, 99, 99)), shift).getpixel((0, 0)) == (99, 99, 99)


def test_colors_of_gray_images():
    image = photograph(mode='L')
    for same in (augment.hue(image, 0.1), augment.color(image, 1.2), augment.grayscale(image)):
        assert same.mode == 'L'
        assert np.array_equal(np.asarray(same), np.asarray(image))


def test_jitter_draws():
    """Factors and shift uniform in their ranges, all orders."""
    jitter, calls = ColorJitter(0.4, 0.4, 0.2, 0.1), []
    names = [function.__name__ for function in ColorJitter.FUNCTIONS]
    jitter.FUNCTIONS = [lambda image, value, name=name: calls.append((name, value)) or image for name in names]
    rng = np.random.default_rng(0)
    for _ in range(2000):
        jitter(None, rng)
    assert len({tuple(name for name, _ in calls[i : i + 4]) for i in range(0, len(calls), 4)}) == 24
    for name, low, high in zip(names, (0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1)):
        values = np.array([value for called, value in calls if called == name])
        assert len(values) == 2000
        assert low <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)


# ---------------------------------------------------------------------------------------------------- pipelines
def trace(monkeypatch, rng, runs: int) -> list[tuple[list[str], list[str]]]:
    """The names of what was done to each of the views, in order, for many pictures."""
    done = []

    def record(name):
        return lambda image, *_: done.append(name) or image

    for name in ('blur', 'grayscale', 'solarize'):
        monkeypatch.setattr(views, name, record(name))
    monkeypatch.setattr(ColorJitter, '__call__', lambda self, image, rng: record('jitter')(image))
    monkeypatch.setattr(RandomFlip, 'mirror', lambda self, image: record('flip')(image))
    pipelines = view_steps([lambda image, rng: record('crop')(image)], RandomFlip(0.5))
    result = []
    for _ in range(runs):
        both = []
        for steps in pipelines:
            done.clear()
            for step in steps:
                step(Image.new('L', (1, 1)), rng)
            both.append(list(done))
        result.append(tuple(both))
    return result


def test_order_and_probabilities(monkeypatch):
    runs = 4000
    traces = trace(monkeypatch, np.random.default_rng(0), runs)
    order = ['crop', 'jitter', 'blur', 'grayscale', 'flip', 'solarize']
    expected = [
        {'crop': 1, 'jitter': 0.8, 'blur': 1, 'grayscale': 0.2, 'flip': 0.5, 'solarize': 0},
        {'crop': 1, 'jitter': 0.8, 'blur': 0.1, 'grayscale': 0.2, 'flip': 0.5, 'solarize': 0.2},
    ]
    for view in (0, 1):
        for names in (both[view] for both in traces):
            assert names == [name for name in order if name in names]
        for name, probability in expected[view].items():
            share = np.mean([name in both[view] for both in traces])
            assert share == probability if probability in (0, 1) else abs(share - probability) < 0.025, (view, name)
    for name in ('jitter', 'grayscale', 'flip'):  # one view says nothing about the other
        first, second = ([name in both[view] for both in traces] for view in (0, 1))
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_blur_radius(monkeypatch):
    radii = []
    monkeypatch.setattr(views, 'blur', lambda image, radius: radii.append(radius))
    rng = np.random.default_rng(0)
    for _ in range(1000):
        random_blur(None, rng)
    assert 0.1 <= min(radii) < 0.11
    assert 1.99 < max(radii) <= 2.0
    assert abs(np.mean(radii) - 1.05) < 0.05


def test_keys_that_count():
    """Crop, flip and interpolation; up to 32 pixels, too, views are resized crops."""
    for size in (224, 28):
        config = config_of(
            DATA__IMAGE_SIZE=size, TRAIN__CROP_SCALE=(0.2, 0.9), TRAIN__CROP_RATIO=(0.5, 2.0), TRAIN__HFLIP=0.25
        )
        transform = two_view_transform(config)
        assert transform.planes[0].shape == (2, size, size, 3)
        for steps in (single.steps for single in transform.transforms):
            crop, flip = steps[0], steps[5]
            assert (crop.size, crop.scale, crop.ratio, crop.resamples) == (size, (0.2, 0.9), (0.5, 2.0), (BILINEAR,))
            assert flip.probability == 0.25
            assert (type(crop), steps[1]) == (FastResizedCrop, as_pillow)
    exact = two_view_transform(config_of(DATA__FAST_RESIZE=False)).transforms
    assert all(type(single.steps[0]) is RandomResizedCrop for single in exact)


def test_evaluation_has_one_view():
    for keys in ({}, {'TRAIN__RAND_AUGMENT': True}):
        evaluation = build_transform(config_of(**keys), training=False)
        assert evaluation.planes[0].shape == (224, 224, 3)
        assert evaluation.image(photograph()).shape == (224, 224, 3)


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('channels', [1, 3])
def test_views_differ(channels, fast):
    """The same generator gives the same views; the two of them are not alike, and the first is the smoother one."""
    config = config_of(DATA__IMAGE_SIZE=48, DATA__IMAGE_CHANNELS=channels, DATA__FAST_RESIZE=fast)
    transform = two_view_transform(config)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), 'uint8'))
    roughness = []
    for seed in range(20):
        pixels, again = (transform.image(noise, np.random.default_rng(seed)) for _ in range(2))
        assert (pixels.shape, pixels.dtype) == ((2, 48, 48, channels), np.uint8)
        assert np.array_equal(pixels, again)
        assert not np.array_equal(pixels[0], pixels[1])
        roughness.append(np.abs(np.diff(pixels.astype(int), axis=2)).mean((1, 2, 3)))
    first, second = np.mean(roughness, 0)
    assert first < 0.7 * second


def test_crops_are_independent():
    """The boxes of the two views, as places and sizes, are uncorrelated."""
    crop = RandomResizedCrop(8, (0.08, 1.0), (3 / 4, 4 / 3), (BILINEAR,))
    boxes = []
    crop.box = lambda *arguments: boxes.append(RandomResizedCrop.box(crop, *arguments)) or boxes[-1]
    transform = Views([Transform(steps, (8, 8, 3)) for steps in view_steps([crop], RandomFlip(0.5))])
    rng, image = np.random.default_rng(0), Image.new('RGB', (200, 200))
    for _ in range(500):
        transform.image(image, rng)
    left, top, right, _ = np.array(boxes).reshape(-1, 2, 4).transpose(2, 1, 0)
    for values in (left, top, right - left):
        assert abs(np.corrcoef(*values)[0, 1]) < 0.13


@pytest.mark.parametrize('channels', [1, 3])
def test_jpeg_is_decoded_once(monkeypatch, channels):
    """And gives what Pillow's picture of it gives."""
    file = io.BytesIO()
    photograph().save(file, 'JPEG', quality=92)
    decoded, decode = [], simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, 'decode_jpeg', lambda *args, **keys: decoded.append(1) or decode(*args, **keys))
    transform = two_view_transform(config_of(DATA__IMAGE_SIZE=40, DATA__IMAGE_CHANNELS=channels))
    found = transform.image(open_image(file.getvalue()), np.random.default_rng(3))
    assert len(decoded) == 1
    expected = transform.image(Image.open(file).convert('RGB'), np.random.default_rng(3))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ('keys', 'change'),
    [
        ({'TRAIN__RAND_AUGMENT': True}, 'set TRAIN.RAND_AUGMENT False.'),
        ({'TRAIN__AUTO_AUGMENT': True}, 'set TRAIN.AUTO_AUGMENT False.'),
        ({'TRAIN__RANDOM_ERASE_PROB': 0.1}, 'set TRAIN.RANDOM_ERASE_PROB 0.'),
        ({'TRAIN__REPEATED_AUG': 3}, 'set TRAIN.REPEATED_AUG 0.'),
        ({'DATA__CROP': 'padded'}, 'set DATA.CROP auto.'),
        (
            {'TRAIN__RAND_AUGMENT': True, 'TRAIN__RANDOM_ERASE_PROB': 0.1},
            'set TRAIN.RAND_AUGMENT False, TRAIN.RANDOM_ERASE_PROB 0.',
        ),
    ],
)
def test_other_augmentation_is_an_error(keys, change):
    with pytest.raises(UserError) as error:
        two_view_transform(config_of(**keys))
    assert str(error.value).endswith(change)


def test_more_views_are_an_error():
    with pytest.raises(UserError, match=r'DATA\.VIEWS is 3'):
        config_of(DATA__VIEWS=3)


# ---------------------------------------------------------------------------------------------------- batches
def test_worker_count_changes_nothing(list_data, make_config):
    path = list_data(11)

    def batches(workers: int, epoch: int):
        config = make_config(path, DATA__NUM_WORKERS=workers, **RECIPE)
        dataset, transform = build_dataset(config, 'train'), two_view_transform(config)
        with build_dataloader(config, dataset, training=True, transform=transform) as loader:
            return list(loader.epoch(epoch))

    alone, helped, later = batches(0, 0), batches(2, 0), batches(0, 1)
    assert [batch.images.shape for batch in alone] == [(count, 2, 16, 16, 3) for count in (4, 4, 3)]
    for one, other in zip(alone, helped):
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.indices, other.indices)
        assert one.erase is None
    of_image = {index: pixels for batch in alone for index, pixels in zip(batch.indices, batch.images)}
    for index, pixels in zip(later[0].indices, later[0].images):
        assert not np.array_equal(pixels, of_image[index])


def test_evaluation_batches(list_data, make_config):
    path = list_data(5)
    one, two = (
        next(build_dataloader(config, build_dataset(config, 'val'), training=False).epoch(0))
        for config in (make_config(path, **PLAIN, DATA__INTERPOLATION='bilinear'), make_config(path, **RECIPE))
    )
    assert two.images.shape == (4, 16, 16, 3)
    assert np.array_equal(one.images, two.images)


@pytest.mark.parametrize('lead', [(3, 2), (0, 2), (2, 2, 2)])
@pytest.mark.parametrize('channels', [1, 3])
def test_to_device(lead, channels):
    """Both ways to the same bits, each view as if it were alone."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (*lead, 5, 4, channels), dtype=np.uint8)
    scale, shift = rng.uniform(0.01, 0.02, (2, channels, 1, 1)).astype('float32')
    labels = np.zeros(len(images), 'int64')
    batch = Batch(images, {'label': labels}, labels)
    one = batching._on_this_cpu(images, None, scale, shift).numpy()
    tensors = {name: paddle.to_tensor(array) for name, array in batching._arrays(batch).items()}
    other = batching._normalized(tensors, paddle.to_tensor(scale), paddle.to_tensor(shift)).numpy()
    assert one.shape == (*lead, channels, 5, 4)
    assert np.array_equal(one, other)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    whole = to_device(batch, mean, std).images
    for view in range(2):
        alone = to_device(Batch(images[:, view], {'label': labels}, labels), mean, std).images
        assert np.array_equal(whole.numpy()[:, view], alone.numpy())
