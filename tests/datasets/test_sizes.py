# SPDX-License-Identifier: Apache-2.0
"""Transforms, random erasing and mixing of images that are not square."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config import get_config
from datasets.augment import BICUBIC
from datasets.images import decode_image, open_image
from datasets.mixing import Mixup
from datasets.transforms import (
    MAX_ASPECT_RATIO,
    CenterCrop,
    FastResizedCrop,
    RandomResizedCrop,
    ResizeShort,
    build_transform,
    resize_smoothed,
    two_view_transform,
)
from tasks import build_task

SIDES, LENGTHS = st.integers(1, 60), st.integers(1, 300)


def config_of(*options):
    return get_config(None, list(options))


def picture(height, width, channels=3):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), 'uint8')
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


def jpeg(image):
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=95)
    return file.getvalue()


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(SIDES, SIDES),
    stored=st.tuples(LENGTHS, LENGTHS),
    crop=st.sampled_from(['auto', 'padded', 'resized']),
    squash=st.booleans(),
    training=st.booleans(),
    fast=st.booleans(),
    channels=st.sampled_from([1, 3]),
)
def test_every_transform_gives_the_size(size, stored, crop, squash, training, fast, channels):
    config = config_of(
        *('DATA.IMAGE_SIZE', size, 'DATA.CROP', crop, 'DATA.EVAL_CROP', 'squash' if squash else 'center'),
        *('DATA.FAST_RESIZE', fast, 'DATA.IMAGE_CHANNELS', channels),
    )
    transform = build_transform(config, training)
    assert transform.planes[0].shape == (*size, channels)
    rng = np.random.default_rng(0)
    for image in (picture(*stored, channels).convert('RGB'), open_image(jpeg(picture(*stored)))):
        assert transform.image(image, rng).shape == (*size, channels)


def test_both_views_have_the_size():
    options = ('TRAIN.RAND_AUGMENT', False, 'TRAIN.RANDOM_ERASE_PROB', 0, 'DATA.IMAGE_SIZE', (40, 56))
    transform = two_view_transform(config_of(*options))
    assert transform.planes[0].shape == (2, 40, 56, 3)
    assert transform.image(picture(80, 70), np.random.default_rng(0)).shape == (2, 40, 56, 3)


@settings(deadline=None)
@given(size=st.tuples(SIDES, SIDES), stored=st.tuples(LENGTHS, LENGTHS))
def test_resizing_covers_the_size_and_keeps_the_ratio(size, stored):
    """The smallest image that covers (height, width): one side fits exactly, the other is at least as long."""
    placement = ResizeShort(size, BICUBIC).draw(stored[::-1])
    height, width = placement.size[::-1]
    assert height >= size[0] and width >= size[1]
    assert height == size[0] or width == size[1]
    left, top, right, bottom = placement.box
    if placement.box == (0, 0, *stored[::-1]):
        across, down = width / stored[1], height / stored[0]
        assert abs(across - down) * min(stored) <= 1 + 1e-9 or 1 in (height, width), 'rounded down to whole pixels'
    else:
        assert max(height, width) <= MAX_ASPECT_RATIO * max(size) + 3


@settings(deadline=None, max_examples=30)
@given(side=st.integers(8, 60), stored=st.tuples(st.integers(8, 200), st.integers(8, 200)), seed=st.integers(0, 99))
def test_an_equal_pair_gives_the_pixels_of_the_number(side, stored, seed):
    image, array = picture(*stored), jpeg(picture(*stored))
    pairs = [
        (ResizeShort(side, BICUBIC), ResizeShort((side, side), BICUBIC)),
        (CenterCrop(side), CenterCrop((side, side))),
    ]
    pairs += [
        tuple(kind(size, (0.08, 1.0), (0.75, 4 / 3), (BICUBIC,)) for size in (side, (side, side)))
        for kind in (RandomResizedCrop, FastResizedCrop)
    ]
    for one, other in pairs:
        for source in (image, open_image(array)):
            if isinstance(one, CenterCrop):
                source = image
            found = [np.asarray(step(source, np.random.default_rng(seed))) for step in (one, other)]
            np.testing.assert_array_equal(*found)


def test_evaluation_crops_the_center_of_the_covering_image():
    """Compared with Pillow by hand: 60 x 40 of an image of 100 x 90, at CROP_PCT 0.5: resized to cover 120 x 80."""
    image = picture(100, 90)
    config = config_of('DATA.IMAGE_SIZE', (60, 40), 'DATA.CROP_PCT', 0.5)
    expected = image.resize((108, 120), BICUBIC).crop((34, 30, 74, 90))
    np.testing.assert_array_equal(build_transform(config, False).image(image), np.asarray(expected))
    squashed = config_of('DATA.IMAGE_SIZE', (60, 40), 'DATA.EVAL_CROP', 'squash')
    np.testing.assert_array_equal(
        build_transform(squashed, False).image(image), np.asarray(image.resize((40, 60), BICUBIC))
    )


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_a_turned_jpeg_file_is_decoded_large_enough(orientation):
    """The smaller decoding must cover the size in the orientation of the result."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    picture(200, 320).save(file, 'JPEG', quality=95, exif=exif)
    image, whole = open_image(file.getvalue(), exif_rotate=True), decode_image(file.getvalue(), exif_rotate=True)
    size = (90, 20) if image.size[0] > image.size[1] else (20, 90)
    found = image.reduced((0, 0, *image.size), size)
    assert found.shape[0] >= size[0] and found.shape[1] >= size[1]
    assert found.shape[0] / found.shape[1] == pytest.approx(whole.height / whole.width, rel=0.02)


