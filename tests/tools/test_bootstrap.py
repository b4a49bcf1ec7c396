# SPDX-License-Identifier: Apache-2.0
"""How commands start: from any folder, through links, without packages, interrupted."""

from __future__ import annotations

import glob
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.runs.conftest import environment

SCRIPTS = sorted(glob.glob(f'{ROOT}/tools/[a-z]*.py') + glob.glob(f'{ROOT}/main_*.py'))


def start(*command, **options) -> tuple[int, str, str]:
    variables = environment(**options.pop('variables', {}))
    done = subprocess.run(
        [sys.executable, *command], env=variables, capture_output=True, text=True, timeout=60, **options
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('script', SCRIPTS, ids=os.path.basename)
def test_without_packages_one_sentence_names_the_first(script):
    status, out, err = start('-S', script, cwd='/')
    assert (status, out, err.count('\n')) == (2, '', 1)
    assert err.startswith("error: the Python package '") and 'make train' in err


@pytest.mark.parametrize('module', ['models', 'config'])
def test_modules_without_packages(module):
    status, _, err = start('-S', '-m', module, cwd=ROOT)
    assert (status, err.count('\n')) == (2, 1) and "error: the Python package '" in err


def test_pip_install_is_refused():
    """pyproject.toml: installed modules would not run, so that pip says what to do instead."""
    command = ('-m', 'pip', 'install', '--no-index', '--no-build-isolation', '--disable-pip-version-check', ROOT)
    status, out, err = start(*command, cwd='/')
    assert status and 'runs from its folder and cannot be installed: run `make train`' in out + err


def test_a_linked_tool_runs_anywhere(tmp_path):
    link = tmp_path / 'lists'
    link.symlink_to(os.path.join(ROOT, 'tools', 'make_lists.py'))
    status, out, err = start(str(link), '-h', cwd='/')
    assert (status, err) == (0, '') and 'usage: lists' in out
    assert start('-m', 'tools.make_lists', '-h', cwd=ROOT)[0] == 0


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ('package', 'command'),
    [
        ('yacs', [os.path.join(ROOT, 'main_single_gpu.py')]),
        ('yacs', [os.path.join(ROOT, 'main_multi_gpu.py')]),
        ('paddle', [os.path.join(ROOT, 'tools', 'predict.py')]),
        ('paddle', ['-m', 'models']),
        ('yacs', ['-m', 'config']),
    ],
)
def test_a_signal_while_packages_are_imported_is_silent(tmp_path, number, package, command):
    (tmp_path / f'{package}.py').write_text(f'import os\nos.kill(os.getpid(), {int(number)})\n')
    variables = {'PYTHONPATH': str(tmp_path)}
    assert start(*command, cwd=ROOT, variables=variables) == (128 + number, '', '')


# ---------------------------------------------------------------------------------------------------- shell scripts
@pytest.mark.parametrize('shell', ['sh', 'bash'])
def test_scripts_run_through_links_from_any_folder_and_keep_paths(tmp_path, shell):
    """PYTHON=echo prints the command that would run."""
    folder = tmp_path / 'a b'
    folder.mkdir()
    (folder / 'near').symlink_to(os.path.relpath(os.path.join(ROOT, 'run_train_multi.sh'), folder))
    (tmp_path / 'far').symlink_to('a b/near')
    variables = {'CFG': "-my 'own'.yaml", 'DATA_PATH': './a  b'}
    expected = f"{ROOT}/main_multi_gpu.py -cfg=-my 'own'.yaml -data_path=./a  b -output=./x\n"
    for cwd, script in ((tmp_path, './far'), ('/', str(tmp_path / 'far')), (folder, '../far')):
        assert scripted(shell, script, '-output=./x', cwd=cwd, **variables) == (0, expected, '')
    assert scripted(os.path.join(ROOT, 'run_train_multi.sh'), cwd=folder)[1].endswith(
        f'{ROOT}/main_multi_gpu.py -cfg={ROOT}/configs/gmlp_digits.yaml\n'
    )


def test_the_evaluation_script_says_where_it_looked(tmp_path):
    script = os.path.join(ROOT, 'run_eval_multi.sh')
    status, out, err = scripted('sh', script, cwd=tmp_path)
    assert (status, out) == (2, '') and f'nothing was trained yet in {tmp_path}/output/latest' in err
    assert scripted('sh', script, '-resume=r', cwd=tmp_path)[1] == f'{ROOT}/main_multi_gpu.py -eval -resume=r\n'
    (tmp_path / 'output' / 'latest').mkdir(parents=True)
    (tmp_path / 'output' / 'latest' / 'config.yaml').touch()
    last = scripted('sh', script, cwd=tmp_path)[1].splitlines()[-1]
    assert last.endswith('-eval -pretrained=output/latest')


def scripted(*command, cwd, **variables) -> tuple[int, str, str]:
    done = subprocess.run(
        command, cwd=cwd, env=environment(PYTHON='echo', CDPATH='/', **variables), capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr
