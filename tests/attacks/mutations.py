# SPDX-License-Identifier: Apache-2.0
"""Seeded damage of valid files: flipped bits, cut and moved parts, other sizes, numbers and names."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence

_NUMBERS = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    32767,
    65535,
    1 << 31,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
)
_HEAD = 600  # bytes at either end that are damaged more often: most formats describe themselves there


def mutants(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield `count` damaged copies of a file, the same ones for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            rng.choice(_DAMAGES)(damaged, rng)
        yield bytes(damaged)


def place(data: Sequence, rng: random.Random) -> int:
    """Return a position, in half of the cases near the start or the end."""
    size = len(data)
    near = min(_HEAD, size)
    kind = rng.random()
    if kind < 0.35:
        return rng.randrange(near + 1)
    return size - rng.randrange(near + 1) if kind < 0.55 else rng.randrange(size + 1)


def _flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[min(place(data, rng), len(data) - 1)] ^= 1 << rng.randrange(8)


def _byte(data: bytearray, rng: random.Random) -> None:
    if data:
        data[min(place(data, rng), len(data) - 1)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(data: bytearray, rng: random.Random) -> None:
    code = rng.choice('HIQ') if rng.random() < 0.5 else rng.choice(('>H', '>I', '>Q'))
    packed = struct.pack(
        code if code[0] == '>' else f'<{code}', rng.choice(_NUMBERS) % (1 << 8 * struct.calcsize(code))
    )
    begin = place(data, rng)
    data[begin : begin + len(packed)] = packed


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[place(data, rng) :]


def _remove(data: bytearray, rng: random.Random) -> None:
    begin = place(data, rng)
    del data[begin : begin + rng.choice((1, 2, 4, 8, 64, 1000))]


def _repeat(data: bytearray, rng: random.Random) -> None:
    begin = place(data, rng)
    part = bytes(data[begin : begin + rng.choice((1, 4, 16, 200))])
    data[begin:begin] = part * rng.choice((1, 2, 50))


def _insert(data: bytearray, rng: random.Random) -> None:
    begin = place(data, rng)
    data[begin:begin] = rng.randbytes(rng.choice((1, 2, 8, 100)))


def _swap(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((1, 4, 32, 500))
    one, other = place(data, rng), place(data, rng)
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]


def _digits(data: bytearray, rng: random.Random) -> None:
    """Replace a decimal digit by others, as in sizes within text."""
    digits = [number for number, byte in enumerate(data[: 1 << 16]) if 48 <= byte < 58]
    if digits:
        begin = rng.choice(digits)
        data[begin : begin + 1] = rng.choice(
            (b'', b'9', b'-1', b'1e99', b'9' * 30, b'4294967296', b'9' * 5000, b'null')
        )


_DAMAGES = (_flip, _flip, _byte, _number, _number, _cut, _remove, _repeat, _insert, _swap, _digits)
