# SPDX-License-Identifier: Apache-2.0
"""Reads that hang, output that cannot be written, files that are cut off: one sentence, status 2, and a saved run."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.runs.conftest import environment, finish, metrics, run, start, state, wait_for

TROUBLE = os.path.join('tests', 'runs', 'trouble.py')
LAUNCHERS = ['main_single_gpu.py', 'main_multi_gpu.py']
AT_ONCE = ('-opts', 'DATA.NUM_WORKERS', '0', 'DATA.TIMEOUT', '1')


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_a_read_that_never_returns_without_workers(recipe, launcher):
    _, err = run(TROUBLE, launcher, 'hung_read', f'-cfg={recipe}', *AT_ONCE, status=2, NPROC='2')
    assert re.fullmatch(r'error: no batch came from the storage within DATA.TIMEOUT = 1 seconds \(image .*\n', err), err


def test_a_log_of_any_process_that_cannot_be_written_saves_the_run(recipe, tmp_path):
    """All processes stop at the same step, whose state is saved."""
    flags = (f'-cfg={recipe}', '-tag=log', '-opts', 'SAVE_STEPS', '0')
    _, err = run(TROUBLE, 'main_multi_gpu.py', 'full_log', *flags, status=2, NPROC='2')
    assert re.fullmatch(r"error: cannot write '/dev/full': No space left on device; .*\n", err), err
    assert state(tmp_path / 'out' / 'log')['step'] == 3  # of 3 per epoch: the step after the error
    run('main_multi_gpu.py', *flags, NPROC='2')
    assert [row['epoch'] for row in metrics(tmp_path / 'out' / 'log') if row['kind'] == 'train'] == [1, 2, 3]


def shell(command: str, **variables) -> tuple[int, str, str]:
    process = subprocess.Popen(
        command, shell=True, cwd=ROOT, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    return finish(process)


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_standard_output_on_a_full_disk_saves_the_run(recipe, launcher, tmp_path):
    status, _, err = shell(f'"{sys.executable}" {launcher} -cfg="{recipe}" -tag=full >/dev/full', NPROC='2')
    assert (status, err.count('\n')) == (2, 1) and "error: cannot write 'standard output': No space left" in err
    assert state(tmp_path / 'out' / 'full')['step'] == 1


def test_a_closed_pipe_does_not_end_the_training(recipe, tmp_path):
    flags = f'-cfg="{recipe}" -tag=pipe -opts TRAIN.NUM_EPOCHS 2'
    status, out, err = shell(
        f'{{ "{sys.executable}" main_multi_gpu.py {flags}; echo "status $?" >&2; }} | head -1', NPROC='2'
    )
    assert out.count('\n') == 1 and err == 'status 0\n'
    text = (tmp_path / 'out' / 'pipe' / 'log.txt').read_text()
    assert text.count('Standard output is closed; the log goes on in its files only.') == 1
    assert '----- Finished: ' in text


@pytest.mark.slow
def test_a_stopped_process_is_named_within_the_limit(recipe, tmp_path):
    import signal

    import psutil

    flags = (f'-cfg={recipe}', '-tag=stop', '-opts', 'TRAIN.NUM_EPOCHS', '500', 'PEER_TIMEOUT', '3')
    process = start('main_multi_gpu.py', *flags, NPROC='2')
    wait_for(tmp_path / 'out' / 'stop' / 'log.txt', 'Epoch[002/', process)
    ranks = [child for child in psutil.Process(process.pid).children() if 'PADDLE_TRAINER_ID' in child.environ()]
    (rank,) = (rank for rank in ranks if rank.environ()['PADDLE_TRAINER_ID'] == '0')
    rank.send_signal(signal.SIGSTOP)
    status, _, err = finish(process, timeout=30)
    assert status == 1 and re.fullmatch(
        r'error: process 0 \(process id \d+\) of 2 was stopped, as by SIGSTOP, .*\n', err
    )
    assert not psutil.wait_procs(ranks, timeout=5)[1]
