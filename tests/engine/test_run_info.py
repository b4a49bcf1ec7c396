# SPDX-License-Identifier: Apache-2.0
"""run.json: commands, environment, and sources of values, also of a run that is resumed."""

import json
import os
import sys

import pytest

from config import get_arguments, get_config, update_config
from engine.distributed import Context
from engine.run_folder import lock_folder, open_folder
from utils.runlog import RunLog

ALONE = Context(0, 1, False)


def opened(monkeypatch, *argv: str) -> tuple[str, dict]:
    """Folder and run.json of a run that a command starts."""
    monkeypatch.setattr(sys, 'argv', ['main_single_gpu.py', *argv])
    config = update_config(get_config(), get_arguments())
    with lock_folder(config, ALONE) as folder:
        log = RunLog(None, 0)
        open_folder(folder, config, ALONE, log)
        log.close()
    with open(os.path.join(folder.path, 'run.json'), encoding='utf-8') as file:
        return folder.path, json.load(file)


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / 'base.yaml').write_text('TRAIN: {BASE_LR: 0.5, END_LR: 0.25}\n')
    (tmp_path / 'recipe.yaml').write_text('BASE: [base.yaml]\nTRAIN:\n  END_LR: 0.125\n')
    return tmp_path / 'recipe.yaml'


def test_sources_commands_and_environment(recipe, tmp_path, monkeypatch):
    flags = (f'-cfg={recipe}', f'-output={tmp_path}', '-tag=a', '-opts', 'SEED', '3')
    _, info = opened(monkeypatch, *flags)
    assert info['sources'] == {
        'TRAIN.BASE_LR': f'{tmp_path / "base.yaml"}:1', 'TRAIN.END_LR': f'{recipe}:3', 'SEED': '-opts', 'SAVE': '-output',
    }  # fmt: skip
    assert info['commands'] == [f'main_single_gpu.py {" ".join(flags)}']
    assert info['environment']['device'] == 'CPU' and info['environment']['processes'] == '1'
    assert info['environment']['python'] == sys.version.split()[0] and {'paddle', 'numpy'} <= set(info['environment'])


def test_a_resumed_run_keeps_its_sources(recipe, tmp_path, monkeypatch):
    """A resumed run reads its own config.yaml, in which every key has a line."""
    folder, first = opened(monkeypatch, f'-cfg={recipe}', f'-output={tmp_path}', '-tag=a')
    _, second = opened(monkeypatch, f'-resume={folder}', '-opts', 'TRAIN.BASE_LR', '0.75')
    assert second['sources'].pop('TRAIN.BASE_LR') == '-opts'
    assert second['sources']['TRAIN.END_LR'] == f'{recipe}:3'
    assert set(second['sources']) <= set(first['sources'])
    assert second['commands'] == [*first['commands'], f'main_single_gpu.py -resume={folder} -opts TRAIN.BASE_LR 0.75']


@pytest.mark.parametrize('content', ['', '[]', '{"commands": 3, "sources": {}}', '[' * 100_000])
def test_a_damaged_file_is_replaced(content, recipe, tmp_path, monkeypatch):
    folder, _ = opened(monkeypatch, f'-cfg={recipe}', f'-output={tmp_path}', '-tag=a')
    with open(os.path.join(folder, 'run.json'), 'w', encoding='utf-8') as file:
        file.write(content)
    _, info = opened(monkeypatch, f'-cfg={recipe}', f'-output={tmp_path}', '-tag=a')
    assert len(info['commands']) == 1 and info['sources']['TRAIN.END_LR'] == f'{recipe}:3'
