# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules against the tables of the original programs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import get_config
from engine.learning_rate import lr_schedule
from tests.conftest import assert_close, golden
from utils.errors import UserError
from utils.schedules import SCHEDULES


@pytest.mark.parametrize('index', range(4))
def test_paddlevit_rates_per_epoch(index):
    reference = golden('gmlp-lr')
    settings = reference.meta['sets'][index]
    keys = ('BASE_LR', 'WARMUP_START_LR', 'END_LR', 'LINEAR_SCALED_LR', 'NUM_EPOCHS', 'WARMUP_EPOCHS')
    config = get_config(opts=[item for key in keys for item in (f'TRAIN.{key}', settings[key])])
    lr = lr_schedule(config, settings['BATCH_SIZE'] * settings['ACCUM_ITER'] * settings['world_size'])
    rates = [lr(epoch, 0.5) for epoch in range(1, settings['NUM_EPOCHS'] + 1)]
    assert_close(rates, reference[f'out/lr{index}'], 1e-6)


@pytest.mark.parametrize('index', range(4))
def test_deit_rates_per_epoch(index):
    reference = golden('evit-lr')
    case = {**reference.meta['defaults'], **reference.meta['cases'][index]}
    options = [
        *('TRAIN.BASE_LR', case['lr'], 'TRAIN.WARMUP_START_LR', case['warmup_lr'], 'TRAIN.END_LR', case['min_lr']),
        *('TRAIN.WARMUP_EPOCHS', case['warmup_epochs'], 'TRAIN.NUM_EPOCHS', case['epochs']),
        *('TRAIN.LR_SCHEDULER.NAME', 'timmcosine', 'TRAIN.LR_SCHEDULER.SCALE_ENDS', False),
    ]
    lr = lr_schedule(get_config(opts=options), case['total_batch'])
    assert_close([lr(t, 0.0) for t in range(case['epochs'] + 5)], reference[f'out/schedule{index}'], 1e-6)
    lr = lr_schedule(get_config(opts=[*options, 'TRAIN.LR_SCHEDULER.LAG', 2]), case['total_batch'])
    assert_close([lr(epoch, 0.0) for epoch in range(1, case['epochs'] + 1)], reference[f'out/effective{index}'], 1e-6)


@pytest.mark.parametrize('index', range(7))
def test_ms_mlp_rates_per_step(index):
    """Upstream's linear and step schedules know no end of their own: they use base / 100 and 0."""
    reference = golden('ms_mlp-lr')
    case = reference.meta['settings'][index]
    end = {'cosine': case['min_lr'], 'linear': case['base_lr'] / 100, 'step': 0.0}[case['name']]
    name = 'timmcosine' if case['name'] == 'cosine' else case['name']
    options = [
        *('TRAIN.BASE_LR', case['base_lr'], 'TRAIN.WARMUP_START_LR', case['warmup_lr'], 'TRAIN.END_LR', end),
        *('TRAIN.WARMUP_EPOCHS', case['warmup_epochs'], 'TRAIN.NUM_EPOCHS', case['epochs']),
        *('TRAIN.LR_SCHEDULER.NAME', name, 'TRAIN.LR_SCHEDULER.UPDATE', 'step', 'TRAIN.LINEAR_SCALED_LR', None),
        *('TRAIN.LR_SCHEDULER.DECAY_EPOCHS', case['decay_epochs']),
        *('TRAIN.LR_SCHEDULER.DECAY_RATE', case['decay_rate']),
    ]
    lr = lr_schedule(get_config(opts=options), 1)
    assert np.isclose(lr(1, 0.0), reference[f'out/{index}_initial'], 1e-6)
    steps = [divmod(step, case['n_iter']) for step in range(len(reference[f'out/{index}_lr']))]
    rates = [lr(epoch + 1, step / case['n_iter']) for epoch, step in steps]
    np.testing.assert_allclose(rates, reference[f'out/{index}_lr'], 1e-6)


@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0, 1), st.floats(0, 10), st.integers(11, 30))
def test_rates_stay_between_their_ends(name, share, warmup, total):
    values = {'base': 1.0, 'start': 1e-3, 'end': 1e-2, 'warmup': warmup, 'total': total}
    rate = SCHEDULES[name](share * total, **values, decay_epochs=4.0, decay_rate=0.1, milestones=[5.0, 8.0])
    assert 1e-3 - 1e-12 <= rate <= 1.0 + 1e-12
    if share * total >= warmup:
        assert rate >= 1e-2 - 1e-12


