# SPDX-License-Identifier: Apache-2.0
"""Model registry: builders by MODEL.TYPE, models by the name of their YAML file."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import os
from collections.abc import Callable

from paddle import nn
from yacs.config import CfgNode

from utils.errors import UserError
from utils.registry import Registry

MODELS = Registry('MODEL.TYPE')

CONFIG_DIR = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'configs')
DEFAULT_CLASSES = 1000

Builder = Callable[[CfgNode], nn.Layer]


def register_model(name: str, *aliases: str) -> Callable[[Builder], Builder]:
    """Return a decorator that registers a builder under `name` and `aliases`, values of MODEL.TYPE.

    The decorated builder replaces MODEL.NUM_CLASSES None by 1000.
    """

    def decorate(builder: Builder) -> Builder:
        @functools.wraps(builder)
        def build(config: CfgNode) -> nn.Layer:
            return builder(_with_classes(config))

        return MODELS.register(name, *aliases)(build)

    return decorate


def _with_classes(config: CfgNode) -> CfgNode:
    if config.MODEL.NUM_CLASSES is not None:
        return config
    config = config.clone()
    config.defrost()
    config.MODEL.NUM_CLASSES = DEFAULT_CLASSES
    config.freeze()
    return config


def build_model(config: CfgNode) -> nn.Layer:
    """Build the model of `config` with initial weights; MODEL.NUM_CLASSES None means 1000 classes.

    Raises:
        UserError: an unknown MODEL.TYPE, or inconsistent sizes.
    """
    return MODELS[config.MODEL.TYPE](config)


def list_models(pattern: str = '*') -> list[str]:
    """Return the sorted names of the configurations that match a shell pattern, such as 'evit*'."""
    names = (os.path.splitext(file)[0] for file in os.listdir(CONFIG_DIR) if file.endswith('.yaml'))
    return sorted(fnmatch.filter(names, pattern))


def config_file(name: str) -> str:
    """Return the path of the YAML file of a model name; return a path unchanged."""
    if name.endswith(('.yaml', '.yml')):
        return name
    path = os.path.join(CONFIG_DIR, f'{name}.yaml')
    if not os.path.isfile(path):
        near = difflib.get_close_matches(name, list_models(), n=1, cutoff=0.4)
        hint = f" Did you mean '{near[0]}'?" if near else ''
        raise UserError(f"unknown model '{name}': there is no '{path}'.{hint} `python -m models` lists all.")
    return path
