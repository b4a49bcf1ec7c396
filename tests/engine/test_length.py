# SPDX-License-Identifier: Apache-2.0
"""Runs that are counted in iterations: where they validate and end, inside epochs too."""

import numpy as np
import pytest

from config import get_config
from engine.checkpoint import read_checkpoint
from engine.length import RunLength
from tests.engine.test_train import make_trainer, weights
from tests.tasks.helpers import rows
from utils.errors import UserError

# 75 images in batches of 8: ten steps an epoch.
ITERATIONS = {
    'TRAIN__NUM_ITERS': 24,
    'VALIDATE_ITERS': 7,
    'TRAIN__LR_SCHEDULER__NAME': 'poly',
    'TRAIN__WARMUP_ITERS': 5,
}


def stops(length):
    found = [0]
    while found[-1] < length.num_steps:
        found.append(length.next_stop(found[-1]))
    return found[1:]


def test_stops_of_a_run():
    by_epochs = RunLength.from_config(get_config(opts=['TRAIN.NUM_EPOCHS', 5, 'VALIDATE_FREQ', 2]), 10)
    assert stops(by_epochs) == [10, 20, 30, 40, 50]
    assert [step for step in stops(by_epochs) if by_epochs.validation_due(step)] == [20, 40, 50]
    by_steps = RunLength.from_config(get_config(opts=['TRAIN.NUM_ITERS', 24, 'VALIDATE_ITERS', 7]), 10)
    assert stops(by_steps) == [7, 10, 14, 20, 21, 24]
    assert [step for step in stops(by_steps) if by_steps.validation_due(step)] == [7, 14, 21, 24]
    assert (by_epochs.num_epochs, by_steps.num_epochs) == (5, 3)


def test_validation_inside_epochs_changes_no_step(tmp_path, images):
    """The weights and losses are those of a run that validates elsewhere."""
    often = make_trainer(str(tmp_path / 'often'), images, **ITERATIONS)
    seldom = make_trainer(str(tmp_path / 'seldom'), images, **{**ITERATIONS, 'VALIDATE_ITERS': 24})
    often.fit()
    seldom.fit()
    assert [(row['epoch'], row['step']) for row in rows(often, 'val')] == [(1, 7), (2, 14), (3, 21), (3, 24)]
    assert [(row['epoch'], row['step']) for row in rows(seldom, 'val')] == [(3, 24)]
    assert [(row['epoch'], row['step'], row['images']) for row in rows(often, 'train')] == [
        (1, 10, 75), (2, 20, 75), (3, 24, 32),
    ]  # fmt: skip
    assert [row['loss'] for row in rows(often, 'train')] == [row['loss'] for row in rows(seldom, 'train')]
    for name, value in weights(often).items():
        np.testing.assert_array_equal(weights(seldom)[name], value)


@pytest.mark.parametrize('stopped', ['before a validation', 'in a validation'])
def test_resuming_inside_an_epoch(tmp_path, images, monkeypatch, stopped):
    straight = make_trainer(str(tmp_path / 'straight'), images, **ITERATIONS)
    straight.fit()
    cut = make_trainer(str(tmp_path / 'cut'), images, **{**ITERATIONS, 'SAVE_STEPS': 1})
    if stopped == 'in a validation':
        failing = iter([False, True])
        validate = cut._validate
        monkeypatch.setattr(cut, '_validate', lambda: 1 / 0 if next(failing) else validate())
        with pytest.raises(ZeroDivisionError):
            cut.fit()
    else:
        monkeypatch.setattr(type(cut.stop), '__bool__', lambda stop: cut.state.step == 12)
        with pytest.raises(SystemExit):
            cut.fit()
        monkeypatch.undo()
    again = make_trainer(str(tmp_path / 'cut'), images, **ITERATIONS)
    path, content = read_checkpoint(again.folder, print)
    again.snapshot.load_state_dict(content, path)
    assert again.state.samples > 0
    again.fit()
    for name, value in weights(straight).items():
        np.testing.assert_array_equal(weights(again)[name], value)
    timing = ('seconds', 'images_per_second')
    for kind in ('train', 'val'):
        left, right = (
            [{key: value for key, value in row.items() if key not in timing} for row in rows(run, kind)]
            for run in (straight, again)
        )
        assert left == right
    assert again.state.best_epoch == straight.state.best_epoch
    again.fit()  # nothing is left


def test_settings_that_follow_epochs(tmp_path, images):
    with pytest.raises(UserError, match=r'TRAIN\.NUM_ITERS is set, but keep_rate .* TRAIN\.NUM_EPOCHS'):
        make_trainer(
            str(tmp_path / 'run'), images, **ITERATIONS, MODEL__TYPE='vit', MODEL__EVIT__KEEP_RATE=0.5,
            MODEL__TRANS__DEPTH=1, MODEL__EVIT__DROP_LOC=(0,), MODEL__TRANS__EMBED_DIM=16, MODEL__TRANS__NUM_HEADS=2,
            MODEL__TRANS__PATCH_SIZE=4, MODEL__MIXER__PATCH_SIZE=16, MODEL__MIXER__EMBED_DIM=768,
            MODEL__MIXER__DEPTH=12, MODEL__MIXER__MLP_RATIO=6.0,
        )  # fmt: skip
