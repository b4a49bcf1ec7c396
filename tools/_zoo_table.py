# SPDX-License-Identifier: Apache-2.0
"""Tables and picture of published and measured accuracies, for tools/reproduce.py."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import IO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter

from tools._pareto import FAINT, GRID, INK, MARKERS, PALETTE
from utils.files import atomic_write
from utils.text import printable

FIELDS = (
    'name', 'status', 'published_acc1', 'acc1', 'published_acc5', 'acc5', 'params', 'macs', 'images_per_second', 'images',
    'unreadable', 'weights', 'reason',
)  # fmt: skip
TITLES = (
    'configuration', 'top-1 published', 'top-1 measured', 'difference', 'top-5 published', 'top-5 measured', 'params M',
    'MACs G', 'images/s', 'remark',
)  # fmt: skip
NONE = '–'
PANEL, KEY, HEIGHT, ROW, BORDER = 4.8, 4.4, 4.6, 0.2, 1.4  # inches; BORDER: total height above and below the panels


def write_tables(folder: str, rows: Sequence[Mapping], conditions: Mapping) -> None:
    """Write table.md and table.csv."""
    with atomic_write(os.path.join(folder, 'table.csv'), 'w') as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows({field: '' if row.get(field) is None else row[field] for field in FIELDS} for row in rows)
    with atomic_write(os.path.join(folder, 'table.md'), 'w') as file:
        file.write(markdown(rows, conditions))


def markdown(rows: Sequence[Mapping], conditions: Mapping) -> str:
    """Return the table with its conditions, and the picture."""
    lines = [f'| {" | ".join(cells)} |' for cells in (TITLES, ['---'] * len(TITLES), *map(cells_of, rows))]
    settings = ', '.join(f'{key} {value}' for key, value in conditions.items())
    return (
        '# Published and measured accuracies\n\nTop-1 and top-5 in percent. MACs are multiply-accumulates of one image. '
        f'Images/s are of the forward pass on random images.\n\nMeasured with: {settings}.\n\n'
        + '\n'.join(lines)
        + '\n'
        + '\n![Top-1 accuracy against MACs and against images/s](zoo.png)\n' * any('acc1' in row for row in rows)
    )


def cells_of(row: Mapping) -> list[str]:
    """Return the cells of a row as text."""
    published, measured = row['published_acc1'], row.get('acc1')
    difference = None if published is None or measured is None else measured - published
    unreadable = f'{row["unreadable"]} images unreadable' if row.get('unreadable') else ''
    remark = printable(row.get('reason') or unreadable).replace('|', '\\|')
    return [
        row['name'], _number(published, '.2f'), _number(measured, '.2f'), _number(difference, '+.2f'),
        _number(row['published_acc5'], '.2f'), _number(row.get('acc5'), '.2f'), _number(row.get('params'), '.1f', 1e6),
        _number(row.get('macs'), '.2f', 1e9), _number(row.get('images_per_second'), '.1f'), remark,
    ]  # fmt: skip


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return NONE if value is None else format(value / unit, form)


# ---------------------------------------------------------------------------------------------------- picture
def draw(file: IO[bytes], rows: Sequence[Mapping], caption: str) -> None:
    """Write a PNG of top-1 against MACs and against speed: measured filled, published hollow, joined where both are known."""
    height = max(HEIGHT, ROW * (len(rows) + 8) + BORDER)
    figure = Figure((2 * PANEL + KEY, height), dpi=130, layout='constrained')
    macs, speed, key = figure.subplots(1, 3, width_ratios=[PANEL, PANEL, KEY])
    styles = family_styles(rows)
    _panel(macs, rows, [row['macs'] / 1e9 for row in rows], styles)
    _panel(speed, rows, [row['images_per_second'] for row in rows], styles)
    macs.set(xlabel='MACs of an image, G', ylabel='top-1, %')
    speed.set(xlabel='images/s')
    _key(key, rows, styles, height)
    figure.suptitle('Published and measured accuracy', color=INK, weight='bold')
    figure.supxlabel(caption, color=FAINT, fontsize=8.5)
    figure.savefig(file, format='png')


def family_styles(rows: Sequence[Mapping]) -> dict[str, dict]:
    """Return color and marker of each family, the first word of the names."""
    families = dict.fromkeys(family(row) for row in rows)
    return {
        name: {'color': PALETTE[number % len(PALETTE)], 'marker': MARKERS[number // len(PALETTE) % len(MARKERS)]}
        for number, name in enumerate(families)
    }


def family(row: Mapping) -> str:
    """Return the first word of a configuration's name."""
    return os.path.basename(row['name']).partition('_')[0]


def _panel(axes: Axes, rows: Sequence[Mapping], x_values: Sequence[float], styles: Mapping[str, Mapping]) -> None:
    axes.grid(color=GRID, zorder=0)
    axes.spines[['top', 'right']].set_visible(False)
    axes.spines[['left', 'bottom']].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelcolor=INK)
    axes.margins(0.09)
    if max(x_values) > 8 * min(x_values):
        axes.set_xscale('log')
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter('{x:g}')
        axes.xaxis.set_minor_formatter(NullFormatter())
    for number, (row, x) in enumerate(zip(rows, x_values), 1):
        style, published = styles[family(row)], row['published_acc1']
        if published is not None:
            axes.plot([x, x], [published, row['acc1']], color=style['color'], linewidth=1, alpha=0.6, zorder=2)
            axes.plot([x], [published], **style, markerfacecolor='white', markersize=7, zorder=3)
        axes.plot([x], [row['acc1']], **style, markersize=7, zorder=4)
        axes.annotate(
            str(number), (x, row['acc1']), (5, 4), textcoords='offset points', color=INK, fontsize=8, zorder=5,
            path_effects=[withStroke(linewidth=1.8, foreground='white')],
        )  # fmt: skip


def _key(axes: Axes, rows: Sequence[Mapping], styles: Mapping[str, Mapping], height: float) -> None:
    """Write numbers and names with the measured accuracies, and explain the markers below."""
    axes.axis('off')
    line = ROW / (height - BORDER)
    place = {'transform': axes.transAxes, 'fontsize': 8, 'va': 'center'}
    for number, row in enumerate(rows, 1):
        y = 1 - number * line
        marker = Line2D([0.12], [y], transform=axes.transAxes, linestyle='', markersize=5, **styles[family(row)])
        axes.add_line(marker)
        axes.text(0.08, y, str(number), color=INK, ha='right', weight='bold', **place)
        axes.text(0.16, y, row['name'], color=INK, **place)
        axes.text(1.0, y, f'{row["acc1"]:.2f}', color=INK, ha='right', **place)
    for number, (face, text) in enumerate(((FAINT, 'measured'), ('white', 'published')), len(rows) + 2):
        y = 1 - number * line
        axes.add_line(
            Line2D([0.12], [y], transform=axes.transAxes, linestyle='', marker='o', color=FAINT, markerfacecolor=face)
        )
        axes.text(0.16, y, text, color=FAINT, **place)
