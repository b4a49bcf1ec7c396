# SPDX-License-Identifier: Apache-2.0
"""What tools share."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from typing import IO

from yacs.config import CfgNode

from config import config_file_of, get_config, update_config
from datasets.images import EXTENSIONS
from datasets.walk import describe_counts, describe_left_out, images_below
from utils.errors import UserError
from utils.files import atomic_write


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


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return next(line.partition(':')[2].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextlib.contextmanager
def result_files(prefix: str, *suffixes: str) -> Iterator[dict[str, IO]]:
    """Opens `PREFIX.SUFFIX` for each suffix, of which png is binary; the files appear when the block ends well.

    It is entered before long work, which should not end at a folder that cannot be written.
    """
    with contextlib.ExitStack() as stack:
        yield {
            suffix: stack.enter_context(atomic_write(f'{prefix}.{suffix}', 'wb' if suffix == 'png' else 'w'))
            for suffix in suffixes
        }


def find_images(places: list[str]) -> list[str]:
    """Files as they are named, whatever their suffix; of folders the images below them, in sorted order.

    Prints how many files below the folders are no images.
    """
    paths = []
    for place in places:
        if not os.path.exists(place):
            raise UserError(f"there is no file or folder '{place}'.")
        if not os.path.isdir(place):
            paths.append(place)
            continue
        found, others = images_below(place)
        if not found:
            only = f', only other files ({describe_counts(others)})' if others else ''
            raise UserError(f"there is no image ({' '.join(EXTENSIONS)}) below '{place}'{only}.")
        if others:
            print(describe_left_out(others, place), file=sys.stderr)
        paths += [os.path.join(place, os.path.normpath(path)) for path in found]
    return paths
