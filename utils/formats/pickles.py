# SPDX-License-Identifier: Apache-2.0
"""Safe reader of pickles from untrusted sources: it returns plain data and runs no code of the file.

Python's unpickler calls what a file names. An allow-list in its `find_class` is not enough: a file can still call the
listed names with any argument, or request gigabytes in twelve bytes. This reader executes the opcodes itself, decoded by
the standard library's `pickletools`. It builds containers, numbers and text. Each class or function name must be a key
of `KNOWN`, whose value builds plain data. Nothing that a file names is imported, called or modified.
`utils.formats.limits` bounds time and memory by the number of bytes read.
"""

from __future__ import annotations

import math
import mmap
import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from utils.formats.limits import (
    MAX_ARGUMENTS,
    MAX_CODE,
    MAX_MEMO,
    MAX_NAME,
    MAX_OPCODES,
    MAX_REFERENCE,
    Allowance,
    RefusedError,
    check_int,
    check_key,
    check_shape,
    check_tree,
)

__all__ = ['KNOWN', 'DType', 'Inert', 'PickleReader', 'RefusedError', 'mapped']


def mapped(file: IO[bytes]) -> mmap.mmap:
    """Map a file into memory: a read then allocates no more bytes than the file has left."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class DType:
    """`numpy.dtype` of numbers or booleans; a dtype that may hold Python objects is refused."""

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str) or len(code) > MAX_CODE:  # other values may take forever to print
            raise RefusedError('it holds an array whose type is no short text')
        if np.dtype(code).kind not in 'biufc':
            raise RefusedError(f"it holds an array of '{code}', which are not numbers")
        self.numpy = np.dtype(code)

    def set_state(self, state: tuple) -> None:
        """Set the byte order, the only part of numpy's stored state that matters."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in _BYTE_ORDERS:
            raise ValueError('an unknown byte order')
        self.numpy = self.numpy.newbyteorder(state[1])


_BYTE_ORDERS = ('<', '>', '=', '|')


class Inert:
    """Placeholder of an object that weights do not need, such as the arguments of a training run."""

    def __init__(self, *args: Any):
        self.args = args
        self.state: Any = None


# ---------------------------------------------------------------------------------------------------- known names
NDARRAY = 'numpy.ndarray'


def _empty_array(kind: Any, *_: Any) -> np.ndarray:
    if kind is not NDARRAY:
        raise RefusedError('it holds an array of an unknown kind')
    return np.empty(0, np.uint8)


def _fill(array: np.ndarray, state: tuple) -> None:
    """Set shape, type and content of an array in place, since the file may refer to the array again."""
    if not isinstance(state, tuple) or len(state) > MAX_ARGUMENTS:
        raise ValueError('an array without its content')
    shape, dtype, fortran_order, raw = state[-4:]
    raw = raw.encode('latin1') if isinstance(raw, str) else raw
    if array.size or not isinstance(dtype, DType) or not isinstance(raw, bytes):
        raise ValueError('an array without its content')
    if math.prod(check_shape(shape)) * dtype.numpy.itemsize != len(raw):
        raise ValueError(f'an array of shape {shape} with {len(raw)} bytes')
    array.__setstate__((1, shape, dtype.numpy, bool(fortran_order), raw))


def _from_buffer(buffer: bytes | bytearray, dtype: DType, shape: tuple, order: str) -> np.ndarray:
    if not isinstance(buffer, (bytes, bytearray)):
        raise ValueError('an array without its content')
    return np.frombuffer(buffer, dtype.numpy).reshape(check_shape(shape), order=order).copy(order=order)


def _scalar(dtype: DType, raw: bytes | str) -> np.generic:
    raw = raw.encode('latin1') if isinstance(raw, str) else raw
    (number,) = np.frombuffer(raw, dtype.numpy)
    return number


def _encode(text: str, encoding: str) -> bytes:
    """Decode bytes of pickle protocols below 3."""
    if encoding != 'latin1':
        raise RefusedError('it asks for another codec than latin1')
    return text.encode('latin1')


def _sequence(items: list | tuple = ()) -> list | tuple:
    if not isinstance(items, (list, tuple)):
        raise TypeError(f'items from a {type(items).__name__}')
    return items


def _mapping(items: Any = ()) -> dict:
    result: dict = {}
    _set_items(result, items.items() if isinstance(items, dict) else _sequence(items))
    return result


def _set_items(mapping: dict, items: Any) -> None:
    for key, value in items:
        mapping[check_key(key)] = value


