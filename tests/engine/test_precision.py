# SPDX-License-Identifier: Apache-2.0
"""Mixed precision with the branches of a GPU forced on the CPU: loss scaling, master weights, checkpoints of all levels."""

import itertools
import os
from contextlib import nullcontext

import numpy as np
import paddle
import pytest

from config import get_config
from engine import distributed
from engine.distributed import Context
from engine.precision import Precision
from tests.engine.gpu import Float32Passes, RoundedWeights, gpu  # noqa: F401
from tests.engine.test_train import Poisoned, make_trainer, weights
from tests.tasks.helpers import ALONE, rows
from utils.errors import UserError
from utils.formats import read_file

O2 = {'AMP': True, 'AMP_LEVEL': 'O2', 'AMP_DTYPE': 'bfloat16'}
RECIPE = {'TRAIN__GRAD_CLIP': 0.5, 'TRAIN__ACCUM_ITER': 2, 'TRAIN__MODEL_EMA': True, 'TRAIN__MODEL_EMA_DECAY': 0.9}


@pytest.fixture
def trainer(tmp_path, images, gpu):  # noqa: F811
    """Makes trainers with the branches of a GPU."""
    numbers = itertools.count()
    return lambda task=None, context=gpu, **changes: make_trainer(
        str(tmp_path / f'run{next(numbers)}'), images, task, context, **changes
    )


def state_of(run) -> dict:
    """The content of last.pdparams."""
    return read_file(os.path.join(run.folder, 'last.pdparams'))


# ---------------------------------------------------------------------------------------------------- loss scaling
class Overflowing(Poisoned):
    """Gradients overflow in the first two steps."""

    def __init__(self, config):
        super().__init__(config, 'gradient', 1)
        self.steps = 0

    def loss(self, model, batch, rng):
        self.steps += 1
        self.left = 1 if self.steps <= 2 else 0
        return super().loss(model, batch, rng)


def test_overflows_halve_the_loss_scale_and_skip_the_step(trainer, capsys):
    run = trainer(Overflowing, AMP=True)
    before, seen = weights(run), []
    step = run.scaler.step

    def recorded(optimizer):
        step(optimizer)
        seen.append(all(np.array_equal(value, before[name]) for name, value in weights(run).items()))

    run.scaler.step = recorded
    run.fit()
    assert seen[:3] == [True, True, False]
    scaler = state_of(run)['amp_grad_scaler']
    assert (scaler['scale'].item(), scaler['incr_count'], scaler['decr_count']) == (2.0**14, len(seen) - 2, 0)
    assert all(np.isfinite(value).all() for value in weights(run).values())
    assert 'Found inf' not in capsys.readouterr().out


def test_the_loss_scale_grows_after_steps_without_overflow(trainer):
    run = trainer(AMP=True)
    run.scaler.set_incr_every_n_steps(3)
    run.fit()
    assert run.scaler.state_dict()['scale'].item() == 2.0 ** (16 + run.state.step // 3)


def test_a_scaled_run_has_the_numbers_of_float32(trainer):
    """A power of two as the scale changes no bit of a float32 gradient."""
    scaled, plain = trainer(AMP=True), trainer(context=ALONE)
    scaled.fit()
    plain.fit()
    for name, value in weights(plain).items():
        np.testing.assert_array_equal(weights(scaled)[name], value)


@pytest.mark.parametrize('limit', [0.05, None])
def test_clipped_sums_with_loss_scaling_have_the_numbers_of_float32(trainer, limit):
    """TRAIN.ACCUM_MODE ms_mlp: the sums are clipped to the limit times the loss scale."""
    options = {'TRAIN__ACCUM_MODE': 'ms_mlp', 'TRAIN__ACCUM_ITER': 2, 'TRAIN__GRAD_CLIP': limit}
    scaled, plain, unclipped = (
        trainer(AMP=True, **options),
        trainer(context=ALONE, **options),
        trainer(context=ALONE, TRAIN__ACCUM_MODE='ms_mlp', TRAIN__ACCUM_ITER=2, TRAIN__GRAD_CLIP=None),
    )
    for run in (scaled, plain, unclipped):
        run.fit()
    for name, value in weights(plain).items():
        np.testing.assert_allclose(weights(scaled)[name], value, 1e-4, 1e-6)
    same = all(np.array_equal(value, weights(unclipped)[name]) for name, value in weights(plain).items())
    assert same is (limit is None)


def test_an_unsupported_type_is_refused(trainer, monkeypatch):
    for kind, remedy in (('bfloat16', '8.0 .* AMP_DTYPE to float16'), ('float16', '7.0 .* AMP to False')):
        monkeypatch.setattr(paddle.amp, f'is_{kind}_supported', lambda: False)
        with pytest.raises(UserError, match=f'AMP_DTYPE is {kind}, but this GPU .*{remedy}'):
            trainer(AMP=True, AMP_DTYPE=kind)
    trainer(context=ALONE, AMP=True)  # without effect on the CPU


# ---------------------------------------------------------------------------------------------------- O2
def test_half_weights_train_as_rounded_float32_weights(trainer):
    """Accumulation, clipping, optimizer and EMA are those of float32, bit for bit."""
    half = trainer(Float32Passes, **RECIPE, **O2)
    rounded = trainer(RoundedWeights, context=ALONE, **RECIPE)
    assert {str(p.dtype) for p in half.model.parameters()} == {'paddle.bfloat16'}
    half.fit()
    rounded.fit()
    ours, theirs = state_of(half), state_of(rounded)
    for part in ('model', 'model_ema'):
        for name, value in theirs[part].items():
            np.testing.assert_array_equal(ours[part][name], value, err_msg=f'{part} {name}')
    assert ours['optimizer'].keys() == theirs['optimizer'].keys()
    for kind, entries in theirs['optimizer'].items():
        for name, value in entries.items():
            np.testing.assert_array_equal(ours['optimizer'][kind][name], value, err_msg=f'{kind} {name}')
    for name, value in half.model.state_dict().items():
        np.testing.assert_array_equal(value, paddle.to_tensor(theirs['model'][name]).astype('bfloat16'))
    assert rows(half, 'train')[0]['loss'] == rows(rounded, 'train')[0]['loss']


@pytest.mark.parametrize('levels', [('O2', 'O2'), ('O2', 'O1'), ('O1', 'O2')], ids='-'.join)
def test_a_checkpoint_moves_between_the_levels(trainer, levels):
    """The second epoch equals that of a run that trained both epochs in its level from the same state."""
    kinds = {'O2': {'task': Float32Passes, **O2}, 'O1': {'task': RoundedWeights, **O2, 'AMP_LEVEL': 'O1'}}
    first = trainer(**kinds[levels[0]], **RECIPE)
    first.fit()
    saved = state_of(first)
    second = trainer(**kinds[levels[1]], **RECIPE, TRAIN__NUM_EPOCHS=2)
    second.snapshot.load_state_dict(saved, 'last.pdparams')
    for name, value in second.weights.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), saved['model'][name])
    second.fit()
    straight = trainer(context=ALONE, task=RoundedWeights, **RECIPE, TRAIN__NUM_EPOCHS=2)
    straight.fit()
    for part in ('model', 'model_ema'):
        for name, value in state_of(straight)[part].items():
            np.testing.assert_array_equal(state_of(second)[part][name], value, err_msg=name)


