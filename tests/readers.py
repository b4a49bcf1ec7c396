# SPDX-License-Identifier: Apache-2.0
"""Finds the keys of the configuration that code reads, by their dotted names.

Expressions are followed through variables and arguments: after `evit = config.MODEL.EVIT` and `KeepRateClock(evit)`, a
parameter of its constructor stands for MODEL.EVIT.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Iterator

PASSES = 3  # over the code, until the arguments of arguments are known


def variable(node: ast.AST) -> str:
    """'name' or 'object.name'; empty for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    return f'{variable(node.value)}.{node.attr}' if isinstance(node, ast.Attribute) else ''


class Readers:
    """The keys that some files read.

    Args:
        sources: path -> text.
        keys: dotted names.
    """

    def __init__(self, sources: dict[str, str], keys: Collection[str]):
        self.keys = set(keys)
        self.sections = {name[:i] for name in keys for i, letter in enumerate(name) if letter == '.'}
        self.top = {name.partition('.')[0] for name in keys}
        kinds = (ast.Assign, ast.Attribute, ast.Call, ast.ClassDef, ast.Constant, ast.FunctionDef, ast.Subscript)
        walks = {path: ast.walk(ast.parse(text)) for path, text in sources.items()}
        self.nodes = {path: [node for node in walk if isinstance(node, kinds)] for path, walk in walks.items()}
        self.texts = {path: self._texts(nodes) for path, nodes in self.nodes.items()}
        self.meaning = defaultdict(set)  # (path, variable) -> sections that it may stand for
        self.functions = defaultdict(list)  # name -> (path, parameters)
        for path, nodes in self.nodes.items():
            self._define(path, nodes)
        for _ in range(PASSES):
            for path, nodes in self.nodes.items():
                self._follow(path, nodes)

    @staticmethod
    def _texts(nodes: list[ast.AST]) -> set[str]:
        return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}

    def _define(self, path: str, nodes: list[ast.AST]) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef):
                arguments = [argument.arg for argument in node.args.args if argument.arg != 'self']
                for name in (node.name, *self._registries(node)):
                    self.functions[name].append((path, arguments))
            elif isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.FunctionDef) and item.name == '__init__':
                        self.functions[node.name].append((path, [argument.arg for argument in item.args.args[1:]]))

    @staticmethod
    def _registries(node: ast.FunctionDef) -> Iterator[str]:
        """Names of the registries that a function is in: it is called as REGISTRY[name](...)."""
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute):
                yield variable(decorator.func.value)

    def _follow(self, path: str, nodes: list[ast.AST]) -> None:
        for node in nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(path, target, node.value)
            elif isinstance(node, ast.Call):
                called = node.func.value if isinstance(node.func, ast.Subscript) else node.func
                for where, parameters in self.functions[variable(called).rpartition('.')[2]]:
                    given = [*zip(parameters, node.args), *((word.arg, word.value) for word in node.keywords)]
                    for parameter, value in given:
                        self.meaning[where, parameter] |= self.sections & set(self.paths(path, value))

    def _assign(self, path: str, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts):
                self._assign(path, one, other)
        else:
            self.meaning[path, variable(target)] |= self.sections & set(self.paths(path, value))

    def paths(self, path: str, node: ast.AST) -> Iterator[str]:
        """Keys and sections that an expression may stand for."""
        yield from self.meaning.get((path, ast.unparse(node)), ())
        if isinstance(node, ast.Attribute):
            names, value = {node.attr}, node.value
        elif isinstance(node, ast.Subscript):
            constant = isinstance(node.slice, ast.Constant)
            names, value = ({node.slice.value} if constant else self.texts[path]), node.value
        else:
            return
        yield from names & self.top if isinstance(node, ast.Attribute) else ()
        for section in set(self.paths(path, value)) & self.sections:
            yield from (f'{section}.{name}' for name in names)

    def read(self) -> set[str]:
        """The keys that are read."""
        found = set()
        for path, nodes in self.nodes.items():
            for node in nodes:
                if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, ast.Load):
                    found.update(self.paths(path, node))
        return found & self.keys
