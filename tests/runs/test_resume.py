# SPDX-License-Identifier: Apache-2.0
"""A run that was ended at any moment and resumed equals the run that was not, to the last bit."""

import os
import signal

import pytest

from tests.runs.conftest import assert_same, learnt, run, send, start, state, wait_for

SCRIPTS = {1: ('main_single_gpu.py', {}), 2: ('main_multi_gpu.py', {'NPROC': '2'})}


@pytest.fixture(scope='session', params=[1, 2], ids=['one process', 'two processes'])
def straight(request, tmp_path_factory, images):
    """(processes, recipe, what an uninterrupted run learns)."""
    from tests.runs.conftest import CONFIG

    folder = tmp_path_factory.mktemp(f'straight{request.param}')
    recipe = folder / 'tiny.yaml'
    recipe.write_text(CONFIG.format(data=images, output=folder))
    script, variables = SCRIPTS[request.param]
    run(script, f'-cfg={recipe}', '-tag=straight', **variables)
    return request.param, str(recipe), learnt(folder / 'straight')


@pytest.mark.parametrize(
    ('number', 'moment'),
    [
        (signal.SIGKILL, 'Epoch[002/003], Step[0003/'),
        (signal.SIGTERM, 'Epoch[001/003], Step[0001/'),
        (signal.SIGINT, 'Validation after Epoch: 2'),
    ],
    ids=['SIGKILL inside an epoch', 'SIGTERM inside an epoch', 'SIGINT in a validation'],
)
def test_interrupted_equals_straight(straight, tmp_path, number, moment):
    processes, recipe, expected = straight
    script, variables = SCRIPTS[processes]
    flags = (f'-cfg={recipe}', f'-output={tmp_path}', '-tag=cut')
    process = start(script, *flags, **variables)
    wait_for(tmp_path / 'cut' / 'log.txt', moment, process)
    status, out, err = send(process, number)
    assert status == (-number if number == signal.SIGKILL else 128 + number), out + err
    assert state(tmp_path / 'cut')['epoch'] < 3
    run(script, f'-cfg={recipe}', f'-output={tmp_path}', f'-resume={tmp_path / "cut"}', **variables)
    assert_same(learnt(tmp_path / 'cut'), expected)


def test_other_worker_counts_and_seeds(straight, tmp_path):
    """Loading processes change nothing; the seed changes everything."""
    processes, recipe, expected = straight
    script, variables = SCRIPTS[processes]
    run(script, f'-cfg={recipe}', f'-output={tmp_path}', '-tag=inline', '-num_workers=0', **variables)
    assert_same(learnt(tmp_path / 'inline'), expected)
    run(script, f'-cfg={recipe}', f'-output={tmp_path}', '-tag=other', '-opts', 'SEED', '1', **variables)
    assert learnt(tmp_path / 'other')['rows'] != expected['rows']


def test_resume_reads_the_configuration_of_the_run(recipe, tmp_path):
    run('main_single_gpu.py', f'-cfg={recipe}', '-tag=short', '-opts', 'TRAIN.NUM_EPOCHS', '1')
    folder = tmp_path / 'out' / 'short'
    run('main_single_gpu.py', f'-resume={folder}', '-opts', 'TRAIN.NUM_EPOCHS', '2')
    assert state(folder)['epoch'] == 2
    assert os.path.exists(folder / 'epoch_0002.pdparams')


def test_a_periodic_checkpoint_goes_on_in_a_folder_of_its_own(straight, tmp_path):
    processes, recipe, expected = straight
    script, variables = SCRIPTS[processes]
    file = os.path.join(
        os.path.dirname(recipe), 'straight', 'epoch_0002'
    )  # without .pdparams, as PaddleViT's users may
    run(script, f'-cfg={recipe}', f'-output={tmp_path}', f'-resume={file}', '-tag=branch', **variables)
    branch = learnt(tmp_path / 'branch')
    assert [row['epoch'] for row in branch['rows']] == [3, 3, 3]
    assert_same({**branch, 'rows': None}, {**expected, 'rows': None})
