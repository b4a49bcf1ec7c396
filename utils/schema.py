# SPDX-License-Identifier: Apache-2.0
"""Configuration keys of a yacs tree: default, type, bounds and owners; values from YAML files and command lines.

yacs alone refuses an int for a float, keeps the last of two duplicate keys, and reports neither file nor line of an error.
"""

from __future__ import annotations

import ast
import copy
import difflib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from utils.errors import UserError
from utils.run_paths import follow_latest
from utils.text import printable
from utils.yaml_files import compose

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MAX_FILES = 100  # merged for one configuration; each may name several more as BASE
MAX_LITERAL = 10_000  # characters that are parsed; longer values are text
SHOWN = 80  # characters of a value in an error message
SELECTORS = ('MODEL.TYPE', 'TRAIN.TASK')  # keys whose values decide which other keys have an effect
EXEMPT = -1  # layer of values that may have no effect

Adapt = Callable[[list, str, str, Collection[str]], tuple[list, list]]  # see `utils.paddlevit.adapt`


# ---------------------------------------------------------------------------------------------------- keys
class Interval:
    """Interval of numbers in mathematical notation: '[0, 1)' contains 0 and does not contain 1."""

    def __init__(self, text: str):
        self.low, self.high = (int(x) if x == int(x) else x for x in ast.literal_eval(text[1:-1]))
        self.low_open, self.high_open = text[0] == '(', text[-1] == ')'

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.low_open else self.low <= value
        return above and (value < self.high if self.high_open else value <= self.high)

    def text(self, kind: type) -> str:
        """Return the bounds in words: 'of at least 1 and at most 9', 'between 0 and 1 (excluded)'."""
        if kind is int:
            return f'of at least {self.low} and at most {self.high}'
        low, high = (' (excluded)' if is_open else '' for is_open in (self.low_open, self.high_open))
        return f'between {self.low}{low} and {self.high}{high}'


class Owners(NamedTuple):
    """Models and tasks for which a key has an effect; an empty field stands for all.

    Attributes:
        models: values of MODEL.TYPE, aliases included.
        tasks: values of TRAIN.TASK.
    """

    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()


