# SPDX-License-Identifier: Apache-2.0
"""Large-scale jitter and its evaluation counterpart, against vectors of detectron2; masks and their polygons."""

import numpy as np
import pytest
from PIL import Image

from config import get_config
from datasets.coco import decoded_counts
from datasets.detection import BOXES, CLASSES, MASKS, OBJECTS, Objects
from datasets.detection_transforms import (
    BILINEAR,
    JitterCrop,
    ScaleJitter,
    crop_box,
    detection_transform,
    fitted_size,
    jittered_size,
)
from datasets.polygons import bounds, clipped, coco_masks, decoded_rle, mask_polygons
from datasets.sample import IMAGE, IMAGE_SIZE, VALID, Boxes, Placement, Sample
from tests.conftest import golden

SIDE = 640


@pytest.fixture(scope='module')
def lsj():
    return golden('vitdet-lsj')


def rasterized(polygons, height, width) -> np.ndarray:
    """[height, width] uint8, by pycocotools."""
    masks = coco_masks()
    return masks.decode(masks.merge(masks.frPyObjects([p.reshape(-1).tolist() for p in polygons], height, width)))


# ---------------------------------------------------------------------------------------------------- geometry
def test_jitter_and_crop(lsj):
    rows = zip(lsj['in/hw'].tolist(), lsj['in/scale'].astype('float64'), lsj['in/u'].astype('float64'), lsj['out/lsj'])
    for (height, width), factor, place, expected in rows:
        size = jittered_size((width, height), SIDE, factor)
        left, top, right, bottom = crop_box(size, SIDE, place)
        assert [size[1], size[0], top, left, bottom - top, right - left] == expected.tolist()


@pytest.mark.parametrize(('short', 'longest', 'name'), [(640, 640, 'test_hw'), (800, 1333, 'test_hw_800_1333')])
def test_size_of_an_evaluation(lsj, short, longest, name):
    found = [fitted_size((width, height), short, longest)[::-1] for height, width in lsj['in/hw'].tolist()]
    np.testing.assert_array_equal(found, lsj[f'out/{name}'])


def test_thin_images_keep_a_pixel():
    assert jittered_size((2000, 2), 64, 0.1) == (6, 1)
    assert fitted_size((2000, 2), 64, 64) == (64, 1)


def test_pixels(lsj):
    image = Image.fromarray(lsj['in/img'].astype('uint8'))
    for height, width in ((33, 43), (9, 12)):
        found = image.resize((width, height), BILINEAR)
        np.testing.assert_array_equal(np.asarray(found), lsj[f'out/img_{height}x{width}'])
    placement = Placement((0, 0, 26, 20), (43, 33))
    found = ScaleJitter(8, (1, 1)).apply(image, placement)
    np.testing.assert_array_equal(np.asarray(found), lsj['out/img_33x43'])


# ---------------------------------------------------------------------------------------------------- objects
PLACEMENTS = (
    Placement((0, 0, 80, 60), (80, 60), mirrored=True),
    Placement((0, 0, 80, 60), (120, 90)),
    Placement((30, 17, 94, 81), (64, 64)),
)


def objects_of(lsj) -> Objects:
    """The instances of the golden, numbered by their classes."""
    ends = np.cumsum(lsj['in/poly_len'])[:-1]
    polygons = [part.reshape(-1, 2).astype('float64') for part in np.split(lsj['in/poly_xy'], ends)]
    count = lsj['in/poly_instance'].max() + 1
    grouped = [[p for p, owner in zip(polygons, lsj['in/poly_instance']) if owner == i] for i in range(count)]
    return Objects(tuple(grouped), np.arange(count))


def test_objects_follow_flip_resize_and_crop(lsj):
    objects = objects_of(lsj)
    boxes = Boxes(objects.boxes().astype('float64'))
    for placement in PLACEMENTS:
        objects, boxes = objects.placed(placement), boxes.placed(placement)
    np.testing.assert_allclose(np.clip(boxes.corners, 0, 64), lsj['out/clip_boxes'], atol=1e-4)
    inside = [clipped(polygons, (64, 64)) for polygons in objects.polygons]
    found = [bounds(polygons) if polygons else [-1, -1, 0, 0] for polygons in inside]
    np.testing.assert_allclose(found, lsj['out/recomputed_boxes_all'], atol=1e-4)
    kept = objects.clipped((64, 64))
    np.testing.assert_array_equal(kept.classes, lsj['out/kept'])
    np.testing.assert_allclose(kept.boxes(), lsj['out/kept_boxes'], atol=1e-4)
    for polygons, expected in zip(kept.polygons, lsj['out/kept_bitmask']):
        assert (rasterized(polygons, 64, 64) != expected).sum() <= 2
    areas = [sum(area(polygon) for polygon in polygons) for polygons in kept.polygons]
    np.testing.assert_allclose(areas, lsj['out/kept_area'], rtol=1e-4)


