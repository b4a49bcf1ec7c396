# SPDX-License-Identifier: Apache-2.0
"""Pareto frontier of a sweep, and its plot, for tools/plan.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke


class Point(NamedTuple):
    """A combination in the plot.

    Attributes:
        removed, keep_rate, r: settings of the combination, shown as color, shade and shape.
        images_per_second: (first quartile, median, third quartile).
        macs: multiply-accumulates per image.
        score: metric of the task, from 0 to 1; None: unknown.
        number: number on the frontier; None: not on it.
    """

    removed: str
    keep_rate: str
    r: str
    images_per_second: tuple[float, float, float]
    macs: int
    score: float | None
    number: int | None


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the non-dominated points, in order, where larger numbers are better.

    A point dominates another if it is at least as good in both numbers and better in one. Equal points do not.
    """
    frontier: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        last = points[frontier[-1]] if frontier else None
        if last is None or points[index][1] > last[1] or points[index] == last:
            frontier.append(index)
    return sorted(frontier)


# ---------------------------------------------------------------------------------------------------- drawing
# Okabe and Ito's colors, distinct for color-blind readers.
PALETTE = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00', '#56B4E9', '#999999')
MARKERS = 'osD^vPXp'
INK, FAINT, GRID = '#222222', '#777777', '#E8E8E8'
LEGEND_TITLES = ('attention removed', 'keep rate', 'tokens merged, r')
MAX_WHITE = 0.8  # fraction of white in the shade of the smallest keep rate
PANEL, KEY, HEIGHT, ROW, BORDER = 5.4, 4.1, 5.0, 0.21, 1.2  # inches; BORDER: total height above and below the panels


def draw(file: IO[bytes], points: Sequence[Point], title: str, caption: str, metric: str) -> None:
    """Write a PNG of speed against MACs, and against `metric` if it is known, with a numbered frontier."""
    known = points[0].score is not None
    frontier = sorted((point for point in points if point.number is not None), key=lambda point: point.number)
    columns = 1 + known
    styles = MarkerStyles(points)
    rows = len(frontier) + 2 + sum(len(entries) + 2 for _, entries in styles.legends())
    figure = Figure((PANEL * columns + KEY, max(HEIGHT, ROW * rows + BORDER)), dpi=130, layout='constrained')
    *panels, key = figure.subplots(1, columns + 1, width_ratios=[PANEL] * columns + [KEY])
    draw_panel(panels[0], points, [point.macs / 1e9 for point in points], styles, joined=not known)
    panels[0].set_xlabel('MACs of an image, G')
    panels[0].set_ylabel('images/s')
    if known:
        draw_panel(panels[1], points, [100 * point.score for point in points], styles, joined=True)
        panels[1].set_xlabel(f'{metric}, %')
    draw_key(key, frontier, points[0], styles, metric)
    figure.suptitle(f'{title}: {len(points)} combinations, {len(frontier)} on the frontier', color=INK, weight='bold')
    figure.supxlabel(caption, color=FAINT, fontsize=8.5)
    figure.savefig(file, format='png')


