# SPDX-License-Identifier: Apache-2.0
"""Compile the operators in C++ for training on the CPU; training does it at its first use otherwise.

    python tools/build_ops.py
    make ops

Prints the path of the library. It needs a C++ compiler (g++, or the command in CXX), and Paddle's build for the CPU.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse

import paddle

from ops.extension import build
from utils.cli import run
from utils.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Compile the operators, unless it was done before, and print the path of the library."""
    parse(argv)
    if paddle.is_compiled_with_cuda():
        raise UserError('this is the GPU build of Paddle, which needs no operators for the CPU.')
    print(build())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Compile the operators for the CPU.', allow_abbrev=False)
    return parser.parse_args(argv)


if __name__ == '__main__':
    run(main)
