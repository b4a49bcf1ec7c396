# SPDX-License-Identifier: Apache-2.0
"""Process of one framework: `python -m benchmarks.worker SIDE FOLDER HANDLE`, started by benchmarks/compare_torch.py."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection

from benchmarks.cases import LEANVIT
from benchmarks.processes import Side, serve
from utils.cli import run


def main() -> None:
    name, folder, handle = sys.argv[1:]
    if name == LEANVIT:
        from utils.environment import start_paddle

        start_paddle()  # may restart this process
    serve(Connection(int(handle)), build_side(name, folder))


def build_side(name: str, folder: str) -> Side:
    """Import a framework. The other one is not imported in this process."""
    if name == LEANVIT:
        from benchmarks.leanvit_side import LeanViT

        return LeanViT(folder)
    from benchmarks.torch_side import PyTorch

    return PyTorch(len(os.sched_getaffinity(0)))


if __name__ == '__main__':
    run(main)