def test_fast_resizing_is_close_to_pillow():
    y, x = np.mgrid[0:300, 0:400]
    smooth = np.stack([127 + 100 * np.sin(x / 17), 127 + 100 * np.cos(y / 23), (x + y) % 256 * 0.5], -1).astype('uint8')
    for size in ((150, 60), (40, 200), (299, 100)):
        exact = np.asarray(Image.fromarray(smooth).resize(size[::-1], BICUBIC)).astype(int)
        fast = resize_smoothed(smooth, size, BICUBIC)
        assert fast.shape == (*size, 3)
        assert np.abs(fast - exact).mean() < 3


@settings(deadline=None, max_examples=40)
@given(size=st.tuples(st.integers(4, 64), st.integers(4, 64)), seed=st.integers(0, 99), minmax=st.booleans())
def test_cutmix_boxes_and_shares(size, seed, minmax):
    """The share of the targets is the mean of the map, whatever the shape of the image."""
    mix = Mixup(5, 0.0, 1.0, (0.2, 0.8) if minmax else None)
    maps, shares = mix.draw(3, *size, np.random.default_rng(seed))
    if maps is not None:
        assert maps.shape == (1, *size)
        assert shares[0] == pytest.approx(maps.mean(), abs=1e-6)


def test_preprocessing_of_exported_programs():
    """What users of the program must do; a square has single numbers, as before."""
    wide = ('DATA.IMAGE_SIZE', (64, 96), 'DATA.CROP_PCT', 0.8)
    found = build_task(config_of(*wide)).preprocessing()
    assert (found['resize_short'], found['image_size'], found['crop_pct']) == ((80, 120), (64, 96), 0.8)
    squashed = build_task(config_of(*wide, 'DATA.EVAL_CROP', 'squash')).preprocessing()
    assert (squashed['resize_short'], squashed['image_size'], squashed['crop_pct']) == (None, (64, 96), 1.0)
    square = build_task(config_of('DATA.IMAGE_SIZE', 64, 'DATA.CROP_PCT', 0.8)).preprocessing()
    assert (square['resize_short'], square['image_size'], square['crop_pct']) == (80, 64, 0.8)
