# SPDX-License-Identifier: Apache-2.0
"""Sums that are read two steps late, as on a GPU: nothing is saved and no run is left with unread sums."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from tests.engine.gpu import gpu  # noqa: F401
from tests.engine.test_precision import trainer  # noqa: F401
from tests.engine.test_train import Poisoned, weights
from tests.tasks.helpers import ALONE, rows
from utils.errors import UserError
from utils.formats import read_file

QUIET = {'REPORT_FREQ': 1000}  # a report reads all sums


def stop_in(run, step: int) -> None:
    """Let a signal arrive in optimizer step `step`."""
    take, taken = run._step, []

    def stopped(*args):
        taken.append(1)
        if len(taken) == step:
            run.stop.number = signal.SIGTERM
        return take(*args)

    run._step = stopped


def last_of(run) -> dict:
    return read_file(os.path.join(run.folder, 'last.pdparams'))


def test_the_gpu_reads_late(trainer):  # noqa: F811
    assert (trainer().lag, trainer(context=ALONE).lag, trainer(TRAIN__NONFINITE='skip').lag) == (2, 0, 0)


@pytest.mark.parametrize('at', [3, 4, 5], ids='NaN in step {}'.format)
@pytest.mark.parametrize('reason', ['signal', 'SAVE_STEPS', 'end of the epoch'])
def test_a_save_never_holds_nan(trainer, reason, at):  # noqa: F811
    """A NaN in the step of a save or in the two steps before it ends the run, and the file of the last good save stays."""
    run = trainer(**QUIET, SAVE_STEPS=5 if reason == 'SAVE_STEPS' else 0)
    run._save()
    run.task = Poisoned(run.config, 'nan', at)
    if reason == 'signal':
        stop_in(run, 3)
    if reason == 'end of the epoch':
        run.task.left += 5
        at += 5
    with pytest.raises(UserError, match=rf'not finite at step {at} \(epoch 1, '):
        run.fit()
    saved = last_of(run)
    assert saved['step'] == 0
    assert all(np.isfinite(array).all() for array in saved['model'].values())


def test_a_stopped_run_has_the_totals_of_all_its_steps(trainer):  # noqa: F811
    late, straight = trainer(**QUIET), trainer(**QUIET, context=ALONE)
    stop_in(late, 4)
    with pytest.raises(SystemExit):
        late.fit()
    saved = last_of(late)
    assert saved['step'] == 6  # the signal of step 4 is read two steps later
    assert saved['progress']['totals']['images'] == saved['sampler']['samples'] == 48
    resumed = trainer(**QUIET)
    resumed.snapshot.load_state_dict(saved, 'last.pdparams')
    resumed.fit()
    straight.fit()
    for name, value in weights(straight).items():
        np.testing.assert_array_equal(weights(resumed)[name], value)
    assert rows(resumed, 'train')[0]['loss'] == pytest.approx(rows(straight, 'train')[0]['loss'], rel=1e-6)
