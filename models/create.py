# SPDX-License-Identifier: Apache-2.0
"""Models by the name of their configuration, with weights."""

from __future__ import annotations

from paddle import nn

from config import get_config
from models.registry import build_model, config_file
from models.weights.load import load_pretrained


def create_model(
    name: str, num_classes: int | None = None, pretrained: str | bool | None = None, opts: list | None = None
) -> nn.Layer:
    """Build a model by the name of its configuration.

    Args:
        name: a name of `list_models()`, or the path of a YAML file.
        num_classes: outputs of the classifier; None: as in the configuration, else 1000.
        pretrained: a .pdparams file to load; True: the published weights, see `models.weights.published`. If its
            number of classes differs, the classifier is re-initialized, and a message is printed.
        opts: alternating keys and values that override the configuration, such as `['DATA.IMAGE_SIZE', 384]`.
    """
    opts = list(opts or [])
    if num_classes is not None:
        opts += ['MODEL.NUM_CLASSES', num_classes]
    config = get_config(config_file(name), opts)
    model = build_model(config)
    if pretrained:
        load_pretrained(model, f'auto:{config.MODEL.NAME}' if pretrained is True else pretrained)
    return model
