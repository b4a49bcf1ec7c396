# SPDX-License-Identifier: Apache-2.0
"""A launcher, with trouble on the last process: `trouble.py main_multi_gpu.py hung_read [flags]`."""

import importlib
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from utils.cli import run


def hung_read():
    """The second batch is never read, as from a dead NFS server."""
    from datasets.dataset import FileStorage

    read, calls = FileStorage.read, []

    def hang(self, index):
        calls.append(index)
        return time.sleep(600) if len(calls) > 8 else read(self, index)

    FileStorage.read = hang


def full_log():
    """The log of the last process cannot be written after its first line."""
    from utils.runlog import RunLog

    local = RunLog.local

    def fail(self, message):
        if 'Step[0003' in message:
            self._files[f'log_{self.rank}.txt'] = open('/dev/full', 'w', buffering=1)  # noqa: SIM115
        local(self, message)

    RunLog.local = fail


def main():
    from engine.launch import is_worker

    launcher = importlib.import_module(sys.argv[1].removesuffix('.py'))
    ranks = int(os.environ.get('PADDLE_TRAINERS_NUM', 1))
    if launcher.__name__ == 'main_single_gpu' or is_worker() and int(os.environ['PADDLE_TRAINER_ID']) == ranks - 1:
        globals()[sys.argv[2]]()
    del sys.argv[1:3]
    return launcher.main()


if __name__ == '__main__':
    run(main)