class Key:
    """One key of the configuration.

    Args:
        default: a bool, int, float or str, a list or tuple of them, or None.
        allowed: bounds of a number, such as '[0, 1)', or the choices; for a list, those of each element.
        kind: type of the value (bool, int, float, str), or [type] for a list of them; default: the type of `default`.
        none: True if None is allowed; it is always allowed where it is the default.
        length: allowed lengths of a list.
        pair: '<' or '<=': the value is a pair (low, high) with low < high or low <= high.
        models: values of MODEL.TYPE for which the key has an effect; default: those of its section.
        tasks: values of TRAIN.TASK for which the key has an effect; default: those of its section.
        hint: text added to the error message of a wrong value.
        aliases: old spelling of a value -> new spelling.
    """

    def __init__(
        self,
        default,
        allowed: str | Collection | None = None,
        kind: Any = None,
        none: bool = False,
        length: Collection[int] = (),
        pair: str = '',
        models: Collection[str] = (),
        tasks: Collection[str] = (),
        hint: str = '',
        aliases: Mapping[str, str] | None = None,
    ):
        self.default = default
        self.allowed = Interval(allowed) if isinstance(allowed, str) else allowed
        self.kind = kind if kind is not None else _kind(default)
        self.none = none or default is None
        self.length = (2,) if pair else length
        self.pair = pair
        self.owners = Owners(tuple(models), tuple(tasks))
        self.hint = hint
        self.aliases = aliases or {}

    def coerce(self, value):
        """Convert `value` to the type of this key, without a check of bounds. Raises ValueError if that is impossible."""
        if self.none and (value is None or str(value).lower() in ('none', 'null')):
            return None
        if isinstance(value, str) and self.kind is not str:
            value = literal(value)
        if self.kind == [str] and isinstance(value, str):  # [a, b] without quotes, or a list of one
            bracketed = value[:1] == '[' and value[-1:] == ']'
            value = [part.strip() for part in value[1:-1].split(',')] if bracketed else [value]
        if self.kind is str and value is False and 'no' in (self.allowed or ()):  # a bare `no` in YAML
            return 'no'
        value = _as_kind(value, self.kind)
        if isinstance(value, str):
            value = self.aliases.get(value, value)
        return tuple(value) if isinstance(value, list) and not isinstance(self.default, list) else value

    def accepts(self, value) -> bool:
        """Return True if a value that `coerce` returned is within the bounds."""
        if value is None or not isinstance(self.kind, list):
            return self.none if value is None else self._holds(value)
        if self.length and len(value) not in self.length:
            return False
        if self.pair and not (value[0] < value[1] if self.pair == '<' else value[0] <= value[1]):
            return False
        return all(self._holds(element) for element in _flat(value))

    def _holds(self, value) -> bool:
        return self.allowed is None or value in self.allowed

    def expected(self) -> str:
        """Describe the allowed values in an error message: 'a number between 0 and 1, or None'."""
        if self.pair:
            first, last = ('<' if is_open else '<=' for is_open in (self.allowed.low_open, self.allowed.high_open))
            text = f'(low, high) with {self.allowed.low} {first} low {self.pair} high {last} {self.allowed.high}'
        elif isinstance(self.kind, list):
            text = self._expected_list()
        elif isinstance(self.allowed, Interval):
            text = f'{_SINGULAR[self.kind]} {self._range(self.kind)}'
        else:
            text = _SINGULAR[self.kind] if self.allowed is None else self._range(self.kind)
        return f'{text}{", or None" if self.none else ""}{f"; {self.hint}" if self.hint else ""}'

    def _expected_list(self) -> str:
        lists, kind = 'a list', self.kind[0]
        if isinstance(kind, list):
            lists, kind = 'a list of lists', kind[0]
        count = f'{" or ".join(map(str, self.length))} ' if self.length else ''
        each = '' if self.allowed is None else f', each {self._range(kind)}'
        return f'{lists} of {count}{_PLURAL[kind]}{each}'

    def _range(self, kind: type) -> str:
        few = self.allowed if not isinstance(self.allowed, Interval) else ()
        return f'one of: {", ".join(map(str, few))}' if few else self.allowed.text(kind)


_SINGULAR = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}
_PLURAL = {int: 'whole numbers', float: 'numbers', str: 'texts'}


def _kind(default):
    return [_kind(default[0])] if isinstance(default, (list, tuple)) else type(default)


def _as_kind(value, kind):
    if isinstance(kind, list):
        if not isinstance(value, (list, tuple)):
            raise ValueError
        elements = (literal(v) if isinstance(v, str) and kind[0] is not str else v for v in value)
        return [_as_kind(element, kind[0]) for element in elements]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool and isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    if kind is float and is_number and (isinstance(value, float) or abs(value) < 1e300):
        return float(value)
    if kind is int and is_number and math.isfinite(value if isinstance(value, float) else 0) and value == int(value):
        return int(value)
    if kind is str and (is_number or isinstance(value, str)):
        return str(value)
    raise ValueError


def _flat(values) -> Iterator:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


class Section:
    """A section of the tree: its attributes are keys and sections.

    Args:
        models, tasks: owners of the keys that name no owners themselves, see `Key`.
    """

    def __init__(self, models: Collection[str] = (), tasks: Collection[str] = ()):
        self._owners = Owners(tuple(models), tuple(tasks))

    def walk(self, prefix: str = '') -> Iterator[tuple[str, Key, Owners]]:
        """Yield (dotted name, key, owners) of all keys in the order of their definition."""
        for name, item in vars(self).items():
            if isinstance(item, Section):
                yield from item.walk(f'{prefix}{name}.')
            elif isinstance(item, Key):
                yield prefix + name, item, item.owners if any(item.owners) else self._owners


class Origin(NamedTuple):
    """Source of a value: its text for error messages, and the number of its layer, which is a file or a command line."""

    text: str
    layer: int


