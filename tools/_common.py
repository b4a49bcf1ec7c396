# SPDX-License-Identifier: Apache-2.0
"""What the tools for trained classifiers share."""

from __future__ import annotations

import argparse
import os

from yacs.config import CfgNode

from config import config_file_of, get_config, update_config
from datasets.folder import images_below
from datasets.images import EXTENSIONS
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


def find_images(places: list[str]) -> list[str]:
    """Files as they are named, whatever their suffix; of folders the images below them, in sorted order."""
    paths = []
    for place in places:
        if not os.path.exists(place):
            raise UserError(f"there is no file or folder '{place}'.")
        found = [place]
        if os.path.isdir(place):
            found = [os.path.join(place, os.path.normpath(path)) for path in images_below(place, '')]
        if not found:
            raise UserError(f"there is no image ({' '.join(EXTENSIONS)}) below '{place}'.")
        paths += found
    return paths
