# SPDX-License-Identifier: Apache-2.0
"""What the tools for trained classifiers share."""

from __future__ import annotations

import argparse

from yacs.config import CfgNode

from config import config_file_of, get_config, update_config
from utils.errors import UserError


def trained_config(args: argparse.Namespace) -> CfgNode:
    """The configuration of a trained model that `-cfg` and `-pretrained` describe; unfrozen.

    Raises:
        UserError: one of the two is missing. A run folder as `-pretrained` brings its own configuration.
    """
    if 'pretrained' not in args:
        raise UserError('-pretrained is missing: give a .pdparams file or a run folder.')
    if config_file_of(args) is None:
        raise UserError('-cfg is missing: give the YAML file of the model, or a run folder as -pretrained.')
    return update_config(get_config(), args)
