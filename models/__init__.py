# SPDX-License-Identifier: Apache-2.0
"""Model architectures. To add one, add a file that registers a builder, and YAML files that configure it."""

import sys

if sys.argv[:1] == ['-m']:  # `python -m models` imports this file before __main__.py
    from utils import cli

    cli.begin()
    from utils import environment

    environment.clear_launcher_variables()
    environment.import_paddle()

import importlib
import pkgutil

from models.create import create_model
from models.registry import build_model, list_models, register_model

__all__ = ['build_model', 'create_model', 'list_models', 'register_model']

for _module in pkgutil.iter_modules(__path__):
    if _module.name != '__main__':
        importlib.import_module(f'{__name__}.{_module.name}')
