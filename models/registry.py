# SPDX-License-Identifier: Apache-2.0
"""From a name to a model: builders by MODEL.TYPE, models by the name of their YAML file."""

from __future__ import annotations

import difflib
import fnmatch
import os

from paddle import nn
from yacs.config import CfgNode

from config import get_config
from utils.errors import UserError
from utils.registry import Registry

MODELS = Registry('MODEL.TYPE')
register_model = MODELS.register

CONFIG_DIR = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'configs')
DEFAULT_CLASSES = 1000


def build_model(config: CfgNode) -> nn.Layer:
    """Builds the freshly initialised model that `config` describes; 1000 classes where MODEL.NUM_CLASSES is None.

    Raises:
        UserError: an unknown MODEL.TYPE, or sizes that do not fit together.
    """
    builder = MODELS[config.MODEL.TYPE]
    if config.MODEL.NUM_CLASSES is None:
        config = config.clone()
        config.defrost()
        config.MODEL.NUM_CLASSES = DEFAULT_CLASSES
        config.freeze()
    return builder(config)


def create_model(
    name: str, num_classes: int | None = None, pretrained: str | None = None, opts: list | None = None
) -> nn.Layer:
    """Builds a model by the name of its configuration.

    Args:
        name: a name of `list_models()`, or the path of a YAML file.
        num_classes: outputs of the classifier; None: what the configuration says, else 1000.
        pretrained: a .pdparams file to load. The classifier is initialised anew, and a message says so, where its
            number of classes differs.
        opts: alternating keys and values that win over the configuration, such as `['DATA.IMAGE_SIZE', 384]`.
    """
    opts = list(opts or [])
    if num_classes is not None:
        opts += ['MODEL.NUM_CLASSES', num_classes]
    model = build_model(get_config(config_file(name), opts))
    if pretrained is not None:
        from models.pretrained import load_pretrained

        load_pretrained(model, pretrained)
    return model


def list_models(pattern: str = '*') -> list[str]:
    """Names of the configurations that match a shell pattern, such as 'evit*', sorted."""
    names = (os.path.splitext(file)[0] for file in os.listdir(CONFIG_DIR) if file.endswith('.yaml'))
    return sorted(fnmatch.filter(names, pattern))


def config_file(name: str) -> str:
    """Path of the YAML file of a model name; a path is returned as it is."""
    if name.endswith(('.yaml', '.yml')):
        return name
    path = os.path.join(CONFIG_DIR, f'{name}.yaml')
    if not os.path.isfile(path):
        near = difflib.get_close_matches(name, list_models(), n=1, cutoff=0.4)
        hint = f" Did you mean '{near[0]}'?" if near else ''
        raise UserError(f"unknown model '{name}': there is no '{path}'.{hint} `python -m models` lists all.")
    return path
