# SPDX-License-Identifier: Apache-2.0
"""Output flags of the tools: `-output` is a FILE, the prefix DIR/NAME of several files, or a folder DIR.

Missing folders are created with the files. A path that cannot be written is an error before any work.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile

from utils.errors import UserError
from utils.files import cannot_write


def add_output_file(
    parser: argparse.ArgumentParser,
    *suffixes: str,
    flag: str = '-output',
    dest: str = 'target',
    what: str = 'file to write',
    complete: bool = False,
    **options,
) -> None:
    """Add `flag FILE`.

    Args:
        suffixes: allowed suffixes of the path; none: any suffix.
        what: help text after the suffixes.
        complete: add a missing suffix instead of refusing the path.
        options: options of `add_argument`.
    """
    text = ' '.join(filter(None, [' or '.join(suffixes), what]))
    if complete:
        text += f'; {suffixes[0]} is added if it is missing'
    kind = functools.partial(_file, flag, suffixes, complete)
    parser.add_argument(flag, dest=dest, metavar='FILE', type=kind, help=text, **options)


def output_file(flag: str, path: str, *suffixes: str) -> str:
    """Check a path as `add_output_file` does. Raises UserError."""
    return _file(flag, suffixes, False, path)


def add_output_prefix(parser: argparse.ArgumentParser, *suffixes: str) -> None:
    """Add `-output DIR/NAME`, the prefix of several files, as `target`."""
    text = f'files to write, without their suffixes {", ".join(suffixes)}'
    kind = functools.partial(_prefix, '-output', suffixes[0])
    parser.add_argument('-output', dest='target', metavar='DIR/NAME', type=kind, required=True, help=text)


def add_output_folder(parser: argparse.ArgumentParser, what: str, **options) -> None:
    """Add `-output DIR` as `folder`; `what`: help text after the word 'folder'."""
    parser.add_argument('-output', dest='folder', metavar='DIR', type=_folder, help=f'folder {what}', **options)


def _file(flag: str, suffixes: tuple[str, ...], complete: bool, path: str) -> str:
    if complete and not path.endswith(suffixes):
        return _prefix(flag, suffixes[0], path) + suffixes[0]
    path = _prefix(flag, suffixes[0] if suffixes else '', path)
    if suffixes and not path.endswith(suffixes):
        raise UserError(f"{flag} is '{path}', but must end in {' or '.join(suffixes)}.")
    return path


def _prefix(flag: str, suffix: str, path: str) -> str:
    if os.path.isdir(path) or not os.path.basename(path):
        example = os.path.join(path, f'NAME{suffix}')
        raise UserError(f"{flag} is the folder '{path}'; add a name, such as '{example}'.")
    _check_writable(path, os.path.dirname(path))
    return path


def _folder(path: str) -> str:
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f"-output is the file '{path}', but must be a folder.")
    _check_writable(path, path)
    return path


def _check_writable(path: str, folder: str) -> None:
    """Raise UserError if `path` cannot be written to `folder`, or to its nearest existing parent. Leaves no file."""
    folder = os.path.abspath(folder)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise cannot_write(path, error) from None
