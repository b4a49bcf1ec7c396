# SPDX-License-Identifier: Apache-2.0
"""Write the curves of the runs on the embedded digits: docs/lambda_digits.png, mae_digits.png and mocov3_digits.png.

    python docs/figures/digits.py lambda output
    python docs/figures/digits.py mae output
    python docs/figures/digits.py mocov3 output

The second argument is the parent of the run folders, whose names are those of the commands in docs/. Runs of further
seeds are NAME_1, NAME_2 and so on.
"""

from __future__ import annotations

import glob
import json
import os
import re
import sys

from diagram import DOCS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GRAY = (
    '#0072B2',
    '#D55E00',
    '#009E73',
    '#888888',
)  # Okabe and Ito: distinct for color-blind readers


def rows(folder: str, kind: str) -> list[dict]:
    """Return the rows of metrics.jsonl of one kind: 'train' or 'val'."""
    with open(os.path.join(folder, 'metrics.jsonl'), encoding='utf-8') as file:
        return [row for row in map(json.loads, file) if row['kind'] == kind]


def attention_weights(folder: str) -> dict[int, float]:
    """Return λ by epoch, from the log lines of the steps."""
    with open(os.path.join(folder, 'log.txt'), encoding='utf-8') as file:
        found = re.findall(r'Epoch\[(\d+)/\d+\], Step.* attn_lambda: ([\d.]+)', file.read())
    return {int(epoch): float(value) for epoch, value in found}


def seeds(parent: str, name: str) -> list[str]:
    """Return the run folders NAME, NAME_1, …"""
    return [os.path.join(parent, name), *sorted(glob.glob(os.path.join(parent, f'{name}_[0-9]')))]


def curve(axes: Axes, folder: str, field: str, color: str, label: str = '', first: int = 0, scale: float = 100) -> None:
    """Plot a field of the validations against the epoch; `first`: epochs before this run."""
    found = rows(folder, 'val')
    x, y = [first + row['epoch'] for row in found], [scale * row[field] for row in found]
    axes.plot(x, y, 'o-', color=color, label=label, markersize=3)


def canvas(columns: int, width: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, 3.4), layout='constrained')
    panels = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axes in panels:
        axes.grid(color='#E6E6E6')
        axes.spines[['top', 'right']].set_visible(False)
    return figure, panels


def draw_lambda(parent: str) -> Figure:
    """Plot accuracy with and without attention removal, and λ."""
    figure, (axes,) = canvas(1, 7)
    dense = os.path.join(parent, 'dense')
    last = rows(dense, 'val')[-1]['epoch']
    curve(axes, dense, 'acc1', GRAY, 'dense training')
    curve(axes, os.path.join(parent, 'continued'), 'acc1', GREEN, 'dense training continued', last)
    curve(axes, os.path.join(parent, 'fading'), 'acc1', ORANGE, 'attention of two blocks decays', last)
    weight = axes.twinx()
    epochs, values = zip(*attention_weights(os.path.join(parent, 'fading')).items())
    weight.step([last + epoch for epoch in epochs], values, '--', color=BLUE, where='mid')
    weight.set_ylabel('λ (dashed)', color=BLUE)
    weight.set(ylim=(-0.05, 1.6), yticks=(0, 0.5, 1))
    axes.set(xlabel='epoch', ylabel='validation top-1, %', ylim=(80, 100))
    axes.legend(loc='lower left', fontsize=8, framealpha=1)
    return figure


def draw_mae(parent: str) -> Figure:
    """Plot the loss of pre-training, and the accuracy after it and from scratch."""
    figure, (loss, accuracy) = canvas(2, 9)
    for folder in seeds(parent, 'mae'):
        curve(loss, folder, 'loss', BLUE, scale=1)
    for name, color, label in (('finetuned', BLUE, 'after MAE pre-training'), ('scratch', ORANGE, 'from scratch')):
        for index, folder in enumerate(seeds(parent, name)):
            curve(accuracy, folder, 'acc1', color, '' if index else label)
    loss.set(xlabel='epoch of pre-training', ylabel='reconstruction loss, validation', ylim=(0, None))
    accuracy.set(xlabel='epoch of fine-tuning', ylabel='top-1 with 20 labels per class, %', ylim=(None, 100))
    accuracy.legend(loc='lower right')
    return figure


def draw_mocov3(parent: str) -> Figure:
    """Plot the accuracy of the kNN probe during pre-training."""
    figure, (axes,) = canvas(1, 5)
    for index, (folder, color) in enumerate(zip(seeds(parent, 'moco'), (BLUE, ORANGE, GREEN))):
        curve(axes, folder, 'knn_acc1', color, f'seed {index}')
    axes.set(xlabel='epoch of pre-training', ylabel='kNN top-1, %', ylim=(None, 100))
    axes.legend(loc='lower right')
    return figure


def main(name: str, parent: str) -> None:
    figure = {'lambda': draw_lambda, 'mae': draw_mae, 'mocov3': draw_mocov3}[name](parent)
    path = os.path.join(DOCS, f'{name}_digits.png')
    figure.savefig(path, dpi=130, metadata={'Software': None})
    print(os.path.relpath(path))


if __name__ == '__main__':
    main(*sys.argv[1:])
