# SPDX-License-Identifier: Apache-2.0
"""Charts and statistics of the report."""

import math

import numpy as np
import pytest

from analysis.report.charts import Series, line_chart, nice_ticks, reliability_diagram, thinned
from analysis.report.html import el
from analysis.report.statistics import calibrate, confident_mistakes, confusion_matrix, most_confused


def test_calibration():
    """By hand: bins of 1/2; 0.5 belongs to the first (arXiv 1706.04599: bins are open at the left)."""
    confidences, correct = np.array([0.5, 0.3, 0.9, 0.7, 1.0, 0.0]), np.array([1, 0, 1, 0, 1, 0], bool)
    found = calibrate(confidences, correct, bins=2)
    assert found.counts.tolist() == [3, 3]
    np.testing.assert_allclose(found.confidences, [0.8 / 3, 2.6 / 3])
    np.testing.assert_allclose(found.accuracies, [1 / 3, 2 / 3])
    assert found.error == pytest.approx(0.5 * (1 / 3 - 0.8 / 3) + 0.5 * (2.6 / 3 - 2 / 3))


def test_a_calibrated_classifier_has_no_calibration_error():
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.1, 1, 200_000)
    assert calibrate(confidences, rng.uniform(size=200_000) < confidences).error < 0.01
    assert calibrate(confidences, np.zeros(200_000, bool)).error == pytest.approx(confidences.mean(), abs=1e-6)


def test_confusions():
    labels, predicted = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 2, 1, 1, 1, 0])
    assert confusion_matrix(labels, predicted, 3).tolist() == [[1, 0, 1], [0, 1, 0], [1, 2, 0]]
    assert most_confused(labels, predicted, 2) == [(2, 1, 2, 3), (0, 2, 1, 2)]
    assert confident_mistakes(labels, predicted, np.array([0.9, 0.2, 0.9, 0.5, 0.7, 0.7]), 3).tolist() == [4, 5, 3]
    assert most_confused(labels, labels, 2) == [] and not len(confident_mistakes(labels, labels, labels, 3))


@pytest.mark.parametrize(
    ('low', 'high', 'expected'),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.13, 2.4, [0, 0.5, 1, 1.5, 2, 2.5]),
        (1, 300, [0, 100, 200, 300]),
        (-3, 3, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert nice_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize('low, high', [(0, 0), (5, 5), (-1e29, 1e29), (1e-300, 1e-300), (1, 1 + 1e-15), (0, 5e-324)])
def test_ticks_of_any_range(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 12 and all(map(math.isfinite, ticks)) and ticks[0] < ticks[-1]


def test_epochs_have_whole_ticks():
    assert nice_ticks(1, 3, 6, least=1.0) == [1, 2, 3]


def texts(chart) -> list[str]:
    return [element.text for element in chart.iter('text')]


def test_a_curve_is_where_its_points_are():
    chart = line_chart('loss', [Series('training', [(1, 0.0), (2, 1.0), (3, 0.5)])])
    (curve,) = chart.iter('polyline')
    (x1, y1), (x2, y2), (x3, y3) = (map(float, point.split(',')) for point in curve.get('points').split())
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and x1 < x2
    assert y2 < y3 < y1 and y3 - y2 == pytest.approx((y1 - y2) / 2, abs=0.2)
    assert len(list(chart.iter('circle'))) == 3
    assert texts(chart) == ['0', '0.2', '0.4', '0.6', '0.8', '1', '1', '2', '3', 'epoch']


def test_a_single_point_and_a_constant_are_drawn():
    for points in ([(4, 0.25)], [(1, 0.0), (2, 0.0)]):
        chart = line_chart('x', [Series('a', points)])
        heights = {float(circle.get('cy')) for circle in chart.iter('circle')}
        assert len(heights) == 1 and 20 < heights.pop() < 190


def test_long_curves_are_thinned():
    points = [(k, math.sin(k)) for k in range(100_000)]
    kept = thinned(points)
    assert len(kept) == 400 and kept[0] == points[0] and kept[-1] == points[-1]
    assert not list(line_chart('x', [Series('a', points)]).iter('circle'))


def test_bars_of_the_reliability_diagram():
    found = calibrate(np.array([0.95, 0.96, 0.1]), np.array([True, False, False]), bins=10)
    bars = [bar for bar in reliability_diagram('r', found).iter('rect') if bar.get('class') == 'bar c0']
    assert sorted(float(bar.get('height')) for bar in bars) == [0, 150]


def test_elements():
    element = el('p', 'a', el('b', 1), None, ['c', el('i')], 'd', class_='x', stroke_width=2, title=None)
    assert element.attrib == {'class': 'x', 'stroke-width': '2'}
    assert (element.text, element[0].tail, element[1].tail) == ('a', 'c', 'd')