# ---------------------------------------------------------------------------------------------------- tree
class Schema:
    """All keys of a configuration tree, and the operations on such a tree.

    The attribute `origins` of a tree maps each key to the source of its value. Its attribute `layers` lists MODEL.TYPE
    and TRAIN.TASK after each file and after the command line. Clones keep both.

    Args:
        root: section of all keys.
        renamed: old names of keys -> new names; None: the key is accepted and has no effect.
        known: models and tasks that the owners of the keys cover; all keys have an effect for other models and tasks.
        adapt: converts the values of files of another project, see `utils.paddlevit.adapt`; None: none.
    """

    def __init__(self, root: Section, renamed: Mapping[str, str | None], known: Owners, adapt: Adapt | None = None):
        self.adapt = adapt or (lambda values, path, model_type, known: (values, []))
        self.keys = {name: key for name, key, _ in root.walk()}
        self.owners = {name: owners for name, _, owners in root.walk()}
        self.renamed = renamed
        self.known = known
        self.sections = _sections((*self.keys, *renamed))

    def add(self, prefix: str, section: Section, reads: Collection[str] = ()) -> None:
        """Add a section and its owners. For them, keys of other owners have no effect, except `reads`.

        Args:
            prefix: dotted name of the section.
            reads: keys and sections of other owners that also have an effect for the owners of this section.

        Raises:
            ValueError: a key exists already, or one of `reads` does not.
        """
        new = list(section.walk(f'{prefix}.'))
        wrong = [name for name, *_ in new if name in self.keys or name in self.sections]
        wrong += [name for name in reads if name not in self.keys and name not in self.sections]
        if wrong:
            raise ValueError(f'{prefix} cannot be added: {wrong[0]} exists already, or is read and does not exist')
        added = Owners(*({name for *_, owners in new for name in owners[i]} for i in range(len(SELECTORS))))
        shared = tuple(f'{name}.' for name in reads)
        for name, owners in self.owners.items():
            if f'{name}.'.startswith(shared):
                self.owners[name] = Owners(*((*old, *more) if old else old for old, more in zip(owners, added)))
        self.keys.update({name: key for name, key, _ in new})
        self.owners.update({name: owners for name, _, owners in new})
        self.sections |= _sections(name for name, *_ in new)
        self.known = Owners(*({*old, *more} for old, more in zip(self.known, added)))

    def tree(self) -> CfgNode:
        """Return a new tree of the defaults."""
        root = CfgNode()
        for name, key in self.keys.items():
            *groups, last = name.split('.')
            node = root
            for group in groups:
                if group not in node:
                    node[group] = CfgNode()
                node = node[group]
            node[last] = copy.deepcopy(key.default)
        root.__dict__.update(origins={}, layers=[])
        return root

    def merge_file(self, config: CfgNode, path: str, parents: tuple[str, ...] = ()) -> None:
        """Merge a YAML file into `config`, after the files that its BASE names, recursively."""
        path = os.fspath(path)
        if '\0' in path:
            named = f" (BASE of '{parents[-1]}')" if parents else ''
            raise UserError(f'the configuration file {shown(path)}{named} cannot exist: its name holds a zero byte.')
        path = follow_latest(path)
        real = os.path.realpath(path)
        if real in parents:
            raise UserError(f"BASE of '{parents[-1]}' leads back to '{real}'; remove one of the two.")
        if len(config.layers) + len(parents) >= MAX_FILES:
            raise UserError(f"'{path}': BASE leads to more than {MAX_FILES} files; remove some.")
        values = self._read(path, f" (BASE of '{parents[-1]}')" if parents else '')
        for name, value, where in values:
            for base in self._coerce(name, value, where) if name == 'BASE' else ():
                if base:
                    self.merge_file(config, os.path.join(os.path.dirname(path), base), (*parents, real))
        values, defaults = self.adapt(values, path, self.get(config, SELECTORS[0]), self.keys)
        values = sorted(values, key=lambda value: value[0] != SELECTORS[0])  # MODEL.TYPE first, for errors
        for name, value, where in [default for default in defaults if default[0] not in config.origins] + values:
            self.set(config, name, value, where)
        if len(values) > len(self.keys) / 2:  # config.yaml of a run records all keys, also those without effect
            sources = {self.renamed.get(name, name): where for name, _, where in values}
            config.origins.update({name: Origin(where, EXEMPT) for name, where in sources.items() if name in self.keys})
        self.end_layer(config)

    def set(self, config: CfgNode, name: str, value, where: str) -> None:
        """Set one dotted key to a value, converted to the type of the key; `where` is the source of the value for errors."""
        name = self.renamed.get(name, name)
        if name is None:
            return
        if name in self.sections:
            raise UserError(f'{where}: {self._not_a_section(name, value)}')
        if name not in self.keys:
            self._check_architecture(config, name, where)
            raise UserError(f"{where}: unknown key '{name}'.{self._nearest(name)} config.py lists all keys.")
        self._node(config, name)[name.rpartition('.')[2]] = self._coerce(name, value, where)
        config.origins[name] = Origin(where, len(config.layers))

    def _coerce(self, name: str, value, where: str):
        try:
            return self.keys[name].coerce(value)
        except ValueError:
            raise UserError(self._wrong(name, value, where)) from None

    def _wrong(self, name: str, value, where: str) -> str:
        return f'{where}: {name} is {shown(value)}, but must be {self.keys[name].expected()}.'.removeprefix(': ')

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name.upper(), [*self.keys, *sorted(self.sections)], n=1, cutoff=0.5)
        return f" Did you mean '{near[0]}'?" if near else ''

    def _check_architecture(self, config: CfgNode, name: str, where: str) -> None:
        """Raise UserError if an unknown key of MODEL belongs to an unknown architecture."""
        kind, models = self.get(config, SELECTORS[0]), self.known.models
        if name.startswith('MODEL.') and kind.lower() not in models:
            raise UserError(
                f'{where}: MODEL.TYPE {kind} is not an architecture of LeanViT, which has {", ".join(sorted(models))}; '
                f"so the key '{name}' is unknown."
            )

    def _not_a_section(self, name: str, value) -> str:
        example = next((key for key in self.keys if key.startswith(f'{name}.')), name)
        given = 'has no keys' if value is None else f'is {shown(value)}'
        return f"'{name}' {given}, but must be a section with keys such as {example}; add some or remove it."

    @staticmethod
    def _node(config: CfgNode, name: str) -> CfgNode:
        for group in name.split('.')[:-1]:
            config = config[group]
        return config

    def get(self, config: CfgNode, name: str):
        """Return the value of a dotted key."""
        return self._node(config, name)[name.rpartition('.')[2]]

    # ------------------------------------------------------------------------------------------------ checks
    def check(self, config: CfgNode) -> None:
        """Check each value on its own. Raises UserError with the key, the source of its value, and the allowed values."""
        for name, key in self.keys.items():
            value = self.get(config, name)
            if not key.accepts(value):
                raise UserError(self._wrong(name, value, self.where(config, name)))

    @staticmethod
    def where(config: CfgNode, name: str) -> str:
        """Return the source of a key's value; '' for a default."""
        return config.origins[name].text if name in config.origins else ''

    def end_layer(self, config: CfgNode) -> None:
        """End a layer: later values belong to another file or to the command line."""
        config.layers.append(self._selected(config))

    def _selected(self, config: CfgNode) -> Owners:
        return Owners(self.get(config, 'MODEL.TYPE').lower(), self.get(config, 'TRAIN.TASK').lower())

    def reset_unused(self, config: CfgNode) -> None:
        """Set keys without effect for MODEL.TYPE and TRAIN.TASK to their defaults.

        Raises:
            UserError: a key without effect has a value other than its default. A value inherited from a file of another
                model or task is no error if it had an effect there.
        """
        now = self._selected(config)
        for name, origin in list(config.origins.items()):
            key, owners = self.keys[name], self.owners[name]
            if self._has_effect(owners, now) or self.get(config, name) == key.default:
                continue
            if origin.layer != EXEMPT and not any(
                self._has_effect(owners, then) for then in config.layers[origin.layer :]
            ):
                field, selector = next(
                    (i, s) for i, s in enumerate(SELECTORS) if not self._has_effect_for(owners, now, i)
                )
                raise UserError(
                    f'{origin.text}: {name} is {shown(self.get(config, name))}, but has no effect for {selector} '
                    f'{self.get(config, selector)}, only for {", ".join(owners[field])}; remove it or change {selector}.'
                )
            self._node(config, name)[name.rpartition('.')[2]] = copy.deepcopy(key.default)
            del config.origins[name]

    def _has_effect(self, owners: Owners, selected: Owners) -> bool:
        return all(self._has_effect_for(owners, selected, field) for field in range(len(SELECTORS)))

    def _has_effect_for(self, owners: Owners, selected: Owners, field: int) -> bool:
        return not owners[field] or selected[field] in owners[field] or selected[field] not in self.known[field]

    # ------------------------------------------------------------------------------------------------ YAML
    def _read(self, path: str, named: str) -> list[tuple[str, Any, str]]:
        """Return (dotted key, value, 'file:line') of every value of a file."""
        try:
            root = compose(path)
        except OSError as error:
            raise UserError(
                f"cannot read the configuration '{path}'{named}: {error.strerror}{_elsewhere(path)}"
            ) from None
        if root is None or root.tag == 'tag:yaml.org,2002:null':
            return []
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}:{root.start_mark.line + 1}: expected 'KEY: value' pairs, as in 'SEED: 0'.")
        return list(self._walk(root, path))

    def _walk(self, node: yaml.MappingNode, path: str, prefix: str = '') -> Iterator[tuple[str, Any, str]]:
        """Yield the values of a YAML mapping. Raises UserError on duplicate keys and on tags that build Python objects."""
        seen = set()
        for key_node, value_node in node.value:
            where = f'{path}:{key_node.start_mark.line + 1}'
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{where}: expected 'KEY: value', but the key is a list or a section.")
            name = prefix + str(key_node.value)
            meant = self.renamed.get(name) or name
            if meant in seen:
                raise UserError(f"{where}: the key '{meant}' is given twice; keep one.")
            seen.add(meant)
            if isinstance(value_node, yaml.MappingNode) and name in self.sections:
                yield from self._walk(value_node, path, f'{name}.')
            else:
                yield name, _construct(value_node, name, where), where


def _sections(names: Iterable[str]) -> set[str]:
    return {name[:i] for name in names for i, letter in enumerate(name) if letter == '.'}


def _construct(node: yaml.Node, name: str, where: str):
    loader = yaml.SafeLoader('')
    try:
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: cannot read the value of '{name}': {error.problem}.") from None
    except (ValueError, RecursionError):  # such as a date in month 13, or a number of thousands of digits
        raise UserError(f"{where}: cannot read the value of '{name}': it is not valid YAML.") from None
    finally:
        loader.dispose()


def leaves(node: CfgNode, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every value of a tree."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f'{prefix}{name}.')
        else:
            yield prefix + name, value


def shown(value) -> str:
    """Return a value as text for an error message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no number of more than 4300 digits
        return 'a number of thousands of digits'
    return printable(text if len(text) <= SHOWN else f'{text[:SHOWN]}...')


def literal(text: str):
    """Parse Python literals such as `5e-4`, `None`, `(0.1, 1)` and YAML's booleans; return other text unchanged."""
    if text.lower() in ('true', 'false', 'null'):
        return {'true': True, 'false': False, 'null': None}[text.lower()]
    if len(text) > MAX_LITERAL:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _elsewhere(path: str) -> str:
    """Return the absolute path that was tried, and a file of the repository that may be meant."""
    if os.path.isabs(path):
        return '.'
    name = os.path.basename(path) if path.endswith(('.yaml', '.yml')) else f'{os.path.basename(path)}.yaml'
    files = [os.path.normpath(os.path.join(_ROOT, file)) for file in (path, os.path.join('configs', name))]
    meant = next((file for file in files if os.path.isfile(file)), None)
    return f" (looked for '{os.path.abspath(path)}')" + (f"; did you mean '{meant}'?" if meant else '.')
