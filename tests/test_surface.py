# SPDX-License-Identifier: Apache-2.0
"""What users and their scripts depend on: flags, keys with defaults, fields of metrics.jsonl, parts of a checkpoint.

tests/goldens/surface.json holds all of it. Additions are deliberate: `python -m tests.test_surface` writes the file, its
difference is reviewed, and CHANGELOG says what is new. Entries are neither renamed nor removed, and defaults stay.
"""

import argparse
import glob
import importlib
import json
import os
import tempfile
from unittest import mock

import pytest

from config import get_arguments, get_config, update_config
from engine.run import run_config
from tests.conftest import HERE, ROOT, make_images
from tests.engine.curves import read_state, train
from tests.engine.test_curves import RECIPES

SURFACE = os.path.join(HERE, 'goldens', 'surface.json')
LAUNCHERS = ('main_single_gpu', 'main_multi_gpu')
TOOLS = sorted(
    f'tools.{name[:-3]}' for name in map(os.path.basename, glob.glob(f'{ROOT}/tools/*.py')) if not name.startswith('_')
)
SHORT = {'TRAIN.NUM_EPOCHS': 1, 'TRAIN.WARMUP_EPOCHS': 0}
TASKS = {
    'supervised': RECIPES['augmented'],
    'mae': RECIPES['mae_distilled'],
    'mocov3': {**RECIPES['mocov3'], 'TRAIN.MODEL_EMA': False},
}


class Parsed(Exception):
    """Carries the parser of a command, which is about to parse."""


def flags(module: str) -> list[str]:
    """Flags of a command, without -h, and its other arguments in capitals."""

    def stop(parser, *_):
        raise Parsed(parser)

    command = importlib.import_module(module)
    with mock.patch.object(argparse.ArgumentParser, 'parse_args', stop), pytest.raises(Parsed) as caught:
        command.main()
    actions = [action for action in caught.value.args[0]._actions if action.dest != 'help']
    return sorted(name for action in actions for name in action.option_strings or [action.dest.upper()])


def keys(tree=None, prefix: str = '') -> dict:
    """Defaults by dotted names."""
    result = {}
    for key, value in (get_config() if tree is None else tree).items():
        result.update(keys(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value})
    return json.loads(json.dumps(result))


def files(task: str, images: str, folder: str) -> dict:
    """Fields of the rows of metrics.jsonl by kind, and parts of last.pdparams, of a run and its evaluation."""
    train({**TASKS[task], **SHORT}, images, folder)
    run = os.path.join(folder, 'run')
    arguments = ['-eval', f'-pretrained={run}', f'-data_path={images}', f'-output={folder}', '-tag=eval']
    run_config(update_config(get_config(), get_arguments(arguments)))
    rows = {}
    for name in ('run', 'eval'):
        with open(os.path.join(folder, name, 'metrics.jsonl'), encoding='utf-8') as file:
            for row in map(json.loads, file):
                rows[row['kind']] = {field: type(value).__name__ for field, value in row.items()}
    return {'metrics.jsonl': rows, 'last.pdparams': sorted(read_state(os.path.join(run, 'last.pdparams')))}


def check(part: str, name: str, found) -> None:
    with open(SURFACE, encoding='utf-8') as file:
        recorded = json.load(file)[part].get(name)
    assert found == recorded, (
        f'{part} of {name}: if this was meant, `python -m tests.test_surface`, and say it in CHANGELOG'
    )


@pytest.mark.parametrize('name', [*LAUNCHERS, *TOOLS])
def test_flags(name):
    check('flags', name, flags(name))


def test_keys_and_defaults():
    check('keys', 'config', keys())


@pytest.mark.parametrize('task', TASKS)
def test_files_of_a_run(task, images, tmp_path):
    check('files', task, files(task, images, str(tmp_path)))


def write() -> None:
    """Records the surface of today."""
    surface = {
        'flags': {name: flags(name) for name in (*LAUNCHERS, *TOOLS)},
        'keys': {'config': keys()},
        'files': {},
    }
    for task in TASKS:
        with tempfile.TemporaryDirectory() as place:
            surface['files'][task] = files(task, make_images(os.path.join(place, 'images')), place)
    with open(SURFACE, 'w', encoding='utf-8') as file:
        json.dump(surface, file, indent=1)
        file.write('\n')


if __name__ == '__main__':
    write()
