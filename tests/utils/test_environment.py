# SPDX-License-Identifier: Apache-2.0
"""What a process finds in its environment, and how it restarts itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils import environment
from utils.environment import ensure_home, expand_user
from utils.errors import UserError

COMPLETE = {
    'PADDLE_TRAINER_ID': '1',
    'PADDLE_TRAINERS_NUM': '2',
    'PADDLE_TRAINER_ENDPOINTS': '127.0.0.1:6170,127.0.0.1:6171',
    'PADDLE_CURRENT_ENDPOINT': '127.0.0.1:6171',
}


@pytest.fixture
def launched_with(monkeypatch):
    for name in environment._LAUNCHER:
        monkeypatch.delenv(name, raising=False)

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return environment.launched()

    return change


def test_a_complete_set_of_variables_is_a_launchers(launched_with):
    assert launched_with() is None
    assert launched_with(**COMPLETE) == (1, 2)


@pytest.mark.parametrize('name', COMPLETE)
@pytest.mark.parametrize('value', ['', '7', 'none', '-1'])
def test_a_contradiction_is_left_over(launched_with, name, value):
    assert launched_with(**{**COMPLETE, name: value}) is None


def test_what_is_left_over_is_dropped_and_said_once(launched_with, capsys, monkeypatch):
    launched_with(PADDLE_TRAINERS_NUM='2', FLAGS_selected_gpus='3')
    environment.clear_launcher_variables()
    environment.clear_launcher_variables()
    assert capsys.readouterr().err == (
        'note: PADDLE_TRAINERS_NUM, FLAGS_selected_gpus are left over from another job and ignored.\n'
    )
    assert 'FLAGS_selected_gpus' not in os.environ


def test_a_command_for_one_process_refuses_a_launcher_only(launched_with, monkeypatch):
    launched_with(**COMPLETE)
    monkeypatch.setattr(environment, '_is_child_of_launcher', lambda: True)
    with pytest.raises(UserError, match='started 2 processes of'):
        environment._require_single_process()
    monkeypatch.setattr(environment, '_is_child_of_launcher', lambda: False)
    environment._require_single_process()
    assert environment.launched() is None


@pytest.mark.parametrize('as_module', [True, False])
@pytest.mark.parametrize('has_orig_argv', [True, False])
def test_a_restart_keeps_the_interpreters_flags(tmp_path, as_module, has_orig_argv):
    """Python 3.9 has no sys.orig_argv."""
    program = tmp_path / 'restarts.py'
    program.write_text(
        'import json, sys\n' + ('' if has_orig_argv else 'del sys.orig_argv\n') + 'from utils import environment\n'
        'environment._set_cpu_variables()\n'
        'print(json.dumps([sys.flags.optimize, sys._xoptions, sys.warnoptions, sys.argv[1:]]))\n'
    )
    command = ['-m', 'restarts'] if as_module else [str(program)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith('MALLOC_')}
    done = subprocess.run(
        [sys.executable, '-X', 'utf8', '-W', 'error', '-O', *command, '-x', 'a b'],
        env={**variables, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}'}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, {'utf8': True}, ['error'], ['-x', 'a b']]


def test_an_old_paddle_is_one_sentence(tmp_path):
    (tmp_path / 'paddle.py').write_text("__version__ = '2.6.2'\n")
    done = subprocess.run(
        [sys.executable, 'main_single_gpu.py', '-dataset=digits'],
        cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith('error: this is Paddle 2.6.2, but LeanViT needs 3.3 or newer: ')


# ---------------------------------------------------------------------------------------------------- home
@pytest.fixture
def variables(monkeypatch):
    """The environment, of which a test may change anything."""
    monkeypatch.setattr(os, 'environ', dict(os.environ))
    os.environ.pop('LEANVIT_HOME', None)
    return os.environ


@pytest.mark.parametrize('chosen', [None, '1'])
def test_tf32_is_off_on_gpus_unless_it_is_chosen(variables, monkeypatch, chosen):
    seen = []
    variables.update({'NVIDIA_TF32_OVERRIDE': chosen} if chosen else {})
    monkeypatch.setattr(environment, 'is_gpu_build', lambda: True)
    monkeypatch.setattr(environment, 'import_paddle', lambda: seen.append(variables['NVIDIA_TF32_OVERRIDE']))
    environment.start_paddle()
    assert seen == [chosen or '0']


def test_a_home_that_can_be_written_to_stays(variables, tmp_path):
    variables['HOME'] = str(tmp_path)
    ensure_home()
    assert variables['HOME'] == str(tmp_path)
    assert expand_user('~/data') == f'{tmp_path}/data'


@pytest.mark.parametrize('kind', ['file', 'below a file', 'missing', 'unusable cache'])
def test_another_home_is_taken(variables, tmp_path, kind):
    homes = {
        'file': '/dev/null',
        'below a file': '/dev/null/x',
        'missing': str(tmp_path / 'x'),
        'unusable cache': str(tmp_path),
    }
    (tmp_path / '.cache').touch()
    variables.update(HOME=homes[kind], LEANVIT_CACHE=str(tmp_path / 'cache'))
    ensure_home()
    assert variables['HOME'] == str(tmp_path / 'cache' / 'home')
    assert os.path.isdir(variables['HOME'])
    assert expand_user('~/data') == f'{homes[kind]}/data'  # what the user means
    assert expand_user('~') == homes[kind]
    ensure_home()  # as a process that is started by this one does
    assert expand_user('~/data') == f'{homes[kind]}/data'


def test_without_a_cache_the_home_is_temporary(variables, tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    for cache in ('', '/dev/null/cache'):
        variables.update(HOME='/dev/null', LEANVIT_CACHE=cache)
        ensure_home()
        assert variables['HOME'] == str(tmp_path / f'leanvit-home-{os.getuid()}')