def area(polygon) -> float:
    x, y = polygon.T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def test_objects_outside_or_without_area_are_dropped():
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]], 'float64')
    line = np.array([[1, 1], [3, 1], [5, 1]], 'float64')
    objects = Objects(([square + 50], [line], [square - 2, line], [square]), np.arange(4))
    kept = objects.clipped((8, 8))
    assert kept.classes.tolist() == [2, 3]
    np.testing.assert_array_equal(kept.boxes(), [[0, 0, 2, 2], [0, 0, 4, 4]])
    nothing = Objects(([square + 50],), np.zeros(1, 'int64')).clipped((8, 8))
    assert nothing.boxes().shape == (0, 4) and nothing.boxes().dtype == np.float32


# ---------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize('seed', range(6))
def test_polygons_of_a_mask_cover_its_pixels(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((9 + seed, 14)) < 0.6  # with holes, and pixels that touch at corners
    polygons = mask_polygons(mask)
    np.testing.assert_array_equal(rasterized(polygons, *mask.shape), mask)
    ring = np.zeros((7, 7), bool)
    ring[1:6, 1:6] = True
    ring[3, 3] = False
    assert len(mask_polygons(ring)) == 2 and sum(map(area, mask_polygons(ring))) == 24


def test_run_lengths():
    rng, masks = np.random.default_rng(0), coco_masks()
    for share in (0.02, 0.5, 0.9, 0, 1):
        mask = (np.kron(rng.random((5, 7)), np.ones((9, 40))) < share).astype('uint8')
        rle = masks.encode(np.asfortranarray(mask))
        counts = decoded_counts(rle['counts'].decode())
        assert sum(counts) == mask.size
        np.testing.assert_array_equal(decoded_rle({'size': list(mask.shape), 'counts': counts}), mask)
        np.testing.assert_array_equal(decoded_rle({'size': list(mask.shape), 'counts': rle['counts'].decode()}), mask)
    assert decoded_counts('o') is None and decoded_counts('!') is None


# ---------------------------------------------------------------------------------------------------- the whole
def sample() -> Sample:
    """An image whose object is its bright part, [12, 24) x [4, 16) of 40 x 20 pixels."""
    pixels = np.full((20, 40, 3), 40, 'uint8')
    pixels[4:16, 12:24] = 240
    square = np.array([[12, 4], [24, 4], [24, 16], [12, 16]], 'float64')
    return Sample(Image.fromarray(pixels), {OBJECTS: Objects(([square],), np.array([3]))})


def transform(training: bool, **train):
    options = [item for key, value in train.items() for item in (f'TRAIN.{key}', value)]
    return detection_transform(get_config(opts=['TRAIN.TASK', 'detection', 'DATA.IMAGE_SIZE', 64, *options]), training)


@pytest.mark.parametrize('seed', range(8))
def test_box_and_mask_cover_the_bright_part(seed):
    found = transform(True, SCALE_RANGE=(0.4, 2.0))(sample(), np.random.default_rng(seed))
    height, width = found.targets[VALID]
    assert found.image.shape == (64, 64, 3) and not found.image[height:].any() and not found.image[:, width:].any()
    arrays = found.arrays()
    bright = found.image[..., 0] > 140
    if not len(arrays[BOXES]):
        assert not bright.any()
        return
    rows, columns = np.nonzero(bright)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(arrays[BOXES][0], box, atol=1.5)
    assert arrays[CLASSES].tolist() == [3] and arrays[BOXES].dtype == np.float32
    covered = rasterized(arrays[MASKS][0], 64, 64)
    assert (covered != bright).sum() <= 2 * (width + height)


def test_draws_depend_on_the_generator_alone():
    one, same, other = (transform(True)(sample(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.image, same.image)
    np.testing.assert_array_equal(one.arrays()[BOXES], same.arrays()[BOXES])
    assert not np.array_equal(one.image, other.image)


def test_evaluation():
    step = transform(False)
    found = step(sample(), None)
    assert [plane.name for plane in step.planes] == [IMAGE, VALID, IMAGE_SIZE]
    assert (found.targets[VALID].tolist(), found.targets[IMAGE_SIZE].tolist()) == ([32, 64], [20, 40])
    np.testing.assert_array_equal(found.arrays()[BOXES], [[12, 4, 24, 16]])  # of the stored image
    assert set(step(Sample(sample().image), None).targets) == {VALID, IMAGE_SIZE}  # a file to predict
    gray = detection_transform(get_config(opts=['TRAIN.TASK', 'detection', 'DATA.IMAGE_CHANNELS', 1]), False)
    assert gray(Sample(sample().image), None).image.shape == (224, 224, 1)


def test_the_crop_is_the_same_for_image_and_objects():
    crop, image = JitterCrop(16), np.arange(40 * 20).reshape(20, 40).astype('uint8')
    found = crop.joint(Sample(Image.fromarray(image), sample().targets), np.random.default_rng(3))
    left, top = int(round(24 * np.random.default_rng(3).random())), int(round(4 * np.random.default_rng(3).random()))
    np.testing.assert_array_equal(found.image, image[top : top + 16, left : left + 16])
    box = np.clip([12 - left, 4 - top, 24 - left, 16 - top], 0, 16)
    np.testing.assert_array_equal(found.targets[OBJECTS].boxes()[0], box)
