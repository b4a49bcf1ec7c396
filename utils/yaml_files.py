# SPDX-License-Identifier: Apache-2.0
"""Bounded reading of YAML files: their size, nesting and aliases."""

from __future__ import annotations

import yaml

from utils.errors import UserError
from utils.files import open_regular

MAX_FILE = 1 << 17  # bytes; all keys with their comments take 40 kB, and PyYAML reads 40 kB in a second
MAX_NODES = 10_000  # keys and values, with repetitions by aliases; there are 200 keys
MAX_DEPTH = 20  # values within values; sections are nested three deep
MAX_DIGITS = 100  # characters of a number


def compose(path: str) -> yaml.Node | None:
    """Parse a YAML file into nodes; None: it is empty.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not YAML, or exceeds the limits.
    """
    try:
        with open_regular(path, MAX_FILE, encoding='utf-8') as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except RecursionError:
        raise UserError(f"'{path}' is not a YAML file of keys and values: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, a version of thousands of digits
        raise UserError(f"'{path}' is not a YAML file: {' '.join(str(error).split())}") from None
    if root is not None:
        _check(root, path)
    return root


def _check(root: yaml.Node, path: str) -> None:
    """Walk through all nodes, as often as aliases repeat them. Raises UserError above the limits."""
    stack, count = [(root, 0)], 0
    while stack:
        node, depth = stack.pop()
        count += 1
        where = f'{path}:{node.start_mark.line + 1}'
        if count > MAX_NODES:
            raise UserError(
                f'{path}: more than {MAX_NODES} values, counting repetitions by aliases (*name); remove some.'
            )
        if depth > MAX_DEPTH:
            raise UserError(
                f'{where}: values are nested more than {MAX_DEPTH} deep, or an alias (*name) contains itself.'
            )
        if isinstance(node, yaml.MappingNode):
            stack += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            stack += [(child, depth + 1) for child in node.value]
        elif node.tag.endswith((':int', ':float')) and len(node.value) > MAX_DIGITS:
            raise UserError(f'{where}: a number of {len(node.value)} digits; give at most {MAX_DIGITS}.')
