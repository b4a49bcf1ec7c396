# SPDX-License-Identifier: Apache-2.0
"""The shape of the code base: imports point downwards, nothing is executed from data, files say their licence."""

import ast
import glob
import os

import pytest

from tests.conftest import ROOT

LAYERS = {
    'utils': 0,
    'config': 1,
    'models': 2,
    'datasets': 2,
    'tasks': 3,
    'analysis': 3,
    'deploy': 3,
    'engine': 4,
    'tools': 5,
    'main_single_gpu': 5,
    'main_multi_gpu': 5,
}
SOURCES = sorted(
    os.path.relpath(path, ROOT)
    for pattern in ('*.py', *(f'{package}/**/*.py' for package in LAYERS))
    for path in glob.glob(os.path.join(ROOT, pattern), recursive=True)
)
FORBIDDEN = {'eval', 'exec', 'pickle.load', 'pickle.loads', 'os.system', 'paddle.load', 'yaml.load', 'yaml.full_load'}
# What code that worker processes run is made of; importing Paddle there costs seconds and gigabytes.
WITHOUT_PADDLE = ('config.py', 'utils/', 'datasets/')
WITH_PADDLE = ('datasets/batch.py', 'datasets/mixing.py')


def tree(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
        return ast.parse(file.read())


def imported(path):
    """Top-level packages that a file imports anywhere."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition('.')[0]


@pytest.mark.parametrize('path', SOURCES)
def test_imports_point_downwards(path):
    own = path.split(os.sep)[0].replace('.py', '')
    for package in set(imported(path)) - {own}:
        if package in LAYERS:
            assert LAYERS[package] < LAYERS[own], f'{path} imports {package}'


@pytest.mark.parametrize(
    'path', [path for path in SOURCES if path.startswith(WITHOUT_PADDLE) and path not in WITH_PADDLE]
)
def test_paddle_stays_out_of_what_workers_run(path):
    assert 'paddle' not in set(imported(path))


@pytest.mark.parametrize('path', SOURCES)
def test_nothing_is_executed_from_data(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN, f'{path}:{node.lineno}'
            shells = [keyword for keyword in node.keywords if keyword.arg == 'shell']
            assert not shells, f'{path}:{node.lineno}'


@pytest.mark.parametrize('path', SOURCES)
def test_files_say_licence_and_purpose(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
        text = file.read()
    lines = [line for line in text.splitlines() if not line.startswith('#!')]
    assert not text or lines[0] == '# SPDX-License-Identifier: Apache-2.0'
    assert not text or ast.get_docstring(ast.parse(text)) or path.endswith('__init__.py')


def test_goldens_stay_small():
    sizes = [
        os.path.getsize(path) for path in glob.glob(f'{ROOT}/tests/goldens/**', recursive=True) if os.path.isfile(path)
    ]
    assert sum(sizes) < 40e6
