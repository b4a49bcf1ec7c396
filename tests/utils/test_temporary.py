# SPDX-License-Identifier: Apache-2.0
"""Temporary folders go, also those of killed processes; folders in use and those of others stay."""

import os
import subprocess
import sys
import tempfile
import time

from tests.conftest import ROOT
from utils.temporary import temporary_folder

PROGRAM = """
import os, sys, time
from utils.temporary import temporary_folder
with temporary_folder('x') as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_folders_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    children = [
        subprocess.Popen(
            [sys.executable, '-c', PROGRAM], cwd=ROOT, env={**os.environ, 'TMPDIR': str(tmp_path)}, stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    killed, used = (child.stdout.readline().strip() for child in children)
    others = [str(tmp_path / name) for name in ('leanvit-x', 'leanvit-x-mine', 'leanvit-y-abcdefgh')]
    for path in others:
        os.mkdir(path)
    children[0].kill()
    children[0].wait()
    before = time.time() - 3600
    for path in (killed, used, *others):
        os.utime(path, (before, before))
    with temporary_folder('x') as folder:
        assert sorted(os.listdir(tmp_path)) == sorted(map(os.path.basename, [folder, used, *others]))
    children[1].kill()
    for child in children:
        child.communicate()
    with temporary_folder('x'):  # its folder was changed a moment ago
        pass
    assert not os.path.exists(folder)
