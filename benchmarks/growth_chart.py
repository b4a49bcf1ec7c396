# SPDX-License-Identifier: Apache-2.0
"""Picture of the growth of time and memory, for benchmarks/growth.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

# Okabe and Ito's colors, distinct for color-blind readers.
COLORS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7')
INK, FAINT, GRID = '#222222', '#777777', '#E8E8E8'
KINDS = {'cpu_seconds': ('processor time of a step, s', 1.0), 'memory_bytes': ('peak memory, GB', 1e9)}
IMAGE_KINDS = {
    'seconds': ({'data set s': 'read the list', 'epoch s': 'first batch of an epoch'}, 'processor time, s'),
    'memory': ({'data set MB': 'data set', 'data set peak MB': 'peak while reading', 'epoch peak MB': 'order of an epoch',
                'worker MB': 'private to a worker'}, 'memory, MB'),
}  # fmt: skip


def draw(file: IO[bytes], result: dict) -> None:
    """Write a PNG: time in the upper row, memory in the lower one; a column for each axis and for the number of images."""
    axes = list(dict.fromkeys(row['axis'] for row in result['models']))
    columns = len(axes) + bool(result['images'])
    figure = Figure((3.5 * columns, 6.4), dpi=62, layout='constrained')
    panels = figure.subplots(2, columns, squeeze=False)
    for column, axis in enumerate(axes):
        rows = [row for row in result['models'] if row['axis'] == axis]
        for panel, (kind, (title, unit)) in zip(panels[:, column], KINDS.items()):
            draw_models(panel, rows, kind, unit)
            decorate(panel, axis, title if column == 0 else '', [point[axis] for point in rows[0]['points']])
    if result['images']:
        counts = [row['images'] for row in result['images']]
        for panel, (lines, title) in zip(panels[:, -1], IMAGE_KINDS.values()):
            for color, (key, label) in zip(COLORS, lines.items()):
                values = [max(row[key], 1e-3) for row in result['images']]
                panel.plot(counts, values, 'o-', color=color, markersize=4, linewidth=1.3, label=label)
            decorate(panel, 'images in a list file', title, counts)
    figure.savefig(file, format='png')


def draw_models(panel: Axes, rows: Sequence[dict], kind: str, unit: float) -> None:
    """Draw a line for each model, with its exponent in the legend."""
    for color, row in zip(COLORS, rows):
        x, y = zip(*((point[row['axis']], point[kind] / unit) for point in row['points']))
        found = row['exponents'][kind]
        label = f'{row["name"]}: {found["all"]:.2f}, end {found["last"]:.2f}'
        panel.plot(x, y, 'o-', color=color, markersize=4, linewidth=1.3, label=label)


def decorate(panel: Axes, x_title: str, y_title: str, ticks: Sequence[float]) -> None:
    panel.set_xscale('log')
    panel.set_yscale('log')
    panel.set_xlabel(x_title, color=INK)
    panel.set_ylabel(y_title, color=INK)
    if max(ticks) < 1e5:
        panel.set_xticks(ticks)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(color=GRID, which='both', zorder=0)
    panel.spines[['top', 'right']].set_visible(False)
    panel.tick_params(colors=FAINT, labelcolor=INK, labelsize=8)
    panel.legend(fontsize=7.5, frameon=False)
