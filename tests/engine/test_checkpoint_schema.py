# SPDX-License-Identifier: Apache-2.0
"""Every part of a checkpoint is checked before any is used; errors name file, part and what was found."""

from __future__ import annotations

import copy

import numpy as np
import paddle
import pytest

from engine.checkpoint import read_checkpoint
from engine.checkpoint_schema import validate_checkpoint
from engine.paddle_private import accumulator_names
from tests.conftest import HERE
from utils.errors import UserError

WEIGHTS = {'weight': np.ones((2, 3), 'float32'), 'bias': np.zeros(3, 'float32')}
CONTENT = {
    'model': WEIGHTS,
    'model_ema': {name: array + 1 for name, array in WEIGHTS.items()},
    'optimizer': {'moment1': dict(WEIGHTS), 'beta1_pow_acc': {'weight': np.ones(1, 'float32')}},
    'lr_scheduler': {'last_lr': 0.1},
    'amp_grad_scaler': {},
    'epoch': 3,
    'step': 30,
    'sampler': {'samples': 0},
    'progress': {'validated': True, 'best_score': float('-inf'), 'best_epoch': 0, 'totals': [0.0] * 6},
    'rng': {'seed': 0},
    'config': 'MODEL:\n',
}
PADDLEVIT = {
    'model': WEIGHTS,
    'optimizer': {'linear_0.w_0_moment1_0': np.ones((2, 3), 'float32'), 'LR_Scheduler': {}},
    'epoch': 7,
}


def changed(**parts) -> dict:
    return {**copy.deepcopy(CONTENT), **parts}


def progress(**fields) -> dict:
    return {'progress': {**CONTENT['progress'], **fields}}


def wrapped(state: dict, prefix: str) -> dict:
    return {prefix + name: array for name, array in state.items()}


def test_what_is_read():
    found = validate_checkpoint(CONTENT, 'x')
    assert (found.epoch, found.step, found.samples, found.seed) == (3, 30, 0, 0)
    assert found.complete and found.ours and found.progress == CONTENT['progress']
    assert found.weights['weight'] is WEIGHTS['weight']  # not even a copy
    theirs = validate_checkpoint(PADDLEVIT, 'x')
    assert theirs.complete and not theirs.ours and theirs.epoch == 7 and theirs.average is None
    flat = validate_checkpoint(WEIGHTS, 'x')
    assert not flat.complete and flat.weights.keys() == WEIGHTS.keys()


@pytest.mark.parametrize('wrap', [
    lambda state: wrapped(state, 'module.'), lambda state: wrapped(state, '_layers.module.'),
    lambda state: wrapped(state, '_orig_mod.'), lambda state: {'model': state}, lambda state: {'module': state},
])  # fmt: skip
def test_wrappers_come_off_every_set_of_weights(wrap):
    content = changed(model=wrap(WEIGHTS), model_ema=wrap(CONTENT['model_ema']))
    found = validate_checkpoint(content, 'x')
    assert found.weights.keys() == found.average.keys() == WEIGHTS.keys()
    model = paddle.nn.Linear(2, 3)
    np.testing.assert_array_equal(found.match_average(model).state['weight'], CONTENT['model_ema']['weight'])


