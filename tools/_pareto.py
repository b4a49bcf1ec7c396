# SPDX-License-Identifier: Apache-2.0
"""The frontier of a sweep, and the picture of it that tools/plan.py draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke


class Dot(NamedTuple):
    """A combination in the picture.

    Attributes:
        removed, keep_rate, r: what it is; they become colour, shade and shape.
        images_per_second: the height, as (first quartile, median, third quartile).
        macs: multiply-accumulates of an image.
        score: metric of the task, from 0 to 1; None: not known.
        number: on the frontier; None: not on it.
    """

    removed: str
    keep_rate: str
    r: str
    images_per_second: tuple[float, float, float]
    macs: int
    score: float | None
    number: int | None


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points that no other one beats, in order, where more of both numbers is better.

    A point beats another when it is at least as good in both numbers, and better in one. Equal points do not.
    """
    frontier: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        last = points[frontier[-1]] if frontier else None
        if last is None or points[index][1] > last[1] or points[index] == last:
            frontier.append(index)
    return sorted(frontier)


# ---------------------------------------------------------------------------------------------------- drawing
# Okabe and Ito's colours, which colour-blind people can tell apart.
PALETTE = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00', '#56B4E9', '#999999')
MARKERS = 'osD^vPXp'
INK, FAINT, GRID = '#222222', '#777777', '#E8E8E8'
LEGEND_TITLES = ('attention removed', 'keep rate', 'tokens merged, r')
PALEST = 0.8  # how white the smallest keep rate is
PANEL, KEY, HEIGHT, ROW, BORDER = 5.4, 4.1, 5.0, 0.21, 1.2  # inches; BORDER: above and below the panels


def draw(file: IO[bytes], dots: Sequence[Dot], title: str, caption: str, metric: str) -> None:
    """Write a PNG: speed against computation, and against `metric` where it is known; the frontier has numbers."""
    known = dots[0].score is not None
    frontier = sorted((dot for dot in dots if dot.number is not None), key=lambda dot: dot.number)
    columns = 1 + known
    looks = Looks(dots)
    rows = len(frontier) + 2 + sum(len(entries) + 2 for _, entries in looks.legends())
    figure = Figure((PANEL * columns + KEY, max(HEIGHT, ROW * rows + BORDER)), dpi=130, layout='constrained')
    *panels, key = figure.subplots(1, columns + 1, width_ratios=[PANEL] * columns + [KEY])
    draw_panel(panels[0], dots, [dot.macs / 1e9 for dot in dots], looks, joined=not known)
    panels[0].set_xlabel('MACs of an image, G')
    panels[0].set_ylabel('images/s')
    if known:
        draw_panel(panels[1], dots, [100 * dot.score for dot in dots], looks, joined=True)
        panels[1].set_xlabel(f'{metric}, %')
    draw_key(key, frontier, dots[0], looks, metric)
    figure.suptitle(f'{title}: {len(dots)} combinations, {len(frontier)} on the frontier', color=INK, weight='bold')
    figure.supxlabel(caption, color=FAINT, fontsize=8.5)
    figure.savefig(file, format='png')


