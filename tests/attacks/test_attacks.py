# SPDX-License-Identifier: Apache-2.0
"""Every attack is held: the file is read or refused by a sentence, within the limits, and no program is started."""

from __future__ import annotations

import os

import pytest

from tests.attacks import arena, kinds, lab

FEW = {'images': 150, 'data files': 100, 'configuration': 10, 'exported programs': 20, 'weights: read_file': 150}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('attacks')
    before = os.getcwd()
    os.chdir(folder)
    yield lab.build(str(folder))
    os.chdir(before)


def check(place, kind: str, **few) -> None:
    result = arena.run(kind, kinds.attacks(place, kind, **few))
    assert not result.failures, result.failures[0]
    assert result.refused > result.read or kind == 'images' and result.refused > 30, result.row()
    assert not os.path.exists('HIT')


@pytest.mark.parametrize('kind', kinds.NAMES)
def test_few_damaged_files(place, kind):
    check(place, kind, tries=FEW.get(kind, 20), made=False)


@pytest.mark.slow
@pytest.mark.parametrize('kind', kinds.NAMES)
def test_all_attacks(place, kind):
    check(place, kind)


def test_failures_are_noticed():
    def crash():
        os.abort()

    def escape():
        raise ValueError('x')

    def start():
        os.system('true')

    attacks = [('crash', crash), ('good', int), ('escape', escape), ('start', start), ('last', int)]
    result = arena.run('x', lambda: iter(attacks))
    assert [name for name, _ in result.failures] == ['crash', 'escape', 'start'] and result.read == 2
