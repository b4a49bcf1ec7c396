# SPDX-License-Identifier: Apache-2.0
"""Which folder a run gets, where `latest` is, and that one run at a time has it."""

import os
import time
from pathlib import Path

import pytest

from config import get_config
from engine.distributed import Context
from engine.run_folder import RunFolder, lock_folder, open_folder
from tests.utils.test_locks import held
from utils.errors import UserError
from utils.runlog import RunLog

ALONE = Context(0, 1, False)


def configured(*opts):
    config = get_config(None, [str(value) for value in opts])
    config.defrost()
    return config


def opened(*opts):
    """The folder that a run has written into."""
    config = configured(*opts)
    with lock_folder(config, ALONE) as folder:
        log = RunLog(None, 0)
        log.master('early')
        open_folder(folder, config, ALONE, log)
        log.close()
    assert 'MASTER_LOG early' in Path(folder.path, 'log.txt').read_text()
    assert not os.path.exists(os.path.join(folder.path, '.lock'))
    return folder


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder of runs; the working directory is its parent."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'out'


def test_runs_of_one_moment_have_folders_of_their_own(out, monkeypatch):
    monkeypatch.setattr(time, 'strftime', lambda form: form)
    stamp = 'train-%Y%m%d-%H%M%S'
    with lock_folder(configured('SAVE', out), ALONE) as first, lock_folder(configured('SAVE', out), ALONE) as second:
        assert (first.name, second.name) == (stamp, f'{stamp}-2')
    assert not os.listdir(out)  # nothing was written into either


def test_a_name_that_is_taken_meanwhile(out, monkeypatch):
    """Another run takes the name between any look and the lock."""
    mkdir, taken = os.mkdir, []

    def late(path, *mode):
        if os.path.basename(path).startswith('train-') and not taken:
            taken.append(path)
            mkdir(path)
        mkdir(path, *mode)

    monkeypatch.setattr(os, 'mkdir', late)
    with lock_folder(configured('SAVE', out), ALONE) as folder:
        assert folder.path == f'{taken[0]}-2'


@pytest.mark.parametrize('tag', ['a', 'exp/y', './exp//z/'])
def test_latest_is_in_the_folder_of_all_runs(out, tag):
    folder = opened('SAVE', out, 'TAG', tag)
    assert folder.path == str(out / os.path.normpath(tag))
    assert os.readlink(out / 'latest') == os.path.normpath(tag)
    assert opened('SAVE', out, 'MODEL.RESUME', f'{out}/latest/') == folder
    assert os.path.samefile(out / 'latest', folder.path)


def test_the_folder_of_all_runs_may_be_a_link(out, tmp_path):
    (tmp_path / 'disk' / 'deep').mkdir(parents=True)
    os.symlink(tmp_path / 'disk' / 'deep', out)
    folder = opened('SAVE', 'out', 'TAG', 'a')
    assert opened('SAVE', 'out', 'MODEL.RESUME', 'out/latest') == folder == RunFolder('out', 'a')
    assert opened('SAVE', 'elsewhere', 'MODEL.RESUME', out / 'latest') == folder
    assert os.readlink(out / 'latest') == 'a'


def test_a_run_that_is_a_link_to_another_disk(out, tmp_path):
    (tmp_path / 'disk' / 'a').mkdir(parents=True)
    out.mkdir()
    os.symlink(tmp_path / 'disk' / 'a', out / 'a')
    assert (
        opened('SAVE', 'out', 'TAG', 'a')
        == opened('SAVE', 'out', 'MODEL.RESUME', 'out/latest')
        == RunFolder('out', 'a')
    )
    assert os.listdir(tmp_path / 'disk') == ['a']


def test_a_tag_that_is_a_link_to_latest(out):
    opened('SAVE', 'out', 'TAG', 'a')
    os.symlink('latest', out / 'x')
    assert opened('SAVE', 'out', 'TAG', 'x') == RunFolder('out', 'a')
    assert opened('SAVE', 'out', 'MODEL.RESUME', 'out/x') == RunFolder('out', 'a')
    assert os.readlink(out / 'latest') == 'a'


def test_latest_of_a_run_that_lives_elsewhere(out, tmp_path):
    """It belongs to the SAVE of that run; to its parent where the run was moved."""
    opened('SAVE', out, 'TAG', 'exp/y')
    opened('SAVE', out, 'TAG', 'b')
    folder = opened('SAVE', 'other', 'MODEL.RESUME', 'out/exp/y')
    assert folder == RunFolder(str(out), 'exp/y')
    assert os.readlink(out / 'latest') == 'exp/y'
    assert str(out) == get_config(f'{folder.path}/config.yaml').SAVE
    os.rename(out / 'exp', tmp_path / 'moved')
    assert opened('SAVE', 'other', 'MODEL.RESUME', 'moved/y') == RunFolder(str(tmp_path / 'moved'), 'y')
    assert os.readlink(tmp_path / 'moved' / 'latest') == 'y'
    assert not (tmp_path / 'other').exists()


def test_a_run_that_fails_leaves_nothing_new(out):
    for opts in (['TAG', 'exp/y'], [], ['EVAL', True], ['MODEL.RESUME', out / 'gone']):
        with pytest.raises(RuntimeError), lock_folder(configured('SAVE', out, *opts), ALONE) as folder:
            assert os.listdir(folder.path) == ['.lock']
            raise RuntimeError
        assert not os.path.exists(folder.path)


@pytest.mark.parametrize('opts', [['TAG', 'a'], ['MODEL.RESUME', 'out/a'], ['TAG', 'a', 'EVAL', True]])
def test_one_run_at_a_time(out, opts):
    (out / 'a').mkdir(parents=True)
    with held(out / 'a' / '.lock') as process, pytest.raises(UserError) as caught:
        opened('SAVE', 'out', *opts)
    assert f'another run (process {process.pid} on ' in str(caught.value) and "writes to 'out/a'" in str(caught.value)
    assert not os.listdir(out / 'a')


def test_an_evaluation_does_not_replace_the_configuration_of_a_training(out):
    opened('SAVE', 'out', 'TAG', 'a', 'SEED', 1)
    (out / 'a' / 'last.pdparams').write_bytes(b'')
    opened('SAVE', 'out', 'TAG', 'a', 'SEED', 2, 'EVAL', True)
    assert get_config('out/a/config.yaml').SEED == 1


def test_latest_that_cannot_be_written_does_not_end_the_run(out, monkeypatch, capsys):
    def refuse(root, name):
        raise UserError("cannot write 'latest'")

    monkeypatch.setattr('engine.run_folder.point_latest', refuse)
    opened('SAVE', 'out', 'TAG', 'a')
    assert capsys.readouterr().out.count("cannot write 'latest'") == 1


@pytest.mark.parametrize('blocked', ['out', 'out/a', 'out/a/log.txt', 'out/a/.lock'])
def test_what_blocks_the_folder_is_one_sentence(out, blocked):
    if blocked.count('/') < 2:
        os.makedirs(os.path.dirname(blocked) or '.', exist_ok=True)
        Path(blocked).touch()
    else:
        os.makedirs(blocked)
    with pytest.raises(UserError, match="cannot write (the run folder )?'out/a"):
        opened('SAVE', 'out', 'TAG', 'a')
    assert not os.path.exists('out/a/config.yaml')
