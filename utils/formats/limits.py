# SPDX-License-Identifier: Apache-2.0
"""Limits of untrusted files: each number is bounded, and work and memory are at most a multiple of the bytes read."""

from __future__ import annotations

from typing import Any

MAX_OPCODES = 1 << 20  # of a pickle: three seconds; the state of a large run has less than 2 % of it
MAX_MEMO = 1 << 32  # what pickle's binary operations can count to
MAX_BITS = 1024  # of an integer: random states have 128, PyTorch's magic number 80
MAX_DIMS = 32  # of an array: what every numpy takes
MAX_SIDE = 1 << 48  # numbers along an axis: products of two stay below what numpy counts in
MAX_NAME = 200  # characters of the name of a class or function
MAX_CODE = 16  # characters of a numpy type
MAX_REFERENCE = 6  # parts of a reference to a storage
MAX_ARGUMENTS = 8  # of a call, or parts of an array's state, that are used
MAX_KEY = 1000  # characters of a key; names of parameters have less than 100
MAX_KEY_PARTS, MAX_PART = (
    4,
    1 << 16,
)  # tuples as keys: their hashes can be made to collide, unless they are few and small
MAX_HASHED = 1 << 60  # integers from here on can be chosen to have one hash, which makes a dict quadratic
MAX_DEPTH = 100  # containers within containers; checkpoints have 5
FREE = 1 << 20  # entries or bytes that are never too many
FACTOR = 8  # bytes copied, or entries counted as often as they are referred to, per byte read


class RefusedError(ValueError):
    """The file holds more than data; the text of the error says what, as the end of a sentence."""


class Allowance:
    """Budget of entries and bytes that the calls of a pickle may copy, in proportion to the bytes read so far.

    Without it, a few bytes of a pickle could copy a value of megabytes any number of times.

    Attributes:
        read: bytes of the pickle read so far.
    """

    def __init__(self):
        self.read = 0
        self._spent = 0

    def spend(self, values: Any) -> None:
        """Charge a call with the arguments `values`. Raises RefusedError if the budget is spent."""
        if isinstance(values, (list, tuple)):
            self._spent += len(values) + sum(map(_size, values[:MAX_ARGUMENTS]))
        if self._spent > FREE + FACTOR * self.read:
            raise RefusedError('it copies the same values over and over')


def _size(value: Any) -> int:
    """Return what a call may copy of an argument; no function copies arrays."""
    return len(value) if isinstance(value, (list, tuple, dict, set, frozenset, str, bytes, bytearray)) else 1


def check_int(value: int) -> int:
    """Return an integer of at most MAX_BITS. Raises RefusedError."""
    if value.bit_length() > MAX_BITS:
        raise RefusedError(f'it holds an integer of {value.bit_length()} bits')
    return value


def check_shape(shape: Any) -> tuple[int, ...]:
    """Return the shape of an array if it is a tuple of a few integers. Raises ValueError."""
    if not isinstance(shape, tuple) or len(shape) > MAX_DIMS:
        raise ValueError('an array without a shape')
    if not all(type(side) is int and 0 <= side < MAX_SIDE for side in shape):
        raise ValueError('an array with a side that is no number of entries')
    return shape


def check_key(key: Any) -> Any:
    """Return a valid key of a dict or member of a set. Raises ValueError.

    Hashing nested tuples overflows the stack or takes forever, and equal hashes make dicts quadratic. No state dict has such
    keys.
    """
    if key is None or isinstance(key, (bool, bytes)) or (isinstance(key, str) and len(key) <= MAX_KEY):
        return key
    if isinstance(key, int) and abs(key) < MAX_HASHED:
        return key
    if isinstance(key, float) and key == key:  # NaN differs from itself
        return key
    if isinstance(key, tuple) and len(key) <= MAX_KEY_PARTS and all(map(_is_part, key)):
        return key
    raise ValueError(f'a {type(key).__name__} as a key that is nested, huge or unhashable')


def _is_part(part: Any) -> bool:
    if type(part) is int:
        return abs(part) < MAX_PART
    return part is None or isinstance(part, (bool, bytes)) or (isinstance(part, str) and len(part) <= MAX_KEY)


# ---------------------------------------------------------------------------------------------------- nesting
def check_tree(value: Any, size: int) -> None:
    """Check that a walk through nested lists, tuples and dicts ends soon.

    Shared containers count once per path: a hundred lists, each with the previous one twice, have 2^100 entries for code that
    compares, copies or prints them.

    Args:
        size: bytes that the value was read from.

    Raises:
        RefusedError: a container within itself, nested too deeply, or with many times more entries than bytes.
    """
    entries: dict[int, tuple[int, int]] = {}  # of finished containers, by id: entries with repetitions, depth
    open_ids: set[int] = set()
    limit = FREE + FACTOR * size
    stack = [(value, False)]
    while stack:
        item, finished = stack.pop()
        children = _children(item)
        if children is None or (not finished and id(item) in entries):
            continue
        if finished:
            known = [entries.get(id(child), (1, 0)) for child in children]
            total = 1 + sum(count for count, _ in known)
            entries[id(item)] = total, 1 + max((depth for _, depth in known), default=0)
            if total > limit or entries[id(item)][1] > MAX_DEPTH:
                raise RefusedError('its containers are nested too deeply, or repeated too often')
            open_ids.discard(id(item))
        else:
            if id(item) in open_ids:
                raise RefusedError('it holds a container within itself')
            open_ids.add(id(item))
            stack.append((item, True))
            stack += [(child, False) for child in children if _children(child) is not None]


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values() or None
    return (value or None) if isinstance(value, (list, tuple)) else None
