# SPDX-License-Identifier: Apache-2.0
"""Checks of exported programs before Paddle loads them: PREFIX.json, the program, and PREFIX.pdiparams, its weights.

Paddle trusts both: it allocates what a weight file announces, and runs every operator, also those that write files. Its
earlier format (.pdmodel) comes with a file that Paddle unpickles, which can run any code.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from typing import IO, Any

from utils.files import open_regular, read_regular
from utils.formats.limits import MAX_DIMS, MAX_SIDE, RefusedError
from utils.text import NAME, printable

MAX_PROGRAM = 64 << 20  # bytes; the program of a ViT with 1000 operators has 1 MB
MAX_DESCRIPTION = 1024  # bytes of the description of one array
# Operators that read or write files, print, call Python, or talk to other processes; no export has them.
_FORBIDDEN = re.compile(
    r'(save|load|print|py_?func|py_layer|custom|assert|send|recv|read|write|run_program|distributed|listen|c_)\w*'
)
_ALLOWED = ('read_array', 'write_to_array', 'custom_jvp')
_DIALECTS = ('0', '1', '2')  # of Paddle's PIR: builtin, operators, control flow; others come from plugins
_SIZES = {
    0: 1,
    1: 2,
    2: 4,
    3: 8,
    4: 2,
    5: 4,
    6: 8,
    20: 1,
    21: 1,
    22: 2,
    23: 8,
    24: 16,
}  # VarType of framework.proto: bytes


def check_program(path: str) -> None:
    """Check a program in Paddle's JSON format.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such program, or has operators that models do not need; the text says what.
    """
    try:
        content = json.loads(read_regular(path, MAX_PROGRAM))
        magic, program = content['base_code']['magic'], content['program']
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError('the program is not in the JSON format of Paddle 3') from None
    if magic != 'pir':
        raise ValueError('the program is not in the JSON format of Paddle 3')
    for name in _operators(program):
        dialect, dot, operator = name.partition('.')
        if dot and (dialect not in _DIALECTS or (_FORBIDDEN.fullmatch(operator) and operator not in _ALLOWED)):
            raise RefusedError(f"the program has the operator '{printable(name, NAME)}', which models do not need")


def _operators(program: Any) -> Iterator[str]:
    """Yield the names of all operators; JSON is nested less deeply than Python's stack."""
    stack = [program]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            operators = value.get('ops')
            for operator in operators if isinstance(operators, list) else ():
                yield str(operator.get('#')) if isinstance(operator, dict) else 'x.custom'
            stack += value.values()
        elif isinstance(value, list):
            stack += value


def check_parameters(path: str) -> None:
    """Check that the arrays of a .pdiparams file are those that fill it.

    Raises:
        OSError: the file cannot be read.
        ValueError: an array of another size; the text says so.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        while file.tell() < size:
            try:
                count = _array_size(file)
            except (struct.error, KeyError, IndexError):
                raise ValueError('the weights are damaged: an array without a description') from None
            if count > size - file.tell():
                raise ValueError('the weights are damaged: an array is larger than the file')
            file.seek(count, 1)


def _array_size(file: IO[bytes]) -> int:
    """Read the description of the next array and return its size in bytes."""
    version, levels, inner, length = struct.unpack('<IQIi', file.read(20))
    if version or levels or inner or not 0 <= length <= MAX_DESCRIPTION:
        raise KeyError
    fields = list(_varints(file.read(length)))
    sides = [value for field, value in fields if field == 2]
    if len(sides) > MAX_DIMS or not all(side < MAX_SIDE for side in sides):
        raise KeyError
    return math.prod(sides) * _SIZES[next(value for field, value in fields if field == 1)]


def _varints(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (field, value) of a protobuf message of integers, packed or not."""
    place, end, packed = 0, -1, 0
    while place < len(data):
        if place >= end:
            key, place = _varint(data, place)
            packed = key >> 3
            end = place
            if key & 7 == 2:  # packed
                length, place = _varint(data, place)
                end = place + length
                continue
            if key & 7:
                raise KeyError
        value, place = _varint(data, place)
        yield packed, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
