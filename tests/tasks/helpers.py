# SPDX-License-Identifier: Apache-2.0
"""Tasks and trainers on one process, for tests."""

from __future__ import annotations

import csv
import json
import os

import paddle

from datasets.batch import Batch
from engine.distributed import Context
from engine.run import build_loader
from engine.train import Trainer
from models import build_model
from tasks import Task, build_task
from utils.runlog import RunLog

ALONE = Context(0, 1, False)


def attached(config, model, training: bool = True) -> Task:
    """The task of a configuration, attached to a model."""
    task = build_task(config)
    task.attach(model, print, training)
    return task


def build_trainer(config, folder: str, task: Task | None = None, model=None, context: Context = ALONE) -> Trainer:
    """A trainer of the model and the data that a configuration describes, as engine/run.py builds it."""
    if model is None:
        paddle.seed(config.SEED)
        model = build_model(config)
    config.defrost()  # the data set the number of classes
    task = build_task(config) if task is None else task
    task.attach(model, print, training=True)
    loaders = [build_loader(config, task, task.dataset(split), split, context) for split in ('train', 'val')]
    os.makedirs(folder, exist_ok=True)
    return Trainer(config, model, task, *loaders, context, RunLog(folder, 0), folder)


def rows(trainer: Trainer, kind: str) -> list[dict]:
    """Rows of metrics.jsonl."""
    with open(os.path.join(trainer.folder, 'metrics.jsonl'), encoding='utf-8') as file:
        return [row for row in map(json.loads, file) if row['kind'] == kind]


def read_csv(folder: str, name: str) -> list[dict]:
    """Rows of predictions.csv or classes.csv of a run."""
    with open(os.path.join(folder, name), newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def batch_of(images, labels=None) -> Batch:
    """Tensors as a task takes them."""
    labels = paddle.zeros([len(images)], 'int64') if labels is None else labels
    return Batch(images, {'label': labels}, paddle.arange(len(images)).numpy())
