# SPDX-License-Identifier: Apache-2.0
"""Model schedules: the attention weight λ, alone and with EViT's keep rate."""

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import get_config
from engine.ema import ModelEma
from engine.learning_rate import lr_schedule
from engine.optim import parameter_groups
from models import build_model
from models.gmlp import GMLP
from models.registry import config_file
from tasks.classification import ClassificationTask
from tasks.model_schedules import AttentionDecaySchedule, build_model_schedules
from tests.conftest import assert_close, golden
from utils.errors import UserError
from utils.schedules import attn_lambda

VIT = {
    'MODEL.TYPE': 'vit', 'MODEL.NUM_CLASSES': 4, 'DATA.IMAGE_SIZE': 16, 'MODEL.TRANS.PATCH_SIZE': 4,
    'MODEL.TRANS.EMBED_DIM': 8, 'MODEL.TRANS.DEPTH': 3, 'MODEL.TRANS.NUM_HEADS': 2, 'MODEL.EVIT.DROP_LOC': (1,),
    'MODEL.LAMBDA.PRUNE_LAYERS': (0, 2), 'TRAIN.NUM_EPOCHS': 8,
}  # fmt: skip


def configured(**changes):
    options = {**VIT, **{name.replace('__', '.'): value for name, value in changes.items()}}
    return get_config(opts=[item for pair in options.items() for item in pair])


def clock_of(**changes) -> AttentionDecaySchedule:
    (clock,) = build_model_schedules(configured(**changes))
    return clock


def test_the_schedule_is_the_published_one():
    g = golden('lambda_vit-schedules')
    clock = clock_of(TRAIN__NUM_EPOCHS=g.meta['epochs'])
    for epoch, expected in zip(g['in/epoch'].tolist(), g['out/lambda_'].tolist()):
        for t in (epoch, epoch + 0.25, epoch + 1 - 1e-9):  # constant inside an epoch
            assert_close(clock.value(t), expected, 1e-6)
            assert clock.is_final(t) == (epoch >= 299)
    assert [clock.value(epoch) for epoch in (0, 1, 299, 399)] == [1.0, 298 / 299, 0.0, 0.0]


def test_start_and_length():
    values = [attn_lambda(t, start=2, length=4) for t in range(8)]
    assert values == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    clock = clock_of(MODEL__LAMBDA__START_EPOCH=2, MODEL__LAMBDA__DECAY_EPOCHS=4)
    assert [clock.value(t) for t in range(8)] == values


@given(epochs=st.integers(2, 1000), start=st.integers(0, 20))
def test_the_default_length_always_leaves_a_finished_epoch(epochs, start):
    clock = clock_of(TRAIN__NUM_EPOCHS=epochs + start, MODEL__LAMBDA__START_EPOCH=start)
    values = [clock.value(t) for t in range(epochs + start)]
    assert values[: start + 1] == [1.0] * (start + 1) and values[-1] == 0.0
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    'changes',
    [
        {'MODEL__LAMBDA__DECAY_EPOCHS': 8},
        {'MODEL__LAMBDA__DECAY_EPOCHS': 299, 'TRAIN__NUM_EPOCHS': 299},
        {'MODEL__LAMBDA__START_EPOCH': 8},
        {'TRAIN__NUM_EPOCHS': 1},
    ],
)
def test_a_run_that_ends_before_the_attention_has_faded_is_refused(changes):
    with pytest.raises(UserError, match=r'attention weight λ is .* in the last of \d+ epochs'):
        ClassificationTask(configured(**changes))


def test_the_last_epoch_may_be_the_first_without_attention():
    assert clock_of(MODEL__LAMBDA__DECAY_EPOCHS=7).is_final(7.0)


def test_clocks_side_by_side():
    config = configured(
        MODEL__EVIT__KEEP_RATE=0.5, MODEL__EVIT__SHRINK_EPOCHS=2, MODEL__LAMBDA__DECAY_EPOCHS=4, TRAIN__NUM_EPOCHS=6
    )
    task, model = ClassificationTask(config), build_model(config)
    assert task.update_schedules(model, 1.0) == {'keep_rate': 0.75, 'attn_lambda': 0.75}
    assert model.keep_rate == 0.75 and [block.attn_weight for block in model.blocks] == [0.75, 1, 0.75]
    assert [task.is_final(t) for t in (1.0, 3.9, 4.0)] == [False, False, True]
    task.update_schedules(model, 4.5)
    assert model.attn_lambda.tolist() == [0, 1, 0]


def test_no_decay_in_a_model_without_that_attention():
    assert build_model_schedules(configured(MODEL__LAMBDA__REMOVED=True)) == []
    assert build_model_schedules(configured(MODEL__LAMBDA__PRUNE_LAYERS=())) == []


@pytest.mark.parametrize('changes', [{}, {'MODEL__EVIT__KEEP_RATE': 0.5, 'MODEL__LAMBDA__PRUNE_LAYERS': ()}])
def test_models_that_have_no_such_setting(changes):
    model = GMLP(img_size=16, patch_size=4, embed_dim=8, depth=1)
    with pytest.raises(UserError, match='GMLP does not support it'):
        ClassificationTask(configured(**changes)).update_schedules(model, 0.0)


def test_averages_of_weights_do_not_average_lambda():
    model = build_model(configured())
    model.eval()
    ema = ModelEma(model, 0.5)
    for weight in (0.5, 0.25):
        model.set_attn_lambda(weight)
        ema.update()
    assert ema.state_dict()['attn_lambda'].tolist() == [0.25, 1, 0.25]
    x = paddle.randn([2, 3, 16, 16])
    before = model(x).numpy()
    with ema.applied():
        np.testing.assert_allclose(model(x), before, 1e-5, 1e-6)  # the weights did not change
    assert model.attn_lambda.tolist() == [0.25, 1, 0.25]


def test_the_recipe_is_the_published_one():
    """Learning rate of each epoch, weight decay of each parameter, stochastic depth, of 8 processes of 256 images."""
    g = golden('lambda_vit-schedules')
    config = get_config(
        config_file('lambda_small_024_finetune'),
        ['MODEL.TRANS.DEPTH', 2, 'MODEL.LAMBDA.PRUNE_LAYERS', (0,), 'MODEL.EVIT.DROP_LOC', ()],
    )
    rate = lr_schedule(config, 2048)
    assert g.meta['epochs'] == config.TRAIN.NUM_EPOCHS and g.meta['drop_path_rate'] == config.MODEL.DROPPATH
    for epoch, expected in enumerate(g['out/lr_used_in_epoch'].tolist()):
        assert rate(epoch + 1, 0.0) == rate(epoch + 1, 0.9) == pytest.approx(expected, rel=1e-6)
    model = build_model(config)
    names = {parameter.name: name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, config.TRAIN.WEIGHT_DECAY):
        decayed = sorted(names[parameter.name] for parameter in group['params'])
        assert decayed == g.meta['weight_decay_groups'][f'wd={group["weight_decay"]:g}']
    assert (config.TRAIN.OPTIMIZER.NAME, list(config.TRAIN.OPTIMIZER.BETAS)) == ('AdamW', g.meta['optimizer']['betas'])
    ramps = {
        get_config(config_file(f'lambda_{name}_finetune')).MODEL.DROPPATH_RAMP for name in ('small_0246', 'tiny_024')
    }
    assert ramps == {True} and not get_config(config_file('lambda_base_013469_finetune')).MODEL.DROPPATH_RAMP
