# SPDX-License-Identifier: Apache-2.0
"""Boxes, arrows and labels of the diagrams in docs/."""

from __future__ import annotations

import os

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BLUE, GREEN, RED, SAND, VIOLET, GRAY = '#d8e7f3', '#dcefdc', '#f4dcdc', '#f3e8d3', '#e6e0ef', '#eeeeee'
INK, FAINT = '#222222', '#555555'


class Diagram:
    """A white canvas in units of 1/100 inch, the origin at the lower left."""

    def __init__(self, width: int, height: int):
        self.figure = Figure(figsize=(width / 100, height / 100))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis('off')

    def text(self, x: float, y: float, text: str, size: float = 9, color: str = INK, **options) -> None:
        self.axes.text(x, y, text, fontsize=size, color=color, va='center', **{'ha': 'center', **options})

    def box(
        self, x: float, y: float, width: float, height: float, title: str, lines: str = '', color: str = GRAY
    ) -> None:
        """Draw a rounded box with its lower left corner at (x, y), and `lines` below the bold title."""
        style = 'round,pad=0,rounding_size=7'
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=color, edgecolor=FAINT))
        count = lines.count('\n') + 1 if lines else 0
        middle = y + height / 2
        self.text(x + width / 2, middle + 8 * count, title, 10, weight='bold')
        if lines:
            self.text(x + width / 2, middle - 9, lines, 8.5, linespacing=1.5)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], label: str = '') -> None:
        """Draw an arrow with a label above its middle."""
        self.axes.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=11, color=FAINT))
        if label:
            self.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 9, label, 8, FAINT)

    def save(self, name: str) -> None:
        """Write docs/NAME."""
        path = os.path.join(DOCS, name)
        self.figure.savefig(path, dpi=130, facecolor='white', metadata={'Software': None})
        print(os.path.relpath(path))
