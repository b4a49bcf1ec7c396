# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a finished run for tools/report.py: predictions, results by class, and pictures of kept tokens."""

from __future__ import annotations

import argparse
import os

import numpy as np
from yacs.config import CfgNode

from analysis.report.runs import EVALUATION
from config import get_config, update_config
from datasets import build_dataset
from datasets.subset import evenly_spaced
from datasets.transforms import build_transform
from deploy.inference import load_classifier
from engine.run import run_config
from models.vision_transformer import VisionTransformer
from tasks import TASKS
from tools.visualize_tokens import draw_strip, reductions, tile
from utils.files import atomic_write

STRIPS = 6  # images in the picture of kept tokens
_FLAGS = ('data_path', 'batch_size', 'num_workers', 'opts')


def evaluate_run(folder: str, args: argparse.Namespace) -> None:
    """Evaluate the best weights of a run, as `-eval -save_predictions` does; the files go to FOLDER/evaluation.

    Does nothing for a task without predictions, such as pre-training.

    Args:
        folder: of the run.
        args: flags that change the configuration of the run.

    Raises:
        UserError: see `run_config`.
    """
    given = {name: getattr(args, name) for name in _FLAGS if getattr(args, name, None)}
    changes = {'eval': True, 'save_predictions': True, 'output': folder, 'tag': EVALUATION, 'pretrained': folder}
    path = os.path.join(folder, 'config.yaml')
    config = update_config(get_config(), argparse.Namespace(cfg=path, **changes, **given))
    if not TASKS[config.TRAIN.TASK].has_predictions():
        print(f'{folder}: TRAIN.TASK {config.TRAIN.TASK} has no predictions, so -evaluate adds nothing')
        return
    run_config(config)
    draw_tokens(config, os.path.join(folder, EVALUATION, 'tokens.png'))


def draw_tokens(config: CfgNode, target: str) -> None:
    """Draw which patches of some validation images the blocks keep, if the model is one that reduces its tokens."""
    if config.MODEL.EVIT.KEEP_RATE == 1.0 and not (config.MODEL.TOME.R or config.MODEL.TOME.SCHEDULE):
        return
    model = load_classifier(config, log=lambda message: None)
    if not isinstance(model, VisionTransformer):
        return
    data, transform = evenly_spaced(build_dataset(config, 'val'), STRIPS), build_transform(config, training=False)
    strips = []
    for index in range(len(data)):
        with data.naming(index):
            picture = data.picture(index, config.DATA.EXIF_ROTATE)
            pixels = transform.image(picture, np.random.default_rng(0))
        strips.append(draw_strip(data.describe(index), pixels, reductions(model, config, pixels)))
    with atomic_write(target) as file:
        tile(strips, 1).save(file, 'PNG')
