# SPDX-License-Identifier: Apache-2.0
"""Several processes: equal numbers, ends that never hang, machines under Paddle's own launcher."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from tests.conftest import ROOT
from tests.runs.conftest import environment, finish, learnt, metrics, run, start, state, wait_for
from tests.tasks.helpers import read_csv


@pytest.fixture(scope='module')
def trained(tmp_path_factory, images):
    """(recipe, run folder) of one epoch."""
    from tests.runs.conftest import CONFIG

    folder = tmp_path_factory.mktemp('trained')
    recipe = folder / 'tiny.yaml'
    recipe.write_text(CONFIG.format(data=images, output=folder))
    run('main_single_gpu.py', f'-cfg={recipe}', '-tag=run', '-opts', 'TRAIN.NUM_EPOCHS', '1', 'TRAIN.BASE_LR', '0.1')
    return str(recipe), folder / 'run'


def test_every_image_counts_once_on_one_two_and_three_processes(trained, tmp_path):
    """13 images, whose number no other number of processes divides; top-5 of three classes."""
    recipe, folder = trained
    results, predictions = [], []
    for processes in (1, 2, 3):
        name = f'eval{processes}'
        flags = (
            f'-cfg={recipe}',
            f'-output={tmp_path}',
            '-eval',
            f'-pretrained={folder}',
            f'-tag={name}',
            '-batch_size=4',
            '-save_predictions',
        )
        out, _ = run('main_multi_gpu.py', *flags, NPROC=str(processes))
        assert 'Validation Acc@1: ' in out
        results.append(metrics(tmp_path / name)[-1])
        predictions.append(read_csv(tmp_path / name, 'predictions.csv'))
    for result in results:
        assert (result['kind'], result['images'], result['acc5']) == ('eval', 13, 1.0)
        assert result['acc1'] == results[0]['acc1']
        assert result['loss'] == pytest.approx(results[0]['loss'], rel=1e-6)
    for rows in predictions:
        assert [row['index'] for row in rows] == [str(number) for number in range(13)]
        for row, expected in zip(rows, predictions[0]):
            assert (row['image'], row['label'], row['class1']) == (
                expected['image'],
                expected['label'],
                expected['class1'],
            )
            assert float(row['probability1']) == pytest.approx(float(expected['probability1']), rel=1e-5)
    assert np.mean([row['label'] == row['class1'] for row in predictions[0]]) == pytest.approx(results[0]['acc1'])
    tables = [(tmp_path / f'eval{processes}' / 'classes.csv').read_text() for processes in (1, 2, 3)]
    assert tables[0].splitlines()[0] == 'class,name,acc1,precision,images,predicted,correct'
    assert tables[1] == tables[2] == tables[0]


def test_evaluation_touches_the_validation_images_only(trained, images, tmp_path):
    recipe, folder = trained
    shutil.copytree(os.path.join(images, 'val'), tmp_path / 'data' / 'val')
    flags = (f'-cfg={recipe}', f'-output={tmp_path}', f'-data_path={tmp_path / "data"}')
    out, _ = run('main_single_gpu.py', *flags, '-eval', f'-pretrained={folder}')
    assert 'Validation Acc@1' in out


def test_nan_on_one_process_ends_all_with_one_sentence(recipe, tmp_path):
    script = os.path.join('tests', 'runs', 'nan_on_last_rank.py')
    began = time.monotonic()
    out, err = run(script, f'-cfg={recipe}', '-tag=nan', NPROC='2', status=2)
    assert err.count('error: the loss or its gradient is not finite at step 2') == 1
    assert 'Traceback' not in err and time.monotonic() - began < 60
    assert state(tmp_path / 'out' / 'nan')['step'] == 1


def test_a_process_that_hangs_is_named_and_ends_the_job(recipe, tmp_path):
    script = os.path.join('tests', 'runs', 'hang_on_last_rank.py')
    out, err = run(script, f'-cfg={recipe}', '-tag=hang', NPROC='2', PADDLE_PG_TIMEOUT='12000', status=1)
    assert err.count('error: ') == 1
    assert 'error: no rank has made progress for 10.8 s: the others wait for rank 1; ' in err
    assert state(tmp_path / 'out' / 'hang')['step'] == 1


def test_a_process_that_hangs_on_another_machine_is_named_on_both(recipe, tmp_path):
    """Started one by one with the variables of Paddle's launcher, as on two machines."""
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(('127.0.0.1', 0))
        places = [f'127.0.0.1:{free.getsockname()[1]}' for free in (one, two)]
    script = os.path.join('tests', 'runs', 'hang_on_last_rank.py')
    shared = {
        'PADDLE_TRAINERS_NUM': '2', 'PADDLE_TRAINER_ENDPOINTS': ','.join(places), 'PADDLE_MASTER': places[0],
        'PADDLE_PG_TIMEOUT': '12000',
    }  # fmt: skip
    ranks = [
        start(
            script, f'-cfg={recipe}', '-tag=two', PADDLE_TRAINER_ID=str(rank), PADDLE_CURRENT_ENDPOINT=place, **shared
        )
        for rank, place in enumerate(places)
    ]
    for rank in ranks:
        status, _, err = finish(rank, timeout=90)
        assert status != 0 and 'error: no rank has made progress for 10.8 s: the others wait for rank 1; ' in err


