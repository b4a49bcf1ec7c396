# SPDX-License-Identifier: Apache-2.0
"""Of several processes that fail, stop or are killed, the job prints one sentence and has status 1 or 2."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT
from tests.runs.conftest import environment
from utils.environment import is_gpu_build

SCRIPT = os.path.join(ROOT, 'tests', 'engine', 'ranks.py')
pytestmark = pytest.mark.skipif(is_gpu_build(), reason='starts processes without GPUs')


def job(*actions: str, limit: float = 0.5) -> subprocess.Popen:
    pipe = subprocess.PIPE
    command = [sys.executable, SCRIPT, str(limit), *actions]
    return subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, text=True)


AGAIN = 'start the run again, -resume continues from its last save.'


@pytest.mark.parametrize(
    ('actions', 'status', 'error'),
    [
        (['note', 'note'], 0, 'a note of C++\na note of C++\n'),
        (['wait', 'stop'], 1, rf'error: process 1 \(process id \d+\) of 2 was stopped, as by SIGSTOP, and .*; {AGAIN}\n'),
        (['time_out', 'stop'], 1, rf'error: process 1 \(process id \d+\) of 2 was stopped, .*; {AGAIN}\n'),
        (['stop', 'wait', 'stop'], 1, r'error: processes 0 \(process id \d+\), 2 \(process id \d+\) of 3 were stopped, .*\n'),
        (['kill', 'wait'], 1, r'error: process 0 \(process id \d+\) of 2 was ended by SIGKILL; was it for lack of memory\? .*\n'),
        (['abort_later', 'kill'], 1, r'error: process 1 \(process id \d+\) of 2 was ended by SIGKILL; .*\n'),
        (['mistake', 'abort_later'], 2, r"error: there is no 'x'\.\n"),
        (['mistake', 'ignore'], 2, r"error: there is no 'x'\.\n"),
        (['mistake', 'mistake'], 2, r"error: there is no 'x'\.\n"),
        (['lose', 'mistake'], 2, r"error: there is no 'x'\.\n"),
        (['lose', 'ignore'], 1, r'error: process 0 lost the connection to another process, .*\n'),
        (['join', 'ignore'], 1, r'(.*\n)*error: process 0 of 2 waited 0\.3 s .*; process 1 .* did not answer\.\n'),
        (['time_out', 'ignore'], 1, r'error: process 1 \(process id \d+\) of 2 was busy elsewhere .* 30 s .*\n'),
        (['leave', 'wait'], 7, ''),
    ],
    ids=lambda value: '-'.join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_job_ends_with_one_sentence(actions, status, error):
    process = job(*actions)
    _, text = process.communicate(timeout=30)
    assert process.returncode == status, text
    assert text == error if status == 0 else re.fullmatch(error, text), text


def started(process: subprocess.Popen, count: int) -> list[psutil.Process]:
    """The ranks of a job, once all of them have printed their action."""
    for _ in range(count):
        process.stdout.readline()
    time.sleep(0.1)
    return [child for child in psutil.Process(process.pid).children() if 'PADDLE_TRAINER_ID' in child.environ()]


def test_no_process_outlives_a_killed_launcher():
    """A stopped rank receives no SIGTERM of the kernel; one that ignores it is killed after the grace time."""
    process = job('wait', 'stop', limit=0)
    family = started(process, 2) + psutil.Process(process.pid).children()
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert len(family) >= 4 and not alive
    process.communicate()


@pytest.mark.slow
def test_a_rank_that_ignores_its_launcher_s_death_is_killed():
    process = job('ignore', 'ignore', limit=0)
    family = started(process, 2)
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=45)
    assert len(family) == 2 and not alive
    process.communicate()


def test_a_stopped_rank_may_go_on():
    process = job('ignore', 'stop', limit=1.5)
    rank = started(process, 2)[1]
    for _ in range(3):  # each stop is shorter than the limit, all of them are longer
        time.sleep(0.7)
        rank.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        rank.send_signal(signal.SIGSTOP)
    assert process.poll() is None
    assert process.wait(timeout=15) == 1
    process.communicate()
