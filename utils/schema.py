# SPDX-License-Identifier: Apache-2.0
"""A yacs tree whose values keep the kind of their defaults, filled from YAML files and command lines.

yacs alone takes no int for a float, lets the last of two equal keys win, and knows neither file nor line of a mistake.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Collection, Iterator, Mapping

import yaml
from yacs.config import CfgNode

from utils.errors import UserError


class Schema:
    """What a tree may hold.

    Args:
        tree: the defaults.
        optional: keys that may be None, and the kind they have otherwise.
        renamed: other spellings of keys; None: the key is accepted and has no effect.
        choices: keys with a few values.
        at_least: keys with a smallest value.
        probabilities: keys between 0 and 1.
    """

    def __init__(
        self,
        tree: CfgNode,
        optional: Mapping[str, type],
        renamed: Mapping[str, str | None],
        choices: Mapping[str, Collection],
        at_least: Mapping[str, float],
        probabilities: Collection[str],
    ):
        self.tree = tree
        self.optional = optional
        self.renamed = renamed
        self.choices = choices
        self.at_least = at_least
        self.probabilities = probabilities

    def merge_file(self, config: CfgNode, path: str, parents: tuple[str, ...] = ()) -> None:
        """Merges a YAML file into `config`, after the files that its BASE names, recursively."""
        real = os.path.realpath(path)
        if real in parents:
            raise UserError(f"BASE of '{parents[-1]}' leads back to '{real}'; remove one of the two.")
        values = _read_yaml(path, f" (BASE of '{parents[-1]}')" if parents else '')
        for key, value, _ in values:
            if key == 'BASE':
                for base in [value] if isinstance(value, str) else value or []:
                    if base:
                        self.merge_file(config, os.path.join(os.path.dirname(path), base), (*parents, real))
        for key, value, where in values:
            self.set(config, key, value, where)

    def set(self, config: CfgNode, key: str, value, where: str) -> None:
        """Sets one dotted key, converting the value to the kind of its default; `where` it was given, for errors."""
        if key in self.renamed:
            key = self.renamed[key]
            if key is None:
                return
        *groups, name = key.split('.')
        node = config
        for group in groups:
            node = node.get(group) if isinstance(node, CfgNode) else None
        if not isinstance(node, CfgNode) or name not in node or isinstance(node[name], CfgNode):
            near = difflib.get_close_matches(key, [known for known, _ in leaves(self.tree)], n=1, cutoff=0)
            raise UserError(f"{where}: unknown key '{key}'. Did you mean '{near[0]}'?")
        node[name] = self._coerce(value, key, where)

    def check(self, config: CfgNode) -> None:
        """Checks every value by itself. Raises UserError with the key and what it may be."""
        for key, value in leaves(config):
            if value is None:
                default = _lookup(self.tree, key)
                if default is not None and key not in self.optional:
                    raise UserError(f'{key} is None, but it needs a value such as {default!r}.')
            elif key in self.choices and value not in self.choices[key]:
                raise UserError(f'{key} is {value!r}, but must be one of: {", ".join(map(str, self.choices[key]))}.')
            elif key in self.at_least and value < self.at_least[key]:
                raise UserError(f'{key} is {value}, but must be at least {self.at_least[key]}.')
            elif key in self.probabilities and not 0 <= value <= 1:
                raise UserError(f'{key} is {value}, but must lie between 0 and 1.')

    def _coerce(self, value, key: str, where: str):
        default = _lookup(self.tree, key)
        kind = self.optional.get(key, type(default))
        if isinstance(value, str) and kind is not str:
            value = _literal(value)
        elif isinstance(value, str) and value.lower() in ('none', 'null') and key in self.optional:
            return None
        if value is None:
            return None
        if kind is bool and (isinstance(value, bool) or value in (0, 1)):
            return bool(value)
        if value is False and 'no' in self.choices.get(key, ()):  # a bare `no` in YAML
            return 'no'
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind is float and is_number:
            return float(value)
        if kind is int and is_number and value == int(value):
            return int(value)
        if kind in (list, tuple) and isinstance(value, (list, tuple)):
            return kind(_literal(v) if isinstance(v, str) and key != 'BASE' else v for v in value)
        if kind in (list, tuple) and key == 'BASE':
            return [value]
        if kind is str and (is_number or isinstance(value, str)):
            return str(value)
        name = {bool: 'True or False', float: 'a number', int: 'a whole number', str: 'text'}.get(kind, 'a list')
        raise UserError(f'{where}: {key} must be {name}, not {value!r}.')


def leaves(node: CfgNode, prefix: str = '') -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every value of a tree."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f'{prefix}{name}.')
        else:
            yield prefix + name, value


def _lookup(node: CfgNode, key: str):
    for name in key.split('.'):
        node = node[name]
    return node


def _literal(text: str):
    """`5e-4`, `None`, `(0.1, 1)` and the like as Python values; YAML spellings of booleans too; other text unchanged."""
    if text.lower() in ('true', 'false', 'null'):
        return {'true': True, 'false': False, 'null': None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


# ---------------------------------------------------------------------------------------------------- YAML
def _read_yaml(path: str, named: str) -> list[tuple[str, object, str]]:
    """(dotted key, value, 'file:line') of every value of a file; an empty file has none."""
    try:
        with open(path, encoding='utf-8') as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"cannot read the configuration '{path}'{named}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not a YAML file: {' '.join(str(error).split())}") from None
    return [] if root is None else list(_walk(root, path))


def _walk(node: yaml.Node, path: str, prefix: str = '') -> Iterator[tuple[str, object, str]]:
    """Refuses duplicate keys and tags that build Python objects."""
    if not isinstance(node, yaml.MappingNode):
        under = prefix[:-1] or 'the file'
        raise UserError(f"{path}:{node.start_mark.line + 1}: expected 'KEY: value' pairs under '{under}'.")
    seen = set()
    for key_node, value_node in node.value:
        where = f'{path}:{key_node.start_mark.line + 1}'
        key = prefix + str(key_node.value)
        if key in seen:
            raise UserError(f"{where}: the key '{key}' is given twice; keep one.")
        seen.add(key)
        if isinstance(value_node, yaml.MappingNode):
            yield from _walk(value_node, path, key + '.')
            continue
        try:
            yield key, _construct(value_node), where
        except yaml.YAMLError as error:
            raise UserError(f"{where}: cannot read the value of '{key}': {error.problem}.") from None


def _construct(node: yaml.Node):
    loader = yaml.SafeLoader('')
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()
