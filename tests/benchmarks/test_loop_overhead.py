# SPDX-License-Identifier: Apache-2.0
"""benchmarks/loop_overhead.py on a small recipe."""

import json

import pytest

from benchmarks import loop_overhead
from tests.runs.conftest import recipe  # noqa: F401


def test_the_loops_of_a_recipe(recipe, images, tmp_path, capsys):  # noqa: F811
    path = tmp_path / 'loops.json'
    loop_overhead.main([recipe, '-data_path', str(images), '-rounds', '2', '-workers', '0', '1', '-json', str(path)])
    rows = json.loads(path.read_text())['loops']
    assert [row['workers'] for row in rows] == [0, 1]
    for row in rows:
        for name in loop_overhead.LOOPS:
            assert len(row[name]['seconds']) == len(row[name]['cpu_seconds']) == 2
            assert min(row[name]['seconds'] + row[name]['cpu_seconds']) > 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split()[:2] == ['name', 'workers'] and len(lines) == 2


def test_overhead_is_the_median_over_the_rounds():
    row = {'bare': {'seconds': [1.0, 1.0, 2.0]}, 'trainer': {'seconds': [1.1, 1.2, 2.6]}}
    assert loop_overhead.overhead(row, 'bare') == pytest.approx(0.2)
