# SPDX-License-Identifier: Apache-2.0
"""Pre-training with a teacher's attention, against MAE-Lite."""

import os

import numpy as np
import paddle
import pytest

from config import get_config
from models import build_model
from models.mae import MaskedAutoencoder
from models.weights.convert import port_state_dict
from models.weights.load import load_pretrained
from tasks.mae import MAETask
from tasks.mae_distillation import DistillTargets, MaeDistillation, adapt_student, add_adapters
from tests.conftest import assert_close, golden
from tests.models.helpers import linear_weights, load
from tests.tasks.helpers import attached, batch_of, build_trainer
from tests.tasks.test_mae import recipe
from utils.errors import UserError
from utils.formats import read_file, write_pdparams


@pytest.mark.parametrize('name', ['attn', 'mixed', 'noadapter'])
def test_losses_and_gradients(name):
    g = golden(f'mae_lite-distill_{name}')
    meta, arrays = g.meta, g.group('sd')
    heads = meta['use_attn_adapter'] or meta['student']['num_heads'] != meta['teacher']['num_heads']
    width = meta['use_hidden_adapter'] or meta['student']['embed_dim'] != meta['teacher']['embed_dim']
    compared = DistillTargets(tuple(meta['attn_idx']), tuple(meta['hidden_idx']))
    student = MaskedAutoencoder(**meta['student'], mask_ratio=meta['mask_ratio'], norm_pix_loss=True)
    sizes = meta['teacher']['num_heads'] if heads else None, meta['teacher']['embed_dim'] if width else None
    add_adapters(student, compared, *sizes)
    load(student, {name: array for name, array in arrays.items() if not name.startswith('tch_model.')})
    teacher = MaskedAutoencoder(**{**meta['teacher'], 'decoder_depth': 0})
    theirs = {name[len('tch_model.') :]: array for name, array in arrays.items() if name.startswith('tch_model.')}
    state = port_state_dict(teacher, theirs)
    teacher.set_state_dict({name: paddle.to_tensor(array) for name, array in state.items()})
    teacher.eval()

    task = MAETask(recipe(
        TRAIN__MAE_DISTILL__ATTN_ALPHA=meta['attn_alpha'], TRAIN__MAE_DISTILL__HIDDEN_ALPHA=meta['hidden_alpha'],
        TRAIN__MAE_DISTILL__ATTN_IDX=meta['attn_idx'], TRAIN__MAE_DISTILL__HIDDEN_IDX=meta['hidden_idx'],
    ))  # fmt: skip
    task.distillation = MaeDistillation(student, teacher, compared)
    images, noise = paddle.to_tensor(g['in/imgs']), paddle.to_tensor(g['in/noise'])
    task._noise = lambda *_: noise
    output = student(images, noise, **task.distillation.request)
    for block, logits in zip(meta['attn_idx'], task.distillation.adapted(output.encoder)['attn']):
        assert_close(logits, g[f'out/adapted_attn{block}'])
    losses = task.loss(student, batch_of(images), np.random.default_rng(0))
    loss = losses.total
    assert loss.item() == pytest.approx(g['out/loss'].item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(g['out/mae_loss'].item(), rel=1e-5)
    assert losses.parts.keys() == task.parts.keys()
    for part, value in losses.parts.items():
        assert value.item() == pytest.approx(g[f'out/loss_{part}'].item(), rel=1e-4)
    loss.backward()
    parameters, linear = dict(student.named_parameters()), linear_weights(student)
    for key, gradient in g.group('out/grad').items():
        key = key.removeprefix('model.')
        assert_close(parameters[key].grad, gradient.T if key in linear else gradient, 1e-3)
    assert [name for name, parameter in teacher.named_parameters() if parameter.grad is not None] == []


def distilled(tmp_path, images, **changes):
    """A recipe whose teacher is a wider autoencoder of random weights."""
    cfg, weights = tmp_path / 'teacher.yaml', str(tmp_path / 'teacher.pdparams')
    settings = recipe(MODEL__TRANS__EMBED_DIM=32, MODEL__TRANS__NUM_HEADS=4)
    cfg.write_text(settings.dump())
    write_pdparams(build_model(settings).state_dict(), weights)
    return recipe(**{
        'DATA__DATA_PATH': images, 'TRAIN__TEACHER_CFG': str(cfg), 'TRAIN__TEACHER_MODEL': weights,
        'TRAIN__MAE_DISTILL__ATTN_IDX': (2,), 'TRAIN__MAE_DISTILL__HIDDEN_IDX': (0, 2), **changes,
    })  # fmt: skip


def test_a_run(tmp_path, images):
    """Adapters are trained and saved, the teacher is not; parts of the loss are logged."""
    config = distilled(tmp_path, images, REPORT_FREQ=1)
    trainer = build_trainer(config, str(tmp_path / 'run'))
    before = trainer.model.attn_adapter.adapter1.weight.numpy()
    teacher = {name: value.numpy() for name, value in trainer.task.distillation.teacher.state_dict().items()}
    trainer.fit()
    assert not np.array_equal(trainer.model.attn_adapter.adapter1.weight, before)
    for name, value in trainer.task.distillation.teacher.state_dict().items():
        np.testing.assert_array_equal(value, teacher[name])
    saved = read_file(os.path.join(trainer.folder, 'last.pdparams'))['model']
    assert saved['attn_adapter.adapter1.weight'].shape == (4, 3, 1, 1)
    assert {name for name in saved if 'adapter' in name} == {
        'attn_adapter.adapter1.weight', 'hidden_adapter.adapter0.weight', 'hidden_adapter.adapter2.weight',
    }  # fmt: skip
    with open(os.path.join(trainer.folder, 'log.txt'), encoding='utf-8') as file:
        assert ', attn: ' in file.read()


def test_adapters_are_loaded_with_the_weights(tmp_path, images):
    """A run that starts from the weights of a distillation starts from its adapters too; other models do not use them."""
    config, lines = distilled(tmp_path, images), []
    weights = build_model(config)
    adapt_student(config, weights)
    write_pdparams(weights.state_dict(), str(tmp_path / 'run.pdparams'))
    student = build_model(config)
    attached(config, student)
    load_pretrained(student, str(tmp_path / 'run.pdparams'), log=lines.append)
    for name, value in weights.state_dict().items():
        np.testing.assert_array_equal(student.state_dict()[name], value)
    load_pretrained(build_model(config), str(tmp_path / 'run.pdparams'), log=lines.append)
    assert '3 arrays' in lines[-1] and 'are not used' in lines[-1]


def test_a_published_file_may_be_the_teacher(tmp_path, images):
    """In PyTorch's names and layouts, with an unused decoder."""
    config = distilled(tmp_path, images)
    state = read_file(config.TRAIN.TEACHER_MODEL)
    linear = linear_weights(build_model(get_config(config.TRAIN.TEACHER_CFG)))
    arrays = {name: array.T if name in linear else array for name, array in state.items()}
    np.savez(tmp_path / 'published.npz', **arrays)
    config = distilled(tmp_path, images, TRAIN__TEACHER_MODEL=str(tmp_path / 'published.npz'))
    task = attached(config, build_model(config))
    for name, value in task.distillation.teacher.state_dict().items():
        np.testing.assert_array_equal(value, state[name])
    assert all(parameter.stop_gradient for parameter in task.distillation.teacher.parameters())


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'TRAIN__TEACHER_CFG': None}, 'set TRAIN.TEACHER_CFG'),
        ({'TRAIN__TEACHER_MODEL': None}, 'set TRAIN.TEACHER_MODEL'),
        ({'TRAIN__TEACHER_MODEL': 'gone.pdparams'}, 'gone.pdparams'),
        ({'TRAIN__MAE_DISTILL__ATTN_IDX': (3,)}, 'ATTN_IDX names 3, but must be 1 to 2'),
        ({'MODEL__TRANS__PATCH_SIZE': 8}, 'patches of 8 pixels'),
    ],
)
def test_mistakes(tmp_path, images, changes, words):
    config = distilled(tmp_path, images, **changes)
    with pytest.raises(UserError) as caught:
        attached(config, build_model(config))
    assert words in str(caught.value)
