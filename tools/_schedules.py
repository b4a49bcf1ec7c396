# SPDX-License-Identifier: Apache-2.0
"""`python -m config -plot FILE.png`: draw learning rate, keep rate, λ, momentum and EMA decay over a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import IO

import numpy as np
from matplotlib.figure import Figure
from yacs.config import CfgNode

from config import get_config, update_config
from datasets.loader import batches_per_epoch
from engine.length import count_steps
from engine.run_curves import Curve, run_curves
from engine.train import check_schedules
from tasks import Task, build_task
from tools._output import output_file
from utils.files import atomic_write

INK, FAINT, GRID, BLUE = '#222222', '#777777', '#E8E8E8', '#0072B2'
WIDTH, PANEL, BORDER = 8.0, 2.1, 1.0  # inches; PANEL: height of a panel, BORDER: total height above and below


def plot(args: argparse.Namespace) -> None:
    """Draw the schedules of a command line to the file `args.plot`; `-ngpus` is the number of processes."""
    target = output_file('-plot', args.plot, '.png')
    config = update_config(get_config(), args)
    task, processes = build_task(config), max(getattr(args, 'ngpus', 1), 1)
    check_schedules(config, task)
    steps = steps_per_epoch(config, task, processes)
    global_batch = config.DATA.BATCH_SIZE * config.TRAIN.ACCUM_ITER * processes
    epochs, curves = run_curves(config, task, global_batch, steps)
    with atomic_write(target) as file:
        draw(file, epochs, curves, config.MODEL.NAME, caption(config, processes, steps))
    for curve in curves:
        low, high = curve.values.min(), curve.values.max()
        print(
            f'{curve.title}: {curve.values[0]:.6g} at the start, {curve.values[-1]:.6g} at the end, {low:.6g} to {high:.6g}'
        )
    print(target)


def steps_per_epoch(config: CfgNode, task: Task, processes: int) -> int | None:
    """Return the optimizer steps per epoch, for which the training images are counted; None if no schedule needs them."""
    if config.TRAIN.NUM_ITERS is None and config.TRAIN.WARMUP_ITERS is None:
        return None
    batches = batches_per_epoch(config, len(task.dataset('train')), processes)
    return max(count_steps(batches, config.TRAIN), 1)


def caption(config: CfgNode, processes: int, steps: int | None) -> str:
    """Describe what the learning rate depends on."""
    data, train = config.DATA, config.TRAIN
    text = f'{train.LR_SCHEDULER.NAME}, {data.BATCH_SIZE * train.ACCUM_ITER * processes} images per step = '
    text += f'{data.BATCH_SIZE} (DATA.BATCH_SIZE) × {train.ACCUM_ITER} (TRAIN.ACCUM_ITER) × {processes} (-ngpus)'
    if steps is not None:
        text += f', {steps} steps per epoch'
    return (
        text
        if train.LAYER_DECAY == 1
        else f'{text}; learning rate of the head, lower layers × {train.LAYER_DECAY:g} each'
    )


def draw(file: IO[bytes], epochs: np.ndarray, curves: Sequence[Curve], title: str, text: str) -> None:
    """Write a PNG with a panel per curve."""
    figure = Figure((WIDTH, PANEL * len(curves) + BORDER), dpi=120, layout='constrained')
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axes, curve in zip(panels, curves):
        axes.plot(epochs, curve.values, color=BLUE, linewidth=1.6, drawstyle='steps-post')
        axes.set_title(curve.title, loc='left', fontsize=10, color=INK)
        axes.grid(color=GRID)
        axes.spines[['top', 'right']].set_visible(False)
        axes.tick_params(colors=FAINT, labelcolor=INK)
        axes.ticklabel_format(axis='y', useOffset=False)
        axes.margins(x=0.01, y=0.08)
        if curve.values.min() == curve.values.max():
            axes.set_yticks([curve.values[0]], [f'{curve.values[0]:g}'])
    panels[-1].set_xlabel('epoch', color=INK)
    figure.suptitle(title, color=INK, weight='bold')
    figure.supxlabel(text, color=FAINT, fontsize=8)
    figure.savefig(file, format='png')