def test_master_weights_of_version_010_are_the_weights(trainer):
    run = trainer(Float32Passes, **O2)
    state = {**run.snapshot.state_dict(), 'config': ''}
    exact = {name: value.numpy() + 2.0**-12 for name, value in run.weights.parameters.items()}
    state['model'] = {name: np.round(value.numpy(), 1) for name, value in state['model'].items()}
    state['optimizer'] = {'master_weight': exact}
    run.snapshot.load_state_dict(state, 'x')
    for name, value in exact.items():
        np.testing.assert_array_equal(run.weights.parameters[name].numpy(), value)


def test_gradients_are_averaged_in_buckets(monkeypatch):
    calls = []

    def all_reduce(values):
        calls.append(values.size)
        paddle.assign(values * 3.0, values)  # the other rank has twice these values

    monkeypatch.setattr(distributed.dist, 'all_reduce', all_reduce)
    monkeypatch.setattr(distributed, 'BUCKET', 6)
    values = [paddle.full(shape, number) for number, shape in enumerate(([2, 2], [3], [8], [1]))]
    Context(0, 2, True).average(values)
    assert calls == [4, 3, 8, 1]
    for number, (value, shape) in enumerate(zip(values, ([2, 2], [3], [8], [1]))):
        np.testing.assert_array_equal(value.numpy(), np.full(shape, number * 1.5, 'float32'))


def test_half_weights_on_two_ranks_train_as_on_one_with_twice_the_gradients(trainer, monkeypatch):
    """The other rank has three times this one's gradients, so that the averages are twice as large."""
    monkeypatch.setattr(distributed.dist, 'all_reduce', lambda values: paddle.assign(values * 4.0, values))
    states = []
    for world_size, factor in ((2, 1.0), (1, 2.0)):
        run = trainer(Float32Passes, TRAIN__OPTIMIZER__NAME='SGD', **O2)
        context = Context(0, world_size, True)
        loss = sum(
            (parameter.astype('float32') * (number + 1)).square().sum()
            for number, parameter in enumerate(run.model.parameters())
        )
        run.updater.backward(loss * factor)
        norm = run.updater.clip(context)
        run.updater.step(0.001)
        states.append((norm.item(), {name: value.numpy() for name, value in run.weights.parameters.items()}))
    assert states[0][0] == pytest.approx(states[1][0], rel=1e-6)
    for name, value in states[0][1].items():
        np.testing.assert_allclose(value, states[1][1][name], rtol=1e-5)


@pytest.mark.parametrize(('level', 'half'), [('O1', False), ('O2', True)])
def test_evaluation_is_in_float32_unless_the_weights_are_not(gpu, monkeypatch, level, half):  # noqa: F811
    """With O1 a validation and -eval have the numbers of a run without AMP."""
    entered = []
    monkeypatch.setattr(paddle.amp, 'auto_cast', lambda **options: entered.append(options) or nullcontext())
    precision = Precision(get_config(opts=['AMP', True, 'AMP_LEVEL', level]), True)
    with precision.evaluation():
        assert bool(entered) is half
    with precision.autocast():
        assert entered[-1] == {'level': level, 'dtype': 'float16'}


def test_precision_is_float32_without_amp_or_gpu(gpu):  # noqa: F811
    for on, context in ((False, gpu), (True, ALONE)):
        precision = Precision(get_config(opts=['AMP', on, 'AMP_LEVEL', 'O2']), context.on_gpu)
        assert not (precision.enabled or precision.half_weights or precision.scaler.is_enable())