def test_update_per_step_is_the_same_curve_between_epochs():
    options = ['TRAIN.LINEAR_SCALED_LR', None, 'TRAIN.NUM_EPOCHS', 10, 'TRAIN.WARMUP_EPOCHS', 3]
    epochs = lr_schedule(get_config(opts=options), 8)
    steps = lr_schedule(get_config(opts=[*options, 'TRAIN.LR_SCHEDULER.UPDATE', 'step']), 8)
    assert np.isclose(steps(5, 0.0), epochs(4, 0.0))
    assert steps(5, 0.25) > steps(5, 0.75) > steps(6, 0.0)
    assert epochs(5, 0.25) == epochs(5, 0.75)


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(UserError, match="'cosin'.*Known: .*warmupcosine"):
        lr_schedule(get_config(opts=['TRAIN.LR_SCHEDULER.NAME', 'cosin']), 8)


@pytest.mark.parametrize('name', ['recipe', 'poly09', 'short'])
@pytest.mark.parametrize('steps_per_epoch', [1, 1263, 160000])
def test_poly_by_iterations(name, steps_per_epoch):
    """The schedule of mmsegmentation, at iterations anywhere in an epoch."""
    reference = golden('segmentation-schedule')
    case = reference.meta['schedules'][name]
    options = [
        *('TRAIN.NUM_ITERS', case['max_iters'], 'TRAIN.WARMUP_ITERS', case['warmup_iters']),
        *('TRAIN.BASE_LR', 1e-4, 'TRAIN.WARMUP_START_LR', 1e-4 * case['warmup_ratio']),
        *('TRAIN.END_LR', 1e-4 * case['min_lr_over_lr'], 'TRAIN.LINEAR_SCALED_LR', None),
        *('TRAIN.LR_SCHEDULER.NAME', 'poly', 'TRAIN.LR_SCHEDULER.POWER', case['power']),
        *('TRAIN.LR_SCHEDULER.UPDATE', 'step'),
    ]
    lr = lr_schedule(get_config(opts=options), 16, steps_per_epoch)
    places = [divmod(int(step), steps_per_epoch) for step in reference[f'in/{name}/iter']]
    rates = np.array([lr(epoch + 1, step / steps_per_epoch) for epoch, step in places])
    np.testing.assert_allclose(rates / 1e-4, reference[f'out/{name}/multiplier'], 1e-9)


@pytest.mark.parametrize('steps_per_epoch', [1832, 1, 7])
def test_detectron2_rates(steps_per_epoch):
    reference = golden('vitdet-schedule')
    total = reference.meta['max_iter']
    options = [
        *('TRAIN.NUM_ITERS', total, 'TRAIN.WARMUP_ITERS', 250, 'TRAIN.BASE_LR', 1e-4, 'TRAIN.WARMUP_START_LR', 1e-7),
        *('TRAIN.LR_SCHEDULER.NAME', 'multistep', 'TRAIN.LR_SCHEDULER.UPDATE', 'step', 'TRAIN.LINEAR_SCALED_LR', 64),
        *('TRAIN.LR_SCHEDULER.MILESTONES', (total * 24 // 27, total * 26 // 27), 'TRAIN.END_LR', 0.0),
    ]
    for batch in (64, 16):
        lr = lr_schedule(get_config(opts=options), batch, steps_per_epoch)
        places = [divmod(int(step), steps_per_epoch) for step in reference['in/iter']]
        rates = np.array([lr(epoch + 1, step / steps_per_epoch) for epoch, step in places])
        np.testing.assert_allclose(rates / (1e-4 * batch / 64), reference['out/multiplier'], 1e-6)


def test_milestones():
    options = ['TRAIN.LR_SCHEDULER.NAME', 'multistep', 'TRAIN.WARMUP_EPOCHS', 0, 'TRAIN.BASE_LR', 1.0]
    options += ['TRAIN.END_LR', 0.02]
    with pytest.raises(UserError, match='multistep needs TRAIN.LR_SCHEDULER.MILESTONES'):
        lr_schedule(get_config(opts=options), 512)
    lr = lr_schedule(
        get_config(opts=[*options, 'TRAIN.LR_SCHEDULER.MILESTONES', '3, 5']), 512, 10
    )  # as PaddleViT writes
    np.testing.assert_allclose([lr(epoch, 0.0) for epoch in (2, 3, 4, 5, 6)], [1, 0.1, 0.1, 0.02, 0.02])
