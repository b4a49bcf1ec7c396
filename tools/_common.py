# SPDX-License-Identifier: Apache-2.0
"""Shared code of the tools."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO

from yacs.config import CfgNode

from config import config_file_of, get_config, update_config
from datasets.images import EXTENSIONS
from datasets.walk import describe_counts, describe_left_out, images_below
from utils.errors import UserError
from utils.files import atomic_write
from utils.run_paths import follow_latest, holds_weights


def trained_config(args: argparse.Namespace) -> CfgNode:
    """Return the unfrozen configuration of a trained model from `-cfg` and `-pretrained`.

    Raises:
        UserError: one of the flags is missing. `-cfg` is optional if `-pretrained` names a run folder.
    """
    if 'pretrained' not in args:
        raise UserError('-pretrained is missing: give a .pdparams file or a run folder.')
    if config_file_of(args) is None:
        if args.pretrained != 'auto' and not holds_weights(follow_latest(args.pretrained)):
            raise UserError(
                f"-pretrained: '{args.pretrained}' is neither a weight file nor a run folder; name one of these."
            )
        raise UserError('-cfg is missing: give the YAML file of the model, or a run folder as -pretrained.')
    return update_config(get_config(), args)


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add -backend, the earlier spelling of -engine."""
    parser.add_argument('-backend', choices=('dygraph', 'exported'), help='earlier spelling of -engine dygraph, paddle')


def with_engine_of_backend(args: argparse.Namespace) -> argparse.Namespace:
    """Set `engine` to that of -engine, else of -backend, else to `dygraph`."""
    engine = {'dygraph': 'dygraph', 'exported': 'paddle', None: None}[args.backend]
    if engine and 'engine' in args and args.engine != engine:
        raise UserError(
            f'-backend {args.backend} means -engine {engine}, but -engine is {args.engine}: leave -backend out.'
        )
    if 'engine' not in args:
        args.engine = engine or 'dygraph'
    return args


@contextlib.contextmanager
def result_files(prefix: str, *suffixes: str) -> Iterator[dict[str, IO]]:
    """Open `PREFIX.SUFFIX` for each suffix, png in binary mode; the files appear if the block succeeds.

    Enter it before long work, so that a folder without write permission is an early error.
    """
    with contextlib.ExitStack() as stack:
        yield {
            suffix: stack.enter_context(atomic_write(f'{prefix}.{suffix}', 'wb' if suffix == 'png' else 'w'))
            for suffix in suffixes
        }


def find_images(names: list[str], extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Return the named files, with any suffix, and the images below the named folders, in sorted order.

    Prints the number of other files below the folders.
    """
    paths = []
    for name in names:
        if not os.path.exists(name):
            raise UserError(f"there is no file or folder '{name}'.")
        if not os.path.isdir(name):
            paths.append(name)
            continue
        found, others = images_below(name, extensions=extensions)
        if not found:
            only = f', only other files ({describe_counts(others)})' if others else ''
            raise UserError(f"there is no image ({' '.join(extensions)}) below '{name}'{only}.")
        if others:
            print(describe_left_out(others, name), file=sys.stderr)
        paths += [os.path.join(name, os.path.normpath(path)) for path in found]
    return paths
