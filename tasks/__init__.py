# SPDX-License-Identifier: Apache-2.0
"""Tasks: what is learnt, one module each. A new one is a new file here that registers a class, see tasks/base.py."""

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
    'build_task',
    'register_task',
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{_module.name}')