class MarkerStyles:
    """Color, shade and shape of the points."""

    def __init__(self, points: Sequence[Point]):
        removed, keep_rates, numbers = (list(dict.fromkeys(values)) for values in list(zip(*points))[:3])
        keep_rates.sort(key=float, reverse=True)
        step = MAX_WHITE / max(1, len(keep_rates) - 1)
        self.colors = {value: to_rgb(PALETTE[i % len(PALETTE)]) for i, value in enumerate(removed)}
        self.white = {value: i * step for i, value in enumerate(keep_rates)}
        self.markers = {value: MARKERS[i % len(MARKERS)] for i, value in enumerate(numbers)}

    def style(self, point: Point) -> dict:
        """Return the arguments of a marker; points on the frontier have a black edge."""
        color = self.colors[point.removed]
        return {
            'marker': self.markers[point.r],
            'markerfacecolor': self.shade(color, point.keep_rate),
            'markeredgecolor': color if point.number is None else INK,
            'markeredgewidth': 1.0 if point.number is None else 1.4,
            'markersize': 6 if point.number is None else 8,
            'linestyle': '',
        }

    def shade(self, color: tuple[float, float, float], keep_rate: str) -> tuple[float, ...]:
        """Mix a color with white: the fewer tokens are kept, the paler."""
        white = self.white[keep_rate]
        return tuple(white + (1 - white) * part for part in color)

    def legends(self) -> list[tuple[str, dict[str, dict]]]:
        """Return title and entries of each legend with more than one entry."""
        plain = {'marker': 'o', 'markersize': 7, 'linestyle': '', 'markeredgecolor': INK, 'markeredgewidth': 0.5}
        gray = to_rgb(INK)
        legends = [
            {value: {**plain, 'markerfacecolor': color} for value, color in self.colors.items()},
            {value: {**plain, 'markerfacecolor': self.shade(gray, value)} for value in self.white},
            {value: {**plain, 'markerfacecolor': 'white', 'marker': marker} for value, marker in self.markers.items()},
        ]
        return [(title, entries) for title, entries in zip(LEGEND_TITLES, legends) if len(entries) > 1]


def draw_panel(
    axes: Axes, points: Sequence[Point], x_values: Sequence[float], styles: MarkerStyles, joined: bool
) -> None:
    """Draw the points at `x_values` and their speeds; `joined`: draw a line through the frontier."""
    axes.grid(color=GRID, zorder=0)
    axes.spines[['top', 'right']].set_visible(False)
    axes.spines[['left', 'bottom']].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelcolor=INK)
    axes.margins(0.07)
    if joined:
        line = sorted((x, point.images_per_second[1]) for x, point in zip(x_values, points) if point.number is not None)
        axes.plot(*zip(*line), color=INK, linewidth=1.2, alpha=0.5, zorder=2)
    for x, point in zip(x_values, points):
        low, speed, high = point.images_per_second
        on_top = 4 if point.number is None else 6
        axes.plot([x, x], [low, high], color=styles.colors[point.removed], alpha=0.45, linewidth=1.2, zorder=on_top - 1)
        axes.plot([x], [speed], zorder=on_top, **styles.style(point))
        if point.number is not None:
            axes.annotate(
                str(point.number), (x, speed), (5, 5), textcoords='offset points', color=INK, weight='bold', fontsize=9,
                zorder=7, path_effects=[withStroke(linewidth=1.8, foreground='white')],
            )  # fmt: skip


def draw_key(axes: Axes, frontier: Sequence[Point], given: Point, styles: MarkerStyles, metric: str) -> None:
    """Write the frontier as a table, and the legends below it."""
    axes.axis('off')
    known = given.score is not None
    line = ROW / (axes.figure.get_figheight() - BORDER)
    columns = (0.06, 0.13, 0.46, 0.60, 0.77, 0.98) if known else (0.06, 0.13, 0.52, 0.70, 0.97)

    def write(row: float, x: float, text: str, **style) -> None:
        axes.text(x, 1 - row * line, text, transform=axes.transAxes, fontsize=9, va='top', **style)

    titles = ('', 'removed', 'keep', 'r', 'speed', metric.removesuffix(' accuracy'))
    rows = [
        (str(point.number), point.removed, point.keep_rate, point.r,
         f'{point.images_per_second[1] / given.images_per_second[1]:.2f} ×', f'{100 * (point.score or 0):.2f}')
        for point in frontier
    ]  # fmt: skip
    for row, cells in enumerate([titles, *rows]):
        for column, (x, text) in enumerate(zip(columns, cells)):
            color, weight = (FAINT, 'normal') if row == 0 else (INK, 'bold' if column == 0 else 'normal')
            write(row, x, text, ha='left' if column == 1 else 'right', color=color, weight=weight)
    row = len(frontier) + 2
    for title, entries in styles.legends():
        write(row, 0.0, title, color=FAINT)
        for value, style in entries.items():
            row += 1
            y = 1 - (row + 0.26) * line
            axes.add_line(Line2D([0.06], [y], transform=axes.transAxes, clip_on=False, **style))
            write(row, 0.13, value, color=INK)
        row += 2