BROKEN = {
    'model holds no weights': {'model': {}},
    'model holds no weights .*': {'model': 3},
    'model_ema holds no weights': {'model_ema': {'weight': 'x'}},
    'model_ema holds no weights .*': {'model_ema': 7},
    'epoch is None, but must be a whole number': {'epoch': None},
    "epoch is '3'": {'epoch': '3'},
    'epoch is -1': {'epoch': -1},
    'epoch is True': {'epoch': True},
    'step is missing': {'step': ...},
    'sampler is None, but must be a dict': {'sampler': None},
    r'sampler\.samples is missing': {'sampler': {}},
    r'sampler\.samples is 1\.5': {'sampler': {'samples': 1.5}},
    'rng is a list of 1 entries': {'rng': [1]},
    r'rng\.seed is None': {'rng': {'seed': None}},
    'progress is None': {'progress': None},
    r'progress\.validated is missing': {'progress': {}},
    r'progress\.validated is 1': progress(validated=1),
    r'progress\.best_score is None': progress(best_score=None),
    r'progress\.best_score is nan': progress(best_score=float('nan')),
    r'progress\.best_epoch is inf': progress(best_epoch=float('inf')),
    r'progress\.totals is a list of 5 entries': progress(totals=[0.0] * 5),
    r'progress\.totals is a list of 6 entries': progress(totals=[None] * 6),
    "progress has the unknown field 'epoch'": progress(epoch=9),
    'optimizer is a list': {'optimizer': [1]},
    'optimizer is None, but must be a dict': {'optimizer': None},
    r'optimizer: moment1 is an array of shape \[1\], but must be a dict': {'optimizer': {'moment1': np.ones(1)}},
    r"optimizer: moment1\.weight is 'x', but must be an array": {'optimizer': {'moment1': {'weight': 'x'}}},
    r'optimizer\.moment1 has NaN or infinite values in bias': {
        'optimizer': {'moment1': {'bias': np.array([0, np.nan, 0], 'float32')}}
    },
    'lr_scheduler is 3': {'lr_scheduler': 3},
    r'lr_scheduler\.last_lr is missing': {'lr_scheduler': {}},
    r'lr_scheduler\.last_lr is nan': {'lr_scheduler': {'last_lr': float('nan')}},
    r'progress\.unwritten is 3': progress(unwritten=3),
    r'config is an array of shape \[2, 3\]': {'config': WEIGHTS['weight']},
    'amp_grad_scaler is True': {'amp_grad_scaler': True},
    r'amp_grad_scaler\.scale is missing': {'amp_grad_scaler': {'incr_ratio': 2.0}},
    r'amp_grad_scaler\.incr_ratio is missing': {'amp_grad_scaler': {'scale': np.ones(1, 'float32')}},
}  # fmt: skip


@pytest.mark.parametrize('words', BROKEN)
def test_broken_parts(words):
    content = {name: part for name, part in changed(**BROKEN[words]).items() if part is not ...}
    with pytest.raises(UserError, match=f"'run/last.pdparams': {words}") as info:
        validate_checkpoint(content, 'run/last.pdparams')
    assert '\n' not in str(info.value)


def test_broken_parts_of_paddlevit():
    for part, words in (({'epoch': None}, 'epoch is None'), ({'optimizer': 3}, 'optimizer is 3')):
        with pytest.raises(UserError, match=words):
            validate_checkpoint({**PADDLEVIT, **part}, 'x')
    with pytest.raises(UserError, match=r'optimizer has NaN or infinite values in linear_0\.w_0_moment1_0'):
        validate_checkpoint({**PADDLEVIT, 'optimizer': {'linear_0.w_0_moment1_0': np.full((2, 3), np.inf)}}, 'x')
    assert validate_checkpoint({'model': WEIGHTS}, 'x').epoch is None


def test_averages_and_optimizer_state_must_fit_the_model():
    model = paddle.nn.Linear(2, 3)
    content = changed(model_ema={**WEIGHTS, 'bias': np.zeros(4, 'float32')})
    with pytest.raises(UserError, match=r"'x': model_ema does not fit Linear: .*bias \[4\] instead of \[3\]"):
        validate_checkpoint(content, 'x').match_average(model)
    kinds = accumulator_names(paddle.optimizer.AdamW(0.1, parameters=model.parameters()))
    validate_checkpoint(CONTENT, 'x').check_optimizer(model, kinds, 'AdamW')
    for state, words in (
        ({'velocity': dict(WEIGHTS)}, "optimizer holds 'velocity', which TRAIN.OPTIMIZER.NAME AdamW does not have"),
        ({'moment1': {'other': np.ones(3)}}, r'optimizer\.moment1 names parameters the model lacks: other'),
        ({'moment1': {'bias': np.ones(4)}}, r'optimizer\.moment1\.bias has shape \[4\], but the parameter \[3\]'),
    ):
        with pytest.raises(UserError, match=words):
            validate_checkpoint(changed(optimizer=state), 'x').check_optimizer(model, kinds, 'AdamW')


def test_a_published_file_is_no_checkpoint():
    with pytest.raises(UserError, match=r"checkpoint\.pth' is a PyTorch file.*port_weights\.py.*-pretrained"):
        read_checkpoint(f'{HERE}/fixtures/weights/checkpoint.pth', print)
