# SPDX-License-Identifier: Apache-2.0
"""Damaged states for -resume: each entry of a checkpoint with values of every wrong kind.

A checkpoint is refused by one sentence, and nothing has changed then; or it is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import paddle
import pytest

from models.weights.match import check_finite
from tests.engine.test_train import Poisoned, make_trainer
from utils.errors import UserError
from utils.formats import read_file, write_pdparams

KEYS = {'TRAIN__MODEL_EMA': True, 'SAVE_STEPS': 1, 'REPORT_FREQ': 1000}
MISSING = object()
VALUES = [
    MISSING, None, True, -1, 0, 5, 2**40, 2**63, 2**64, 10**308, 2**1023, 0.5, 1e300, float('nan'), float('inf'), '', '\x1b[2J',
    b'x', [], [1], {}, {'a': 1}, {1: 2}, ('a',), np.array(1), np.array([1.0, 2.0]), np.zeros(0), np.zeros((3, 3)),
    np.full(2, np.nan), np.array([True]), np.array([1j]), {'a': {'b': [1, 2]}}, [[[]]], {'kind': 'train'},
    {'kind': 'train', 'epoch': 1, 'step': {}}, {'kind': [], 'epoch': 1, 'step': 1},
]  # fmt: skip
PARTS = (
    'model', 'model_ema', 'optimizer', 'lr_scheduler', 'amp_grad_scaler', 'epoch', 'step', 'sampler', 'progress', 'rng',
    'config', 'Facts@@',
)  # fmt: skip


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory, images) -> dict:
    """Written within an epoch, after three steps."""
    folder = tmp_path_factory.mktemp('run')
    with pytest.raises(UserError, match='not finite at step 4'):
        make_trainer(str(folder), images, lambda config: Poisoned(config, 'nan', 4), **KEYS).fit()
    return read_file(str(folder / 'last.pdparams'))


@pytest.fixture(scope='module')
def paddlevit(checkpoint) -> dict:
    """The same weights as PaddleViT's files have them."""
    model = paddle.nn.Linear(2, 2)
    optimizer = paddle.optimizer.AdamW(0.1, parameters=model.parameters())
    model(paddle.ones([1, 2])).sum().backward()
    optimizer.step()
    state = {key: value.numpy() for key, value in optimizer.state_dict().items() if key != 'LR_Scheduler'}
    return {'model': checkpoint['model'], 'optimizer': {**state, 'LR_Scheduler': {'last_epoch': 3}}, 'epoch': 1}


def places(content: dict, part: str) -> Iterator[tuple]:
    """Keys that lead to a part, to its entries, and to the first entries of those."""
    yield (part,)
    entries = content.get(part)
    for name in list(entries)[:4] if isinstance(entries, dict) else ():
        yield part, name
        inner = entries[name]
        for last in list(inner)[:2] if isinstance(inner, dict) else ():
            yield part, name, last


def changed(content: dict, place: tuple, value) -> dict:
    result = copy.deepcopy(content)
    inner = result
    for key in place[:-1]:
        inner = inner[key]
    if value is MISSING:
        inner.pop(place[-1], None)
    else:
        inner[place[-1]] = value
    return result


def snapshot(trainer) -> list:
    return [trainer.state.__dict__.copy(), *(value.numpy().tobytes() for value in trainer.model.state_dict().values())]


@pytest.mark.parametrize('written_by', ['checkpoint', 'paddlevit'])
@pytest.mark.parametrize('part', PARTS)
def test_a_damaged_part_is_refused_or_loaded(part, written_by, tmp_path, images, request):
    content = request.getfixturevalue(written_by)
    trainer = make_trainer(str(tmp_path), images, **KEYS)
    before = snapshot(trainer)
    refused = 0
    for place in places(content, part):
        for value in VALUES:
            try:
                trainer.snapshot.load_state_dict(changed(content, place, value), 'run/last.pdparams')
            except UserError as error:
                refused += 1
                text = str(error)
                assert 'run/last.pdparams' in text and '\n' not in text and '\x1b' not in text and len(text) < 4001
                assert snapshot(trainer) == before, (place, value)
            else:
                trainer = make_trainer(str(tmp_path), images, **KEYS)
    assert refused or part == 'config' or part not in content