KNOWN: Mapping[str, Any] = {
    NDARRAY: NDARRAY,
    'numpy.dtype': DType,
    **{
        f'numpy.{core}.{name}': function
        for core in ('core', '_core')  # before and since numpy 2
        for name, function in {
            'multiarray._reconstruct': _empty_array,
            'multiarray.scalar': _scalar,
            'numeric._frombuffer': _from_buffer,
        }.items()
    },
    '_codecs.encode': _encode,
    'collections.OrderedDict': _mapping,
    'collections.Counter': _mapping,
    'collections.defaultdict': lambda factory=None: {},
    'yacs.config.CfgNode': _mapping,
    **{
        f'{builtins}.{name}': function
        for builtins in ('builtins', '__builtin__')  # Python 3 and 2
        for name, function in {
            'dict': _mapping,
            'list': lambda items=(): list(_sequence(items)),
            'tuple': lambda items=(): tuple(_sequence(items)),
            'set': lambda items=(): {check_key(item) for item in _sequence(items)},
            'frozenset': lambda items=(): frozenset(check_key(item) for item in _sequence(items)),
            'bytes': lambda: b'',
            'bytearray': lambda raw=b'', *_: bytearray(raw if isinstance(raw, bytes) else raw.encode('latin1')),
            'int': lambda: 0,
            'long': lambda: 0,  # what protocol 2 calls int
            'float': lambda: 0.0,
        }.items()
    },
    'argparse.Namespace': Inert,
    'types.SimpleNamespace': Inert,
    **{
        f'{module}.{name}': Inert
        for module in ('pathlib', 'pathlib._local')
        for name in ('Path', 'PosixPath', 'WindowsPath', 'PurePosixPath', 'PureWindowsPath')
    },
}


# ---------------------------------------------------------------------------------------------------- the reader
_LITERALS = {
    'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT', 'STRING', 'BINSTRING',
    'SHORT_BINSTRING', 'UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8', 'BINBYTES', 'SHORT_BINBYTES',
    'BINBYTES8', 'BYTEARRAY8',
}  # fmt: skip
_NOTHING = {'PROTO', 'FRAME'}


class PickleReader:
    """Reads one pickle after another from a stream.

    Args:
        known: allowed names -> the function that builds the data, or the data itself.
        persistent_load: returns the object of a persistent id, which lies outside the pickle.
    """

    def __init__(self, known: Mapping[str, Any] = KNOWN, persistent_load: Callable[[Any], Any] | None = None):
        self._known = known
        self._persistent_load = persistent_load

    def load(self, stream: IO[bytes]) -> Any:
        """Read the next object of `stream` and leave the stream after it.

        Raises:
            RefusedError: the pickle uses a name or an operation that is not allowed.
            Exception: any exception, if the bytes are not a pickle.
        """
        self._stack: list = []
        self._outer: list[list] = []  # the stack before each open MARK
        self._memo: dict[int, Any] = {}
        self._allowance = Allowance()
        start = stream.tell()
        for number, (opcode, arg, place) in enumerate(pickletools.genops(stream)):
            name = opcode.name
            self._allowance.read = place - start
            if number > MAX_OPCODES:
                raise RefusedError(f'it has more than {MAX_OPCODES} pickle operations')
            if name in _LITERALS:
                self._stack.append(check_int(arg) if type(arg) is int else arg)
            elif name == 'STOP':
                break
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, arg)
            elif name not in _NOTHING:
                raise RefusedError(f'it uses the pickle operation {name}')
        (result,) = self._stack
        check_tree(result, self._allowance.read)
        return result

    # Each operation takes the argument of its opcode, or None.
    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _take(self, count: int) -> tuple:
        """Pop the last `count` values from the stack."""
        if count > len(self._stack):
            raise IndexError('an operation without its operands')
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return tuple(taken)

    def _to_mark(self) -> list:
        """Pop the values after the last MARK from the stack."""
        taken, self._stack = self._stack, self._outer.pop()
        return taken

    def _mark(self, _) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _store(self, index: int | None) -> None:
        self._memo[_memo_index(len(self._memo) if index is None else index)] = self._stack[-1]

    def _recall(self, index: int) -> None:
        self._push(self._memo[_memo_index(index)])

    def _name(self, name: str) -> None:
        """Push the entry of a class or function; a blank separates module and name."""
        if len(name) > MAX_NAME:
            raise RefusedError(f'it names code by {len(name)} characters')
        name = name.replace(' ', '.', 1)
        if name not in self._known:
            raise RefusedError(f"it names '{name}', which is code and not data")
        self._push(self._known[name])

    def _stack_name(self, _) -> None:
        parts = self._take(2)
        if not all(isinstance(part, str) and len(part) <= MAX_NAME for part in parts):
            raise RefusedError('it names code by something else than a short text')
        self._name(' '.join(parts))

    def _instance(self, name: str) -> None:
        """Call a class by name with all values since the mark (protocol 0)."""
        args = self._to_mark()
        self._name(name)
        self._call(*self._take(1), args)

    def _object(self, _) -> None:
        """Call a class with its arguments, all values since the mark (protocol 1)."""
        function, *args = self._to_mark()
        self._call(function, args)

    def _call(self, function: Any, args: Any) -> None:
        if not callable(function) or not isinstance(args, (tuple, list)):
            raise TypeError('a call of what cannot be called')
        self._allowance.spend(args)
        self._push(function(*args))

    def _build(self, _) -> None:
        """Set the state of the object below: the content of an array; attributes of a dict are ignored."""
        (state,) = self._take(1)
        target = self._stack[-1]
        if isinstance(target, np.ndarray):
            self._allowance.spend(state)
            _fill(target, state)
        elif isinstance(target, DType):
            target.set_state(state)
        elif isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):
            raise TypeError(f'state for a {type(target).__name__}')

    def _append(self, items: list | tuple) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError(f'items for a {type(target).__name__}')
        target.extend(items)

    def _set(self, items: list | tuple) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError(f'keys for a {type(target).__name__}')
        _set_items(target, _pairs(items))

    def _add(self, items: list) -> None:
        target = self._stack[-1]
        if not isinstance(target, set):
            raise TypeError(f'members for a {type(target).__name__}')
        target.update(check_key(item) for item in items)

    def _persistent(self, reference: Any) -> None:
        if self._persistent_load is None:
            raise ValueError('a reference to something outside the file')
        if not isinstance(reference, tuple) or len(reference) > MAX_REFERENCE:
            raise ValueError('a reference that is no storage')
        self._push(self._persistent_load(reference))