def test_a_killed_process_ends_the_job_which_then_resumes(recipe, tmp_path):
    process = start('main_multi_gpu.py', f'-cfg={recipe}', '-tag=cut', NPROC='2')
    folder = tmp_path / 'out' / 'cut'
    wait_for(folder / 'log.txt', 'Epoch[002/003], Step[0001/', process)
    ranks = [
        child for child in psutil.Process(process.pid).children() if child.environ().get('PADDLE_TRAINER_ID') == '1'
    ]
    ranks[0].kill()
    began = time.monotonic()
    status, _, _ = finish(process, timeout=60)
    assert status not in (0, None)
    assert time.monotonic() - began < 30
    run('main_multi_gpu.py', f'-resume={folder}', NPROC='2')
    assert state(folder)['epoch'] == 3


def test_workers_end_with_their_launcher(recipe, tmp_path):
    process = start(
        'main_multi_gpu.py', f'-cfg={recipe}', '-tag=orphans', '-opts', 'TRAIN.NUM_EPOCHS', '500', NPROC='2'
    )
    wait_for(tmp_path / 'out' / 'orphans' / 'log.txt', 'Epoch[001/', process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert len(family) >= 2 and not alive


def test_two_machines_under_paddles_launcher(recipe, tmp_path):
    """Two launchers on loopback, one process each; the same numbers as two processes on one machine."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        master = f'127.0.0.1:{probe.getsockname()[1]}'
    nodes = []
    for rank in range(2):
        command = ['sh', os.path.join(ROOT, 'run_train_multi.sh'), '-tag=nodes']
        variables = environment(
            PYTHON=sys.executable, CFG=recipe, NNODES='2', NODE_RANK=str(rank), MASTER=master, NPROC='1',
            LAUNCH_LOG_DIR=str(tmp_path / f'launch{rank}'),
        )  # fmt: skip
        pipe = subprocess.PIPE
        nodes.append(subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True))
    for node in nodes:
        status, out, err = finish(node)
        assert status == 0, out[-2000:] + err[-2000:]
    run('main_multi_gpu.py', f'-cfg={recipe}', '-tag=local', NPROC='2')
    assert learnt(tmp_path / 'out' / 'nodes')['rows'] == learnt(tmp_path / 'out' / 'local')['rows']


def test_a_second_interrupt_ends_at_once(recipe, tmp_path):
    process = start('main_multi_gpu.py', f'-cfg={recipe}', '-tag=twice', '-opts', 'TRAIN.NUM_EPOCHS', '500', NPROC='2')
    wait_for(tmp_path / 'out' / 'twice' / 'log.txt', 'Epoch[001/', process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    status, _, _ = finish(process)
    assert status == 130 and time.monotonic() - began < 20
