# SPDX-License-Identifier: Apache-2.0
"""Contrastive pre-training: MAE-Lite's numbers on one process and two, and runs of the loop."""

import math
import os

import numpy as np
import paddle
import pytest

from config import get_config
from engine.distributed import Context
from engine.learning_rate import lr_schedule
from engine.optim import parameter_groups
from models import build_model
from models.layers import SyncBatchNorm
from models.registry import config_file
from tasks import MeanEvaluator
from tasks.classification import ClassificationTask
from tasks.mocov3 import info_nce
from tests.conftest import assert_close, golden
from tests.models.helpers import linear_weights, small_config
from tests.models.test_mocov3 import of_golden
from tests.runs.conftest import run
from tests.tasks.helpers import attached, batch_of, build_trainer, rows
from utils.errors import UserError
from utils.formats import read_file
from utils.schedules import encoder_momentum

SMALL = {
    'DATA.DATASET': 'folder', 'DATA.IMAGE_SIZE': 16, 'DATA.BATCH_SIZE': 8, 'DATA.NUM_WORKERS': 0, 'DATA.CROP': 'resized',
    'MODEL.TRANS.PATCH_SIZE': 4, 'MODEL.TRANS.EMBED_DIM': 24, 'MODEL.TRANS.DEPTH': 2, 'MODEL.TRANS.NUM_HEADS': 3,
    'MODEL.MOCO.DIM': 16, 'MODEL.MOCO.MLP_DIM': 32, 'TRAIN.NUM_EPOCHS': 2, 'TRAIN.WARMUP_EPOCHS': 0,
    'TRAIN.LINEAR_SCALED_LR': None, 'TRAIN.BASE_LR': 2e-3, 'TRAIN.DROP_LAST': False,
}  # fmt: skip


def recipe(name='mocov3_tiny_patch16_224', **changes):
    options = {**SMALL, **{key.replace('__', '.'): value for key, value in changes.items()}}
    return get_config(config_file(name), [item for pair in options.items() for item in pair])


# ---------------------------------------------------------------------------------------------------- numbers
def one_pass(g, views: np.ndarray, context: Context) -> dict[str, np.ndarray]:
    """Loss, features, gradients (averaged over the processes) and the state after it, under our names."""
    setting = g.meta['config']
    config = recipe(MODEL__MOCO__TEMPERATURE=setting['T'], MODEL__MOCO__MOMENTUM=setting['m'], TRAIN__NUM_EPOCHS=100)
    model = of_golden(g)
    model.train()
    task = attached(config, model)
    task.update_schedules(model, setting['iter'] / setting['total_iters'] * 100)
    seen, parallel = [], context.parallel(model)
    model.register_forward_post_hook(lambda layer, inputs, output: seen.append(output))
    loss = task.loss(parallel, batch_of(paddle.to_tensor(views)), np.random.default_rng(0)).total
    loss.backward()
    result = {'loss': loss.numpy(), **{name: part.numpy() for name, part in seen[0]._asdict().items()}}
    result.update({f'grad/{n}': p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None})
    result.update({f'state/{name}': value.numpy() for name, value in model.state_dict().items()})
    return result


def check(g, result, share: slice) -> None:
    """Compares what one process computed, whose images are `share` of all."""
    for name in ('q1', 'q2', 'k1', 'k2'):
        assert_close(result[name], g[f'out/{name}'][share], 1e-4)
    linear = linear_weights(of_golden(g))
    for name, gradient in g.group('out/grad').items():
        np.testing.assert_allclose(result[f'grad/{name}'], gradient.T if name in linear else gradient, atol=2e-5)
    named = {'running_mean': '_mean', 'running_var': '_variance'}
    for name, value in g.group('out/sd_after').items():
        path, _, last = name.rpartition('.')
        np.testing.assert_allclose(result[f'state/{path}.{named[last]}'], value, rtol=1e-4, atol=2e-5)


def normalize_maps(share: slice) -> dict[str, np.ndarray]:
    """Batch normalization of the images `share` of five, and the gradients of a weighted sum."""
    values, weights = np.random.default_rng(0).normal(size=(2, 5, 3, 4, 2)).astype('float32')
    layer, x = SyncBatchNorm(3), paddle.to_tensor(values[share] + 2, stop_gradient=False)
    y = layer(x)
    (y * paddle.to_tensor(weights[share])).sum().backward()
    return {
        'maps': y.numpy(),
        'maps/grad': x.grad.numpy(),
        'mean': layer._mean.numpy(),
        'variance': layer._variance.numpy(),
    }


