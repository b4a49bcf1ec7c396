# SPDX-License-Identifier: Apache-2.0
"""Tasks, one module each. To add one, add a file that registers a subclass of `Task`, see tasks/base.py."""

import importlib
import pkgutil

from tasks.base import (
    TASKS,
    Evaluator,
    Group,
    Interrupted,
    Losses,
    MeanEvaluator,
    Prediction,
    PredictionOptions,
    Task,
    build_task,
    register_task,
)
from tasks.recording import build_evaluator

__all__ = [
    'TASKS',
    'Evaluator',
    'Group',
    'Interrupted',
    'Losses',
    'MeanEvaluator',
    'Prediction',
    'PredictionOptions',
    'Task',
    'build_evaluator',
    'build_task',
    'register_task',
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{_module.name}')