class Looks:
    """Colour, shade and shape of the dots."""

    def __init__(self, dots: Sequence[Dot]):
        removed, keep_rates, numbers = (list(dict.fromkeys(values)) for values in list(zip(*dots))[:3])
        keep_rates.sort(key=float, reverse=True)
        paler = PALEST / max(1, len(keep_rates) - 1)
        self.colours = {value: to_rgb(PALETTE[i % len(PALETTE)]) for i, value in enumerate(removed)}
        self.white = {value: i * paler for i, value in enumerate(keep_rates)}
        self.markers = {value: MARKERS[i % len(MARKERS)] for i, value in enumerate(numbers)}

    def style(self, dot: Dot) -> dict:
        """Arguments of a marker; black around those on the frontier."""
        colour = self.colours[dot.removed]
        return {
            'marker': self.markers[dot.r],
            'markerfacecolor': self.shade(colour, dot.keep_rate),
            'markeredgecolor': colour if dot.number is None else INK,
            'markeredgewidth': 1.0 if dot.number is None else 1.4,
            'markersize': 6 if dot.number is None else 8,
            'linestyle': '',
        }

    def shade(self, colour: tuple[float, float, float], keep_rate: str) -> tuple[float, ...]:
        """The paler, the fewer tokens are kept."""
        white = self.white[keep_rate]
        return tuple(white + (1 - white) * part for part in colour)

    def legends(self) -> list[tuple[str, dict[str, dict]]]:
        """Title and entries of each legend that tells anything."""
        plain = {'marker': 'o', 'markersize': 7, 'linestyle': '', 'markeredgecolor': INK, 'markeredgewidth': 0.5}
        grey = to_rgb(INK)
        legends = [
            {value: {**plain, 'markerfacecolor': colour} for value, colour in self.colours.items()},
            {value: {**plain, 'markerfacecolor': self.shade(grey, value)} for value in self.white},
            {value: {**plain, 'markerfacecolor': 'white', 'marker': marker} for value, marker in self.markers.items()},
        ]
        return [(title, entries) for title, entries in zip(LEGEND_TITLES, legends) if len(entries) > 1]


def draw_panel(axes: Axes, dots: Sequence[Dot], places: Sequence[float], looks: Looks, joined: bool) -> None:
    """Dots at `places` and their speeds; a line joins the frontier where it is the frontier of these two numbers."""
    axes.grid(color=GRID, zorder=0)
    axes.spines[['top', 'right']].set_visible(False)
    axes.spines[['left', 'bottom']].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelcolor=INK)
    axes.margins(0.07)
    if joined:
        line = sorted((x, dot.images_per_second[1]) for x, dot in zip(places, dots) if dot.number is not None)
        axes.plot(*zip(*line), color=INK, linewidth=1.2, alpha=0.5, zorder=2)
    for x, dot in zip(places, dots):
        low, speed, high = dot.images_per_second
        on_top = 4 if dot.number is None else 6
        axes.plot([x, x], [low, high], color=looks.colours[dot.removed], alpha=0.45, linewidth=1.2, zorder=on_top - 1)
        axes.plot([x], [speed], zorder=on_top, **looks.style(dot))
        if dot.number is not None:
            axes.annotate(
                str(dot.number), (x, speed), (5, 5), textcoords='offset points', color=INK, weight='bold', fontsize=9,
                zorder=7, path_effects=[withStroke(linewidth=1.8, foreground='white')],
            )  # fmt: skip


def draw_key(axes: Axes, frontier: Sequence[Dot], given: Dot, looks: Looks, metric: str) -> None:
    """The frontier as a table, and the legends below."""
    axes.axis('off')
    known = given.score is not None
    line = ROW / (axes.figure.get_figheight() - BORDER)
    columns = (0.06, 0.13, 0.46, 0.60, 0.77, 0.98) if known else (0.06, 0.13, 0.52, 0.70, 0.97)

    def write(row: float, x: float, text: str, **style) -> None:
        axes.text(x, 1 - row * line, text, transform=axes.transAxes, fontsize=9, va='top', **style)

    titles = ('', 'removed', 'keep', 'r', 'speed', metric.removesuffix(' accuracy'))
    rows = [
        (str(dot.number), dot.removed, dot.keep_rate, dot.r,
         f'{dot.images_per_second[1] / given.images_per_second[1]:.2f} ×', f'{100 * (dot.score or 0):.2f}')
        for dot in frontier
    ]  # fmt: skip
    for row, cells in enumerate([titles, *rows]):
        for column, (x, text) in enumerate(zip(columns, cells)):
            colour, weight = (FAINT, 'normal') if row == 0 else (INK, 'bold' if column == 0 else 'normal')
            write(row, x, text, ha='left' if column == 1 else 'right', color=colour, weight=weight)
    row = len(frontier) + 2
    for title, entries in looks.legends():
        write(row, 0.0, title, color=FAINT)
        for value, style in entries.items():
            row += 1
            y = 1 - (row + 0.26) * line
            axes.add_line(Line2D([0.06], [y], transform=axes.transAxes, clip_on=False, **style))
            write(row, 0.13, value, color=INK)
        row += 2