def test_one_process_of_all_images():
    """The statistics, keys and gradients of two processes are those of one that has the images of both."""
    g = golden('mocov3-tworank')
    views = np.stack([np.concatenate([g[f'in/x{view}_rank{rank}'] for rank in (0, 1)]) for view in (1, 2)], 1)
    result = one_pass(g, views, Context(0, 1, False))
    assert result['loss'] == pytest.approx(g['out/loss_mean'].item(), rel=1e-5)
    check(g, result, slice(None))


def test_two_processes(tmp_path):
    g = golden('mocov3-tworank')
    run(os.path.join('tests', 'tasks', 'mocov3_on_ranks.py'), str(tmp_path), NPROC='2')
    for rank in (0, 1):
        with np.load(tmp_path / f'{rank}.npz') as result:
            assert result['loss'] == pytest.approx(g[f'out/loss_rank{rank}'].item(), rel=1e-5)
            check(g, result, slice(4 * rank, 4 * rank + 4))
            together, share = normalize_maps(slice(None)), (slice(2), slice(2, None))[rank]  # of different sizes
            for name in ('maps', 'maps/grad'):
                assert_close(result[name], together[name][share], 1e-5)
            for name in ('mean', 'variance'):
                assert_close(result[name], together[name], 1e-5)


def test_schedules_are_mae_lites():
    g = golden('mocov3-schedule')
    for index, case in enumerate(g.meta['cases']):
        config = recipe(
            TRAIN__NUM_EPOCHS=case['epochs'], TRAIN__WARMUP_EPOCHS=case['warmup_epochs'], TRAIN__BASE_LR=case['lr'],
            TRAIN__WARMUP_START_LR=case['warmup_lr_start'], TRAIN__END_LR=case['end_lr'],
        )  # fmt: skip
        per_epoch, lr = case['iters_per_epoch'], lr_schedule(config, 1024)
        steps = range(case['total_iters'] + 1)
        rates = [lr(step // per_epoch + 1, step % per_epoch / per_epoch) for step in steps]
        assert_close(rates, g[f'out/lr_{index}'], 1e-6)
        momenta = [encoder_momentum(step / per_epoch, base=case['moco_m'], total=case['epochs']) for step in steps]
        np.testing.assert_allclose(momenta, g[f'out/momentum_{index}'], rtol=1e-6)


def test_the_recipe():
    """Rates of 1024 images; weight decay on all that is trained, and nothing else in the optimizer."""
    config = get_config(config_file('mocov3_tiny_patch16_224'))
    lr = lr_schedule(config, 1024)
    assert [lr(1, 0.0), lr(41, 0.0)] == pytest.approx([1e-6, 6e-4])
    model = build_model(recipe())
    (group,) = parameter_groups(model, config.TRAIN.WEIGHT_DECAY)
    assert group['weight_decay'] == 0.1
    assert len(group['params']) == sum(not parameter.stop_gradient for parameter in model.parameters())


def test_the_loss_of_features_that_say_nothing():
    """4 tau ln N for both directions when all similarities are equal (half of it each), and 0 when keys are unmistakable."""
    same = paddle.ones([6, 4])
    assert info_nce(same, same, 0.2).item() == pytest.approx(2 * 0.2 * math.log(6), rel=1e-5)
    assert info_nce(paddle.eye(6), paddle.eye(6) * 3, 0.01).item() == pytest.approx(0, abs=1e-6)
    zero = paddle.zeros([2, 4])
    zero.stop_gradient = False
    info_nce(zero, zero.detach(), 0.2).backward()
    assert np.isfinite(zero.grad.numpy()).all()


# ---------------------------------------------------------------------------------------------------- runs
def test_a_run(images, tmp_path):
    """Its rows and what it logs."""
    config = recipe(DATA__DATA_PATH=images, TRAIN__NUM_EPOCHS=3, REPORT_FREQ=1)
    trainer = build_trainer(config, str(tmp_path / 'run'))
    trainer.fit()
    scores = [row['knn_acc1'] for row in rows(trainer, 'val')]
    assert len(scores) == 3
    assert not any('acc1' in row for row in rows(trainer, 'train'))
    log = (tmp_path / 'run' / 'log.txt').read_text()
    assert ', momentum: 0.99\n' in log and 'Validation kNN Acc@1: ' in log
    assert f'best Validation kNN Acc@1: {scores[-1]:.4f} after epoch 3' in log
    losses = [row['loss'] for row in rows(trainer, 'train')]
    assert losses[-1] < losses[0] < 4 * 0.2 * math.log(8) * 1.2
    best = read_file(os.path.join(trainer.folder, 'best.pdparams'))
    assert {name.partition('.')[0] for name in best} >= {'base_encoder', 'momentum_encoder', 'predictor'}


def test_the_best_weights_are_those_of_the_last_epoch(images, tmp_path):
    """Also where an earlier kNN accuracy is higher: it does not say which weights fine-tune best."""
    trainer = build_trainer(recipe(DATA__DATA_PATH=images, TRAIN__NUM_EPOCHS=3), str(tmp_path / 'run'))
    falling = {1: 0.9, 2: 0.7, 3: 0.4}

    def sums(batch, features):
        return paddle.full([2], falling[trainer.state.epoch] * len(batch), 'float64')

    trainer.evaluator = MeanEvaluator(trainer.evaluator.titles, trainer.evaluator.best, sums)
    trainer.fit()
    assert [row['knn_acc1'] for row in rows(trainer, 'val')] == pytest.approx(list(falling.values()))
    assert (trainer.state.best_epoch, trainer.state.best) == (3, pytest.approx(0.4))
    best, last = (read_file(os.path.join(trainer.folder, f'{name}.pdparams')) for name in ('best', 'last'))
    for name, value in last['model'].items():
        np.testing.assert_array_equal(best[name], value, err_msg=name)


def test_resuming_in_an_epoch_changes_nothing(images, tmp_path):
    """With micro-batches: the momentum encoder takes one step per step of the optimizer."""
    config = recipe(
        DATA__DATA_PATH=images, SAVE_STEPS=2, TRAIN__ACCUM_ITER=2, TRAIN__OPTIMIZER__NAME='LARS', TRAIN__BASE_LR=0.5
    )
    whole = build_trainer(config, str(tmp_path / 'whole'))
    saved, averaged = [], []
    save, average = whole._save, whole.model._update_momentum_encoder
    whole._save = lambda: (save(), saved.append(read_file(os.path.join(whole.folder, 'last.pdparams'))))
    whole.model._update_momentum_encoder = lambda momentum: (averaged.append(momentum), average(momentum))
    whole.fit()
    assert len(averaged) == whole.state.step == 10
    middle = next(state for state in saved if state['sampler']['samples'])
    assert middle['step'] == 2 and set(middle['optimizer']) == {'velocity'}
    again = build_trainer(config, str(tmp_path / 'again'))
    again.snapshot.load_state_dict(middle, 'last.pdparams')
    again.fit()
    for name, value in whole.model.state_dict().items():
        np.testing.assert_array_equal(again.model.state_dict()[name], value)
    assert [row['knn_acc1'] for row in rows(again, 'val')] == [row['knn_acc1'] for row in rows(whole, 'val')]


def test_a_frozen_patch_embedding_does_not_change(images, tmp_path):
    config = recipe(DATA__DATA_PATH=images, MODEL__MOCO__FREEZE_PATCH=True, TRAIN__NUM_EPOCHS=1)
    trainer = build_trainer(config, str(tmp_path / 'run'))
    frozen = ('patch_embed.', 'pos_embed')
    before = {name: value.numpy() for name, value in trainer.model.state_dict().items()}
    trainer.fit()
    for name, value in trainer.model.state_dict().items():
        branch, _, rest = name.partition('.')
        if rest.startswith(frozen):  # averages of equal numbers may be rounded
            np.testing.assert_allclose(value, before[name], atol=0 if branch == 'base_encoder' else 1e-6)
        else:
            assert not np.array_equal(value.numpy(), before[name]), name


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'DATA__VIEWS': 1}, 'remove DATA.VIEWS or set it to 2'),
        ({'AMP': True, 'AMP_LEVEL': 'O2'}, 'needs AMP_LEVEL O1'),
        ({'DATA__BATCH_SIZE': 1}, 'DATA.BATCH_SIZE is 1 on one process'),
    ],
)
def test_mistakes(changes, words):
    config = recipe(**changes)
    with pytest.raises(UserError, match=words):
        attached(config, build_model(config))


def test_another_model():
    with pytest.raises(UserError, match='TRAIN.TASK mocov3 needs MODEL.TYPE mocov3'):
        attached(recipe(), build_model(small_config('gmlp_digits')))


def test_classes_are_not_learnt_by_it():
    config = recipe(TRAIN__TASK='supervised')
    with pytest.raises(UserError, match='MODEL.TYPE mocov3 has no classifier'):
        attached(config, build_model(config))
    with pytest.raises(UserError, match='TRAIN.TASK supervised trains on 1 .*: remove DATA.VIEWS or set it to 1'):
        ClassificationTask(recipe(TRAIN__TASK='supervised', DATA__VIEWS=2))
