# SPDX-License-Identifier: Apache-2.0
"""Label maps, boxes and polygons follow the image through a placement."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.sample import Boxes, LabelMap, Placement, Polygons, Sample

SIDE = st.integers(1, 40)


@st.composite
def crops(draw):
    """A map and a crop that may stick out of it, of whole pixels, without resizing."""
    width, height = draw(SIDE), draw(SIDE)
    left, top = draw(st.integers(-10, width - 1)), draw(st.integers(-10, height - 1))
    right, bottom = draw(st.integers(left + 1, left + 60)), draw(st.integers(top + 1, top + 60))
    pixels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 250, (height, width), dtype=np.uint8)
    return pixels, Placement((left, top, right, bottom), (right - left, bottom - top), draw(st.booleans()))


@given(crops())
def test_a_cropped_map_is_the_crop_of_the_padded_map(case):
    pixels, placement = case
    padded = np.pad(pixels, 80, constant_values=255)
    left, top, right, bottom = (edge + 80 for edge in placement.box)
    expected = padded[top:bottom, left:right]
    actual = LabelMap(pixels).placed(placement).array()
    np.testing.assert_array_equal(actual, expected[:, ::-1] if placement.mirrored else expected)


@given(SIDE, SIDE, SIDE, SIDE)
def test_resizing_a_map_is_opencvs_nearest(height, width, new_height, new_width):
    cv2 = pytest.importorskip('cv2')
    pixels = np.random.default_rng(0).integers(0, 250, (height, width), dtype=np.uint8)
    actual = LabelMap(pixels).placed(Placement((0, 0, width, height), (new_width, new_height))).array()
    expected = cv2.resize(pixels, (new_width, new_height), interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(actual, expected)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), st.booleans())
def test_boxes_and_polygons_enclose_what_the_map_shows(left, top, width, height, scale, mirrored):
    """A filled rectangle of a map, its box and its outline stay together under whole-number scales."""
    pixels = np.zeros((50, 50), np.uint8)
    pixels[top : top + height, left : left + width] = 1
    corners = np.array([[left, top, left + width, top + height]], 'float64')
    outline = np.array([[left, top], [left + width, top], [left + width, top + height], [left, top + height]])
    placement = Placement((0, 0, 50, 50), (50 * scale, 50 * scale), mirrored)
    sample = Sample(None, {'map': LabelMap(pixels), 'box': Boxes(corners), 'mask': Polygons(((outline,),)), 'id': 7})
    moved = Sample(None, sample.placed(placement)).arrays()
    rows, columns = np.nonzero(moved['map'])
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(moved['box'], [seen], rtol=1e-6)
    polygon = moved['mask'][0][0]
    np.testing.assert_allclose([*polygon.min(0), *polygon.max(0)], seen, rtol=1e-6)
    assert moved['id'] == 7


def test_padding_of_a_map_is_ignored():
    padded = LabelMap(np.zeros((2, 2), np.uint8), ignored=9).placed(Placement((0, 0, 4, 3), (4, 3))).array()
    assert padded.tolist() == [[0, 0, 9, 9], [0, 0, 9, 9], [9, 9, 9, 9]]
