# SPDX-License-Identifier: Apache-2.0
"""main_multi_gpu.py, with a loss that turns NaN on the last process only."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import main_multi_gpu
from engine.launch import is_worker
from utils.cli import run


def poison():
    from tasks.classification import ClassificationTask

    calls = []
    compute = ClassificationTask.loss

    def poisoned(self, *args):
        losses = compute(self, *args)
        calls.append(1)
        return losses._replace(total=losses.total * float('nan')) if len(calls) == 3 else losses

    if os.environ['PADDLE_TRAINER_ID'] == '1':
        ClassificationTask.loss = poisoned


if __name__ == '__main__':
    if is_worker():
        poison()
    main_multi_gpu.__file__ = __file__  # the launcher starts this script again
    run(main_multi_gpu.main)
