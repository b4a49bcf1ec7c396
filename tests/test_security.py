# SPDX-License-Identifier: Apache-2.0
"""docs/security.md: its limits are those of the code, and no reader goes around the shared ones."""

from __future__ import annotations

import ast
import importlib
import os
import re

import pytest

from tests.conftest import ROOT
from tests.test_structure import SOURCES, tree

with open(os.path.join(ROOT, 'docs', 'security.md'), encoding='utf-8') as file:
    PAGE = file.read()
LIMITS = re.findall(r'^\| .+ \| `(\d+)` \| `([\w.]+)\.(\w+)` \|$', PAGE, re.MULTILINE)


@pytest.mark.parametrize('value, module, name', LIMITS)
def test_limits_on_the_page_are_those_of_the_code(value, module, name):
    assert getattr(importlib.import_module(module), name) == int(value)


def test_the_page_has_the_table():
    assert len(LIMITS) >= 30


# ---------------------------------------------------------------------------------------------------- doors
# Calls that open files or decode what is in them, and the files of the code that may make them on data of others.
DOORS = {
    'Image.open': {'datasets/images.py', 'tools/benchmark_data.py'},
    'loadmat': {'datasets/transfer.py'},
    'yaml.compose': {'utils/yaml_files.py'},
    'np.load': {
        'utils/formats/array_files.py',
        'datasets/lmdb.py',
        'tools/_device_goldens.py',
        'benchmarks/leanvit_side.py',
    },  # the last two: of this repository, or written by the benchmark
    'json.load': set(),
    'paddle.jit.load': {'tasks/distillation.py'},
    'inference.create_predictor': {'models/exported.py'},
}
# Files that read with `open`: of the system, of this repository, or what this process itself has just written.
OPEN = {
    'datasets/cache.py', 'engine/throughput.py', 'models/exported.py', 'models/zoo.py', 'tools/_common.py', 'tools/export.py',
    'utils/environment.py', 'utils/files.py', 'utils/transfer.py', 'engine/heartbeat.py', 'utils/processes.py', 'utils/run_paths.py', 'benchmarks/long_lists.py', 'tools/benchmark_data.py',
}  # fmt: skip


def calls(path: str):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def mode(call: ast.Call) -> str:
    modes = [*call.args[1:2], *(word.value for word in call.keywords if word.arg == 'mode')]
    return modes[0].value if modes and isinstance(modes[0], ast.Constant) else 'r'


@pytest.mark.parametrize('path', SOURCES)
def test_files_of_others_are_read_through_the_bounded_readers(path):
    for call in calls(path):
        name = ast.unparse(call.func)
        assert path in DOORS.get(name, {path}), f'{path}:{call.lineno}: {name}'
        if name == 'open' and 'r' in mode(call):
            assert path in OPEN, f'{path}:{call.lineno}: use utils.files.open_regular'
        if name == 'Image.open':
            assert any(word.arg == 'formats' for word in call.keywords), (
                f'{path}:{call.lineno}: Pillow may start programs'
            )
