# SPDX-License-Identifier: Apache-2.0
"""Masked pre-training: MAE-Lite's steps, and runs of the loop."""

import os

import numpy as np
import paddle
import pytest

import datasets
from config import get_config
from engine.evaluate import evaluate
from engine.learning_rate import lr_schedule
from engine.optim import build_optimizer, parameter_groups
from models import build_model
from models.mae import MaskedAutoencoder
from models.registry import config_file
from tasks import TASKS
from tests.conftest import golden
from tests.models.helpers import linear_weights, load, small_config
from tests.tasks.helpers import ALONE, attached, build_trainer, rows
from utils.errors import UserError
from utils.formats import read_file
from utils.runlog import RunLog

SMALL = {
    'DATA.DATASET': 'folder', 'DATA.IMAGE_SIZE': 16, 'DATA.BATCH_SIZE': 8, 'DATA.NUM_WORKERS': 0, 'DATA.CROP': 'resized',
    'MODEL.TRANS.PATCH_SIZE': 4, 'MODEL.TRANS.EMBED_DIM': 24, 'MODEL.TRANS.DEPTH': 2, 'MODEL.TRANS.NUM_HEADS': 3,
    'MODEL.MAE.DECODER_EMBED_DIM': 16, 'MODEL.MAE.DECODER_NUM_HEADS': 2, 'TRAIN.NUM_EPOCHS': 2, 'TRAIN.WARMUP_EPOCHS': 0,
    'TRAIN.LINEAR_SCALED_LR': None, 'TRAIN.BASE_LR': 2e-3, 'VALIDATE_FREQ': 1,
}  # fmt: skip


def recipe(name='mae_tiny_patch16_224', **changes):
    options = {**SMALL, **{key.replace('__', '.'): value for key, value in changes.items()}}
    return get_config(config_file(name), [item for pair in options.items() for item in pair])


def without_keys(name: str, array: np.ndarray) -> np.ndarray:
    """Key biases have zero gradients, which AdamW turns into noise."""
    if not name.endswith('qkv.bias'):
        return array
    third = len(array) // 3
    return np.delete(array, slice(third, 2 * third))


def test_steps_are_mae_lites():
    g = golden('mae_lite-pretrain_steps')
    meta = g.meta
    sizes = {name: value for name, value in meta['ctor'].items() if name != 'norm_eps'}
    model = load(MaskedAutoencoder(**sizes, mask_ratio=meta['mask_ratio'], norm_pix_loss=True), g.group('sd'))
    config = recipe(
        TRAIN__NUM_EPOCHS=meta['epochs'], TRAIN__WARMUP_EPOCHS=meta['warmup_epochs'],
        TRAIN__BASE_LR=meta['basic_lr_per_img'], TRAIN__LINEAR_SCALED_LR=1,
    )  # fmt: skip
    assert meta['weight_decay'] == config.TRAIN.WEIGHT_DECAY
    optimizer = build_optimizer(config, model)
    lr = lr_schedule(config, meta['batch_size'])
    for step, (images, noise) in enumerate(zip(g['in/imgs'], g['in/noise'])):
        epoch, index = divmod(step, meta['iters_per_epoch'])
        rate = lr(epoch + 1, index / meta['iters_per_epoch'])
        assert rate == pytest.approx(g['out/lr'][step], rel=1e-6)
        loss = model(paddle.to_tensor(images), paddle.to_tensor(noise)).loss
        assert loss.item() == pytest.approx(g['out/loss'][step], rel=2e-5)
        loss.backward()
        optimizer.set_lr(rate)
        optimizer.step()
        optimizer.clear_grad()
    linear = linear_weights(model)
    for name, value in model.state_dict().items():
        expected = g[f'out/final/{name}']
        expected = without_keys(name, expected.T if name in linear else expected)
        np.testing.assert_allclose(without_keys(name, value.numpy()), expected, atol=2e-5)


def test_tokens_are_decayed_and_tables_not_trained():
    model = build_model(recipe())
    decay = {id(p): group['weight_decay'] for group in parameter_groups(model, 0.05) for p in group['params']}
    decays = {name: decay.get(id(parameter)) for name, parameter in model.named_parameters()}
    assert decays['cls_token'] == decays['mask_token'] == 0.05
    assert decays['pos_embed'] is decays['decoder_pos_embed'] is None
    assert decays['norm.weight'] == decays['blocks.0.attn.qkv.bias'] == 0.0


def test_a_run(images, tmp_path):
    """Rows without accuracies; the best weights are those of the lowest loss; tables stay what they were."""
    config = recipe(DATA__DATA_PATH=images, TRAIN__NUM_EPOCHS=4)
    trainer = build_trainer(config, str(tmp_path / 'run'))
    table = trainer.model.pos_embed.numpy()
    trainer.fit()
    losses = [row['loss'] for row in rows(trainer, 'val')]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert trainer.state.best == min(losses)
    assert not any('acc1' in row for kind in ('train', 'val') for row in rows(trainer, kind))
    best = read_file(os.path.join(trainer.folder, 'best.pdparams'))
    np.testing.assert_array_equal(best['pos_embed'], table)


def test_resuming_in_an_epoch_changes_nothing(images, tmp_path):
    config = recipe(DATA__DATA_PATH=images, SAVE_STEPS=4)
    whole = build_trainer(config, str(tmp_path / 'whole'))
    saved = []
    save = whole._save
    whole._save = lambda: (save(), saved.append(read_file(os.path.join(whole.folder, 'last.pdparams'))))
    whole.fit()
    middle = next(state for state in saved if state['sampler']['samples'])
    assert middle['step'] == 4
    again = build_trainer(config, str(tmp_path / 'again'))
    again.snapshot.load_state_dict(middle, 'last.pdparams')
    again.fit()
    for name, value in whole.model.state_dict().items():
        np.testing.assert_array_equal(again.model.state_dict()[name], value)


def test_validation_hides_the_same_patches_whatever_the_batch(images, tmp_path):
    results, log = [], RunLog(str(tmp_path), 0)
    for batch in (3, 13):
        config = recipe(DATA__DATA_PATH=images, DATA__BATCH_SIZE_EVAL=batch)
        paddle.seed(0)
        model = build_model(config)
        loader = datasets.build_dataloader(config, datasets.build_dataset(config, 'val'), False)
        task = attached(config, model, training=False)
        results.append(evaluate(config, model, loader, ALONE, log, task, task.evaluator()))
    assert set(results[0]) == {'loss', 'images', 'skipped', 'seconds'}
    assert results[0]['loss'] == pytest.approx(results[1]['loss'], rel=1e-6)


def test_tasks_that_the_model_is_not_for():
    with pytest.raises(UserError, match='TRAIN.TASK mae needs MODEL.TYPE mae'):
        attached(recipe(), build_model(small_config('gmlp_digits')))
    with pytest.raises(UserError, match='MODEL.TYPE mae has no classifier'):
        config = recipe(TRAIN__TASK='supervised')
        attached(config, build_model(config))
    with pytest.raises(UserError, match="'mea'.*Did you mean 'mae'"):
        TASKS['mea']
