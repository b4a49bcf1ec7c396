# SPDX-License-Identifier: Apache-2.0
"""Charts as SVG elements, whose colors come from the style sheet of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analysis.report.html import Element, el
from analysis.report.statistics import Calibration

COLORS = 8  # classes c0 to c7 of the style sheet
_POINTS = 400  # of a curve; more are thinned out
_MARKED = 40  # points of a curve up to which each has a dot
_LONGEST = 18  # characters of a name in a chart
_LETTER = 6.4  # mean width of a letter


class Series(NamedTuple):
    """A curve: its name in tooltips, its points, the number of its color and of its dash pattern (0: solid)."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    dash: int = 0


class Scale(NamedTuple):
    """Linear map from values [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value, rounded to a tenth."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def nice_ticks(low: float, high: float, count: int = 5, least: float = 0.0) -> list[float]:
    """Return about `count` round numbers that cover [low, high].

    They are equally spaced by 1, 2 or 5 times a power of 10, and by at least `least`.
    """
    span = max(high - low, 1e-9 * max(abs(high), abs(low)))
    span = span if span > 1e-300 else 1.0  # powers of smaller numbers are 0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = max(least, next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= count))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    """Return a range around a constant; other ranges are unchanged."""
    pad = 0.0 if high > low else 0.05 * abs(low) or 0.5
    return low - pad, high + pad


def number_text(value: float) -> str:
    """Return a number with at most four significant digits."""
    return f'{value:.4g}'


def shortened(name: str, limit: int = _LONGEST) -> str:
    """Return a name cut to `limit` characters."""
    return name if len(name) <= limit else name[: limit - 1] + '…'


def _gutter(names: Sequence[str]) -> float:
    """Return the width of the longest of the shortened names."""
    return _LETTER * max(len(shortened(name)) for name in names) + 8


def svg(width: float, height: float, *children, label: str) -> Element:
    """Return an SVG element of this size in its own units; `label`: read by screen readers."""
    box, limit = f'0 0 {width:g} {height:g}', f'max-width: {1.3 * width:.0f}px'
    return el('svg', *children, viewBox=box, style=limit, role='img', aria_label=label)


def text(content: str, x: float, y: float, anchor: str = 'middle', class_: str | None = None, **attributes) -> Element:
    """Return a line of text."""
    return el('text', content, x=x, y=y, text_anchor=anchor, class_=class_, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Element:
    """Return a straight line."""
    return el('line', x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


# ---------------------------------------------------------------------------------------------------- curves
def line_chart(title: str, series: Sequence[Series], x_title: str = 'epoch', marked: bool = True) -> Element:
    """Draw curves over a common axis; `marked`: short curves have a dot with a tooltip at each point."""
    xs, ys = zip(*(point for curve in series for point in curve.points))
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs), 6, least=1.0), nice_ticks(*_padded(min(ys), max(ys)))
    width, height, left, bottom = 400, 240, 50, 204
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, left + 6, width - 10)
    y = Scale(y_ticks[0], y_ticks[-1], bottom, 8)
    parts = [line(left, y(tick), width - 4, y(tick), 'grid') for tick in y_ticks]
    parts += [text(number_text(tick), left - 6, y(tick) + 4, 'end') for tick in y_ticks]
    parts += [text(number_text(tick), x(tick), bottom + 16) for tick in x_ticks if x.low <= tick <= x.high]
    parts.append(line(left, bottom, width - 4, bottom, 'axis'))
    parts.append(text(x_title, (left + width) / 2, height - 3))
    for curve in series:
        parts += _curve(curve, x, y, x_title, marked)
    return svg(width, height, parts, label=title)


def _curve(series: Series, x: Scale, y: Scale, x_title: str, marked: bool) -> list[Element]:
    points, color = thinned(series.points), f'c{series.color % COLORS}'
    parts = []
    if len(points) > 1:
        path = ' '.join(f'{x(a):g},{y(b):g}' for a, b in points)
        parts.append(el('polyline', points=path, class_=f'curve {color} dash-{series.dash % 3}'))
    if len(points) == 1 or (marked and len(points) <= _MARKED):
        radius = 2.4 if len(points) > 1 else 4
        for a, b in points:
            tip = el('title', f'{series.name}: {number_text(b)} ({x_title} {number_text(a)})')
            parts.append(el('circle', tip, cx=x(a), cy=y(b), r=radius, class_=f'dot {color}'))
    return parts


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most about _POINTS of the points, with the first and the last one."""
    if len(points) <= _POINTS:
        return list(points)
    return [points[place] for place in np.linspace(0, len(points) - 1, _POINTS).round().astype(int)]


def legend(entries: Sequence[tuple[str, int, int]]) -> Element:
    """Return a legend of (text, color, dash)."""
    items = []
    for name, color, dash in entries:
        sample = el('line', x1=0, y1=5, x2=28, y2=5, class_=f'curve c{color % COLORS} dash-{dash % 3}')
        items.append(el('li', el('svg', sample, viewBox='0 0 28 10', aria_hidden='true'), el('span', name)))
    return el('ul', items, class_='legend')


