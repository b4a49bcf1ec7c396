# SPDX-License-Identifier: Apache-2.0
"""main_multi_gpu.py, whose last process hangs in its third loss while the other waits for its gradients."""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import main_multi_gpu
from engine.launch import is_worker
from utils.cli import run


def hang():
    from tasks.classification import ClassificationTask

    calls = []
    compute = ClassificationTask.loss

    def hanging(self, *args):
        calls.append(1)
        if len(calls) == 3:
            time.sleep(600)
        return compute(self, *args)

    if os.environ['PADDLE_TRAINER_ID'] == '1':
        ClassificationTask.loss = hanging


if __name__ == '__main__':
    if is_worker():
        hang()
    main_multi_gpu.__file__ = __file__  # the launcher starts this script again
    run(main_multi_gpu.main)
