# SPDX-License-Identifier: Apache-2.0
"""The wait for other processes has an end, and says so."""

import subprocess
import sys

from tests.conftest import ROOT
from tests.runs.conftest import environment

PROGRAM = """
import time
from engine import distributed
distributed.JOIN_NOTICE = 0.1
with distributed._join_timeout('process 0 of 2', 0.2):
    time.sleep(0 if quick else 60)
print('joined')
"""


def waited(quick: bool) -> tuple[int, str, str]:
    command = [sys.executable, '-c', f'quick = {quick}\n{PROGRAM}']
    done = subprocess.run(
        command, cwd=ROOT, env=environment(PADDLE_MASTER='host:1'), capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, '\n'.join(line for line in done.stderr.splitlines() if 'process 0' in line)


def test_a_wait_for_processes_that_are_not_there_ends():
    status, out, err = waited(quick=False)
    assert (status, out) == (-15, '')
    assert err.startswith('note: process 0 of 2 waits for the other ranks at host:1') and 'error: process 0 of 2' in err
    assert waited(quick=True) == (0, 'joined\n', '')