# ---------------------------------------------------------------------------------------------------- classes
def dot_plot(title: str, names: Sequence[str], columns: Sequence[tuple[str, int, Sequence[float]]]) -> Element:
    """Draw a row per class with a dot per column, on an axis of fractions.

    Args:
        names: of the classes.
        columns: (name, color, value of each class).
    """
    values = [value for _, _, column in columns for value in column if not math.isnan(value)] or [0.0]
    low = math.floor(10 * min(min(values), 0.9)) / 10
    width, left, row, top = 560, max(40.0, _gutter(names)), 19, 8
    bottom = top + row * len(names)
    x = Scale(low, 1.0, left + 8, width - 14)
    ticks = [tick for tick in nice_ticks(low, 1.0) if low - 1e-9 <= tick <= 1 + 1e-9]
    parts = [line(x(tick), top, x(tick), bottom, 'grid') for tick in ticks]
    parts += [text(number_text(tick), x(tick), bottom + 16) for tick in ticks]
    for place, name in enumerate(names):
        middle = top + row * (place + 0.5)
        parts.append(text(shortened(name), left, middle + 4, 'end', 'strong'))
        parts.append(line(left + 8, middle, width - 14, middle, 'grid'))
        for label, color, column in columns:
            if not math.isnan(column[place]):
                tip = el('title', f'{name}, {label}: {column[place]:.4f}')
                dot = el('circle', tip, cx=x(column[place]), cy=middle, r=4.5, class_=f'dot c{color % COLORS}')
                parts.append(dot)
    return svg(width, bottom + 22, parts, label=title)


def matrix_chart(title: str, counts: np.ndarray, names: Sequence[str]) -> Element:
    """Draw a confusion matrix [K, K] of counts. The opacity of a cell is its share of the images of its class."""
    size, left = len(counts), _gutter(names) + 6
    top = 0.87 * _gutter(names) + 10  # the names are turned by 60 degrees
    cell = max(12.0, min(30.0, 520 / size))
    totals = np.maximum(counts.sum(1), 1)
    parts = []
    for row, column in zip(*np.nonzero(counts)):
        count, share = int(counts[row, column]), counts[row, column] / totals[row]
        right = row == column
        verdict = 'correct' if right else f'predicted as {names[column]}'
        tip = el('title', f'{names[row]} {verdict}: {count} of {totals[row]} ({100 * share:.1f} %)')
        place = {'x': round(left + cell * column, 1), 'y': round(top + cell * row, 1)}
        side = {'width': round(cell - 1, 1), 'height': round(cell - 1, 1)}
        opacity = round(0.1 + 0.5 * math.sqrt(share), 3)  # so that the count stays readable
        parts.append(el('rect', tip, **place, **side, fill_opacity=opacity, class_=f'bar {"good" if right else "bad"}'))
        if cell >= 22:
            parts.append(text(str(count), place['x'] + cell / 2, place['y'] + cell / 2 + 3.5, class_='on-color'))
    for number, name in enumerate(names):
        middle = (number + 0.5) * cell
        parts.append(text(shortened(name), left - 6, top + middle + 4, 'end', 'strong'))
        x, y = left + middle + 4, top - 6
        turned = f'rotate(-60 {x:g} {y:g})'
        parts.append(text(shortened(name), x, y, 'start', 'strong', transform=turned))
    parts.append(el('rect', x=left, y=top, width=cell * size, height=cell * size, fill='none', class_='grid'))
    return svg(left + cell * size + 0.5 * _gutter(names), top + cell * size + 4, parts, label=title)


# ---------------------------------------------------------------------------------------------------- calibration
def reliability_diagram(title: str, found: Calibration) -> Element:
    """Draw the accuracy of each bin of confidence as a bar with a mark at its mean confidence; below, its images."""
    side, left, top, below = 300, 46, 8, 60
    x, y = Scale(0, 1, left, left + side), Scale(0, 1, top + side, top)
    base = top + side + 18 + below
    heights = Scale(0, max(found.counts.max(), 1), 0, below)
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    parts = [line(left, y(tick), left + side, y(tick), 'grid') for tick in ticks]
    parts += [text(number_text(tick), left - 6, y(tick) + 4, 'end') for tick in ticks]
    parts += [text(number_text(tick), x(tick), base + 16) for tick in ticks]
    width, marks = side / len(found.counts), []
    for place in np.flatnonzero(found.counts):
        count, accuracy, confidence = found.counts[place], found.accuracies[place], found.confidences[place]
        words, edge = f'confidence {confidence:.3f}, accuracy {accuracy:.3f}, {count} images', left + width * place
        parts.append(_bar(words, edge, y(accuracy), width, y(0) - y(accuracy), 'bar c0'))
        parts.append(_bar(words, edge, base - heights(count), width, heights(count), 'bar c6'))
        marks.append(line(round(edge + 1, 1), y(confidence), round(edge + width - 1, 1), y(confidence), 'mark bad'))
    parts += [line(x(0), y(0), x(1), y(1), 'ideal'), *marks]
    parts.append(line(left, base, left + side, base, 'axis'))
    parts.append(text('confidence', left + side / 2, base + 32))
    parts.append(text('accuracy', 12, top + side / 2, transform=f'rotate(-90 12 {top + side / 2:g})'))
    parts.append(text('images', 12, base - below / 2, transform=f'rotate(-90 12 {base - below / 2:g})'))
    return svg(left + side + 10, base + 38, parts, label=title)


def _bar(tip: str, left: float, top: float, width: float, height: float, class_: str) -> Element:
    place = {'x': round(left + 1, 1), 'y': round(top, 1), 'width': round(width - 2, 1), 'height': round(height, 1)}
    return el('rect', el('title', tip), **place, class_=class_)
