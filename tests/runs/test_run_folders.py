# SPDX-License-Identifier: Apache-2.0
"""What runs do to folders: their own, those of failed runs, and `latest`."""

import os
import signal

import pytest

from config import get_arguments, get_config, update_config
from engine.run import run_config
from tests.runs.conftest import CONFIG, finish, metrics, start, state, wait_for
from tests.utils.test_run_paths import NO_LINKS, refuse
from utils.errors import UserError

ONE_EPOCH = ['-num_workers=0', '-opts', 'TRAIN.NUM_EPOCHS', '1', 'TRAIN.WARMUP_EPOCHS', '0']


def train(*flags):
    """Runs a launcher's work in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run_config(update_config(get_config(), get_arguments(list(flags))))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def content(folder):
    """Every file below a folder."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, 'rb') as file:
                found[path] = os.stat(path).st_ino, file.read()
    return found


@pytest.fixture(scope='module')
def trained(tmp_path_factory, images):
    """(recipe, folder of a run of one epoch)."""
    folder = tmp_path_factory.mktemp('runs')
    recipe = folder / 'tiny.yaml'
    recipe.write_text(CONFIG.format(data=images, output=folder / 'out'))
    train(f'-cfg={recipe}', '-tag=a', *ONE_EPOCH)
    return str(recipe), folder / 'out' / 'a'


@pytest.mark.parametrize('chosen', ['resume', 'tag'])
@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (['TRAIN.OPTIMIZER.NAME', 'adam'], "'adam'"),
        (['TRAIN.OPTIMIZER.NAME', 'SGD'], 'moment1'),
        (['MODEL.MIXER.EMBED_DIM', '32'], 'patch_embed'),
        (['MODEL.MIXER.DEPTH', '3'], 'mixer_layers|layers'),
        (['TRAIN.TASK', 'mae'], 'mae'),
        (['DATA.DATA_PATH', '/nowhere'], '/nowhere'),
        (['DATA.VIEWS', '2'], 'DATA.VIEWS'),
        (['MODEL.NUM_CLASSES', '2'], 'NUM_CLASSES'),
        (['TRAIN.LR_SCHEDULER.NAME', 'cosine'], "'cosine'"),
    ],
)
def test_a_run_that_does_not_fit_changes_nothing(trained, chosen, change, words):
    recipe, folder = trained
    flags = {'resume': [f'-resume={folder}'], 'tag': [f'-cfg={recipe}', '-tag=a']}[chosen]
    before = content(folder.parent)
    with pytest.raises(UserError, match=words):
        train(*flags, *ONE_EPOCH, *change)
    assert content(folder.parent) == before
    assert os.readlink(folder.parent / 'latest') == 'a'


@pytest.mark.parametrize('opts', [['MODEL.MIXER.EMBED_DIM', '32'], ['TRAIN.TASK', 'mae']])
def test_an_evaluation_that_does_not_fit_changes_nothing(trained, opts):
    recipe, folder = trained
    before = content(folder.parent)
    with pytest.raises(UserError):
        train(f'-cfg={recipe}', '-tag=a', '-eval', f'-pretrained={folder}', *ONE_EPOCH, *opts)
    assert content(folder.parent) == before


def test_resuming_latest(recipe, tmp_path):
    """The link leads to the run before and after, also as a file of the run it led to."""
    out = tmp_path / 'out'
    train(f'-cfg={recipe}', '-tag=exp/y', *ONE_EPOCH)
    train(f'-resume={out}/latest/', '-num_workers=0', '-opts', 'TRAIN.NUM_EPOCHS', '2')
    assert os.readlink(out / 'latest') == 'exp/y'
    assert state(out / 'exp' / 'y')['epoch'] == 2
    file = f'{out}/latest/epoch_0001'
    train(f'-cfg={recipe}', '-tag=branch', f'-resume={file}', *ONE_EPOCH, 'TRAIN.NUM_EPOCHS', '2')
    assert f'from {out}/exp/y/epoch_0001.pdparams' in (out / 'branch' / 'log.txt').read_text()
    train(f'-cfg={recipe}', '-tag=tuned', f'-pretrained={out}/latest', *ONE_EPOCH)
    assert f'Load model state from {out}/branch/best.pdparams' in (out / 'tuned' / 'log.txt').read_text()
    assert f'{out}/branch' == get_config(f'{out}/latest/config.yaml').MODEL.PRETRAINED
    assert os.readlink(out / 'latest') == 'tuned'


@pytest.mark.parametrize('error', NO_LINKS, ids=['EPERM', 'ENOTSUP', 'EOPNOTSUPP', 'NotImplementedError'])
def test_file_systems_without_links(recipe, tmp_path, monkeypatch, error):
    for name in ('link', 'symlink'):
        monkeypatch.setattr(os, name, refuse(error))
    out = tmp_path / 'out'
    train(f'-cfg={recipe}', '-tag=a', *ONE_EPOCH)
    assert (out / 'latest').read_text() == 'a\n'
    assert (out / 'a' / 'epoch_0001.pdparams').read_bytes() == (out / 'a' / 'last.pdparams').read_bytes()
    train(f'-resume={out}/latest', '-num_workers=0', '-opts', 'TRAIN.NUM_EPOCHS', '2')
    train(f'-pretrained={out}/latest', '-eval', '-tag=e', '-num_workers=0')
    assert [row['epoch'] for row in metrics(out / 'a') if row['kind'] == 'train'] == [1, 2]
    assert metrics(out / 'e')[0]['acc1'] == max(r['acc1'] for r in metrics(out / 'a') if r['kind'].startswith('val'))
    assert not [name for name in os.listdir(out / 'a') + os.listdir(out) if name.startswith('.')]


def test_runs_at_the_same_time(recipe, tmp_path):
    """Without a tag each has a folder of its own; with one tag the second run ends with one sentence."""
    out = tmp_path / 'out'
    first = start('main_multi_gpu.py', f'-cfg={recipe}', '-tag=a', '-opts', 'TRAIN.NUM_EPOCHS', '500', NPROC='2')
    wait_for(out / 'a' / 'log.txt', 'Epoch[001/', first)
    others = [start('main_single_gpu.py', f'-cfg={recipe}', *ONE_EPOCH) for _ in range(2)]
    with pytest.raises(UserError, match=r"another run \(process \d+ on .*\) writes to '.*out/a'"):
        train(f'-resume={out}/a', *ONE_EPOCH)
    for process in others:
        status, printed, errors = finish(process)
        assert status == 0, printed + errors
    first.send_signal(signal.SIGTERM)
    assert finish(first)[0] == 143
    folders = [name for name in os.listdir(out) if name.startswith('train-')]
    assert len(folders) == 2 and os.readlink(out / 'latest') in folders
    assert all(state(out / name)['epoch'] == 1 for name in folders)
    assert os.path.exists(out / 'a' / 'last.pdparams') and not os.path.exists(out / 'a' / '.lock')