def _memo_index(index: Any) -> int:
    index = int(index)
    if not 0 <= index < MAX_MEMO:
        raise ValueError('a memo index beyond 32 bits')
    return index


def _pairs(items: list | tuple) -> list[tuple]:
    if len(items) % 2:
        raise ValueError('a key without a value')
    return list(zip(items[::2], items[1::2]))


_OPERATIONS: dict[str, Callable[[PickleReader, Any], Any]] = {
    'NONE': lambda self, _: self._push(None),
    'NEWTRUE': lambda self, _: self._push(True),
    'NEWFALSE': lambda self, _: self._push(False),
    'EMPTY_TUPLE': lambda self, _: self._push(()),
    'EMPTY_LIST': lambda self, _: self._push([]),
    'EMPTY_DICT': lambda self, _: self._push({}),
    'EMPTY_SET': lambda self, _: self._push(set()),
    'MARK': PickleReader._mark,
    'TUPLE': lambda self, _: self._push(tuple(self._to_mark())),
    'TUPLE1': lambda self, _: self._push(self._take(1)),
    'TUPLE2': lambda self, _: self._push(self._take(2)),
    'TUPLE3': lambda self, _: self._push(self._take(3)),
    'LIST': lambda self, _: self._push(self._to_mark()),
    'DICT': lambda self, _: self._push(_mapping(_pairs(self._to_mark()))),
    'FROZENSET': lambda self, _: self._push(frozenset(check_key(item) for item in self._to_mark())),
    'APPEND': lambda self, _: self._append(self._take(1)),
    'APPENDS': lambda self, _: self._append(self._to_mark()),
    'SETITEM': lambda self, _: self._set(self._take(2)),
    'SETITEMS': lambda self, _: self._set(self._to_mark()),
    'ADDITEMS': lambda self, _: self._add(self._to_mark()),
    'POP': lambda self, _: self._take(1) if self._stack else self._to_mark(),
    'POP_MARK': lambda self, _: self._to_mark(),
    'DUP': lambda self, _: self._push(self._stack[-1]),
    **dict.fromkeys(('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'), PickleReader._store),
    **dict.fromkeys(('GET', 'BINGET', 'LONG_BINGET'), PickleReader._recall),
    'GLOBAL': PickleReader._name,
    'STACK_GLOBAL': PickleReader._stack_name,
    **dict.fromkeys(('REDUCE', 'NEWOBJ'), lambda self, _: self._call(*self._take(2))),
    'INST': PickleReader._instance,
    'OBJ': PickleReader._object,
    'BUILD': PickleReader._build,
    'PERSID': PickleReader._persistent,
    'BINPERSID': lambda self, _: self._persistent(*self._take(1)),
}
