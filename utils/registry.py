# SPDX-License-Identifier: Apache-2.0
"""Registry of builders by name: the allow-list of the code that a name in a configuration may run."""

import difflib
import fnmatch
from collections.abc import Callable, Iterator

from utils.errors import UserError


class Registry:
    """Maps names to functions. Names are case-insensitive.

    >>> MODELS = Registry('model')
    >>> @MODELS.register('gmlp')
    ... def build_gmlp(config): ...
    >>> MODELS['gmlp'](config)
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Callable] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, *aliases: str) -> Callable[[Callable], Callable]:
        """Return a decorator that registers a function as `name`; `aliases` are accepted but not listed."""

        def decorate(function: Callable) -> Callable:
            for key in (name, *aliases):
                if key.lower() in self._aliases:
                    raise ValueError(f'{self.kind} {key!r} is registered twice')
                self._aliases[key.lower()] = name
            self._entries[name] = function
            return function

        return decorate

    def __getitem__(self, name: str) -> Callable:
        try:
            return self._entries[self._aliases[str(name).lower()]]
        except KeyError:
            near = difflib.get_close_matches(str(name).lower(), self._aliases, n=1, cutoff=0.4)
            hint = f" Did you mean '{self._aliases[near[0]]}'?" if near else ''
            raise UserError(f"unknown {self.kind} '{name}'.{hint} Known: {', '.join(self)}.") from None

    def __contains__(self, name: str) -> bool:
        return str(name).lower() in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def values(self) -> list[Callable]:
        """Return the functions in the order of their registration."""
        return list(self._entries.values())

    def match(self, pattern: str = '*') -> list[str]:
        """Return the names that match a shell pattern, sorted."""
        return [name for name in self if fnmatch.fnmatch(name, pattern)]