@pytest.mark.slow
@pytest.mark.parametrize('part', ['epoch', 'step', 'sampler', 'progress', 'lr_scheduler', 'optimizer', 'rng'])
def test_training_continues_from_what_is_loaded(part, checkpoint, tmp_path, images):
    """Or ends with a sentence; a third of the values at each place, others at the next one."""
    for number, place in enumerate(places(checkpoint, part)):
        for value in VALUES[number % 3 :: 3]:
            trainer = make_trainer(str(tmp_path / 'run'), images, **KEYS)
            try:
                trainer.snapshot.load_state_dict(changed(checkpoint, place, value), 'x')
                trainer.fit()
            except UserError as error:
                assert '\n' not in str(error)


@pytest.mark.parametrize('dtype', ['>f4', 'f2', 'f8', '>f8', 'f16', 'u2', 'u4', 'u8', 'i1', 'i8', '>i4', 'bool', 'c8'])
@pytest.mark.parametrize(
    'place', [('optimizer', 'moment1'), ('optimizer', 'beta1_pow_acc'), ('model_ema',), ('model',)]
)
def test_numbers_of_every_type(place, dtype, checkpoint, tmp_path, images):
    """Any precision and byte order of floating-point numbers is loaded, bfloat16 as uint16 too; other numbers are refused."""
    content = copy.deepcopy(checkpoint)
    entries = content
    for key in place:
        entries = entries[key]
    name = list(entries)[0]
    entries[name] = entries[name].astype(dtype)
    trainer = make_trainer(str(tmp_path), images, **KEYS)
    if np.dtype(dtype).kind == 'f' or (dtype == 'u2' and place[0] != 'optimizer'):
        trainer.snapshot.load_state_dict(content, 'x')
    else:
        with pytest.raises(UserError, match=name):
            trainer.snapshot.load_state_dict(content, 'x')


def test_one_array_with_many_names_is_checked_once(checkpoint, monkeypatch):
    array, calls = np.ones(1000, 'f4'), []
    monkeypatch.setattr(np, 'isfinite', lambda values: calls.append(1) or np.ones(1, bool))
    check_finite({str(number): array for number in range(1000)}, 'x')
    assert len(calls) == 1


def test_a_place_behind_the_last_image(checkpoint, tmp_path, images):
    trainer = make_trainer(str(tmp_path), images, **KEYS)
    trainer.snapshot.load_state_dict(changed(checkpoint, ('sampler', 'samples'), 80), 'x')
    trainer = make_trainer(str(tmp_path), images, **KEYS)
    with pytest.raises(UserError, match=r'sampler\.samples is 81, but an epoch has at most 80 images'):
        trainer.snapshot.load_state_dict(changed(checkpoint, ('sampler', 'samples'), 81), 'x')


def test_moments_of_some_parameters_only(checkpoint, tmp_path, images):
    name = next(iter(checkpoint['optimizer']['moment1']))
    trainer = make_trainer(str(tmp_path), images, **KEYS)
    with pytest.raises(UserError, match=rf'optimizer\.moment1 lacks {name}, which other parts'):
        trainer.snapshot.load_state_dict(changed(checkpoint, ('optimizer', 'moment1', name), MISSING), 'x')


def test_a_file_that_holds_many_times_its_size(checkpoint, tmp_path):
    """What is written is within the limits of what is read."""
    path = str(tmp_path / 'last.pdparams')
    write_pdparams({**checkpoint, 'progress': {**checkpoint['progress'], 'unwritten': {'kind': 'train'}}}, path)
    assert read_file(path)['progress']['unwritten'] == {'kind': 'train'}
