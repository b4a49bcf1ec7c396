# SPDX-License-Identifier: Apache-2.0
"""The shape of the code base: imports point downwards, functions are short, nothing is executed from data."""

import ast
import functools
import glob
import graphlib
import os
import re

import pytest

from tests.conftest import ROOT

LAYERS = {
    'utils': 0,
    'config': 1,
    'ops': 1,
    'models': 2,
    'datasets': 2,
    'tasks': 3,
    'analysis': 4,  # analysis, deploy and engine do not import one another
    'deploy': 4,
    'engine': 4,
    'tools': 5,
    'benchmarks': 6,  # may use tools
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
WITH_PADDLE = ('datasets/batch.py', 'utils/device.py', 'datasets/mixing.py')


MAX_FUNCTION, MAX_FILE = 60, 500  # lines


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
        return file.read()


@functools.cache
def tree(path):
    return ast.parse(read(path))


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


@pytest.mark.parametrize('path', [path for path in SOURCES if path.startswith('models')])
def test_layers_name_the_class_whose_forward_they_call(path):
    """Paddle converts `super().forward` of a layer to that of the object's class: that of a subclass recurses without end."""
    assert 'super().forward(' not in read(path)


@pytest.mark.parametrize('path', SOURCES)
def test_files_say_licence_and_purpose(path):
    text = read(path)
    lines = [line for line in text.splitlines() if not line.startswith('#!')]
    assert not text or lines[0] == '# SPDX-License-Identifier: Apache-2.0'
    assert not text or ast.get_docstring(ast.parse(text)) or path.endswith('__init__.py')


def functions(path):
    """(function, its lines) of a file, methods and nested functions included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize('path', SOURCES)
def test_functions_and_files_are_short(path):
    assert len(read(path).splitlines()) <= MAX_FILE
    long = {node.name: lines for node, lines in functions(path) if lines > MAX_FUNCTION}
    assert not long


# ---------------------------------------------------------------------------------------------------- modules
def module_of(path):
    """`a/b.py` -> 'a.b', and `a/__init__.py` -> 'a'."""
    return path[: -len('.py')].replace(os.sep, '.').removesuffix('.__init__')


def modules_imported(path):
    """Modules of this repository that are imported while a file is."""
    for node in module_level(tree(path)):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f'{node.module}.{name}' for name in names)]
        yield from MODULES & set(names)


def module_level(node):
    """Import statements outside of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from module_level(child)


MODULES = {module_of(path) for path in SOURCES}


def test_no_module_imports_itself_through_others():
    graph = {module_of(path): set(modules_imported(path)) - {module_of(path)} for path in SOURCES}
    for module, needed in graph.items():  # a/__init__.py may import `a.b`, which may be imported with `a`
        needed -= {package for package in needed if module.startswith(f'{package}.')}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(' -> '.join(error.args[1]))


# ---------------------------------------------------------------------------------------------------- tasks
TASK_MODULES = {name for name in MODULES if name.startswith('tasks.')} - {'tasks.base', 'tasks.pictures'}
GENERAL_TOOLS = {
    f'tools/{name}.py'
    for name in ('predict', 'export', 'benchmark', 'browse_data', 'reproduce', '_reproduction', '_schedules')
}
KNOW_NO_TASK = [path for path in SOURCES if path.startswith(('engine/', 'deploy/')) or path in GENERAL_TOOLS]


@pytest.mark.parametrize('path', KNOW_NO_TASK)
def test_the_loop_and_the_tools_know_no_task(path):
    """They read neither TRAIN.TASK nor the module of a task."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert not TASK_MODULES & {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
        if isinstance(node, ast.Import):
            assert not TASK_MODULES & {alias.name for alias in node.names}
        assert not (isinstance(node, ast.Attribute) and node.attr == 'TASK'), f'{path}:{node.lineno}'


# ---------------------------------------------------------------------------------------------------- Paddle
PRIVATE = {
    *('_accumulators', '_master_weights', '_param_groups', '_create_accumulators', '_append_optimize_op'),
    *('_parameters', '_sub_layers', '_buffers', '_parameter_list', '_inplace_version'),
    *('_forward_pre_hooks', '_forward_post_hooks'),
}  # fmt: skip


PRIVATE_FILES = (
    os.path.join('engine', 'paddle_private.py'),
    os.path.join('models', 'paddle_private.py'),
    os.path.join('ops', 'extension.py'),
)


@pytest.mark.parametrize('path', [path for path in SOURCES if path not in PRIVATE_FILES])
def test_private_api_of_paddle_stands_in_three_files(path):
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Attribute):
            assert node.attr not in PRIVATE, f'{path}:{node.lineno}'
            names = [ast.unparse(node)]
        elif isinstance(node, ast.FunctionDef):
            assert node.name not in PRIVATE, f'{path}:{node.lineno}'
        elif isinstance(node, ast.ImportFrom):
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        assert not any(map(is_private, names)), f'{path}:{node.lineno}'


def is_private(dotted):
    """Whether a dotted name is one of Paddle, but none of its public API."""
    return re.fullmatch(r'paddle(\.\w+)*?\.(_(?!_)\w+|base|fluid|framework)(\.\w+)*', dotted) is not None


def test_private_names_are_recognized():
    assert all(map(is_private, ('paddle.base.core', 'paddle._C_ops', 'paddle.nn.layer._x', 'paddle.framework.core.y')))
    assert not any(
        map(is_private, ('paddle.nn.Layer', 'paddle.__version__', 'paddle', 'paddles._x', 'paddle.f(a._b).c'))
    )


def test_goldens_stay_small():
    sizes = [
        os.path.getsize(path) for path in glob.glob(f'{ROOT}/tests/goldens/**', recursive=True) if os.path.isfile(path)
    ]
    assert sum(sizes) < 40e6
