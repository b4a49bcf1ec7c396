# SPDX-License-Identifier: Apache-2.0
"""The linear probe: only the classifier learns, the model stays in evaluation mode, and runs resume and evaluate."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest

from config import get_arguments, get_config, update_config
from engine.run import run_config
from models import build_model, create_model
from models.registry import config_file
from models.weights.convert import port_state_dict
from models.weights.load import load_state
from tasks import build_task
from tests.conftest import assert_close
from tests.engine.curves import read_state
from tests.models.helpers import linear_weights
from utils.errors import UserError
from utils.formats import write_pdparams

SMALL = [
    'DATA.IMAGE_SIZE', 16, 'DATA.BATCH_SIZE', 4, 'DATA.NUM_WORKERS', 0, 'DATA.DATASET', 'folder', 'MODEL.TRANS.PATCH_SIZE', 4,
    'MODEL.TRANS.EMBED_DIM', 24, 'MODEL.TRANS.NUM_HEADS', 3, 'MODEL.TRANS.DEPTH', 2, 'TRAIN.NUM_EPOCHS', 2,
]  # fmt: skip
RECIPE = config_file('vit_small_patch16_224_mocov3_linear')


def quiet(line: str) -> None:
    pass


def attached(*opts):
    config = get_config(RECIPE, [*SMALL, 'MODEL.NUM_CLASSES', 3, *opts])
    task, model = build_task(config), build_model(config)
    task.attach(model, quiet, training=True)
    return task, model


def test_only_the_classifier_is_trained():
    _, model = attached('MODEL.DROPPATH', 0.5, 'MODEL.TRANS.DEPTH', 4)
    assert {name for name, p in model.named_parameters() if not p.stop_gradient} == {'head.weight', 'head.bias'}
    model.train()
    assert model.training and model.head.training and not model.blocks[3].training and not model.norm.training
    x = paddle.randn([2, 3, 16, 16])
    np.testing.assert_array_equal(model(x).numpy(), model(x).numpy())  # no stochastic depth
    model(x).sum().backward()
    assert model.blocks[0].mlp.fc1.weight.grad is None and model.head.weight.grad is not None


def test_the_classifier_is_initialized_small():
    _, model = attached('MODEL.TRANS.EMBED_DIM', 384, 'MODEL.NUM_CLASSES', 100)
    assert abs(float(model.head.weight.std()) - 0.01) < 5e-4
    assert float(model.head.bias.abs().max()) == 0


@pytest.mark.parametrize('name', ['gmlp_ti16_224', 'ms_mlp_tiny_patch4_shift5_224', 'deit_tiny_distilled_patch16_224'])
def test_every_classifier_can_be_frozen(name):
    model = create_model(name, num_classes=3)
    heads = model.freeze_backbone()
    assert heads and all(part.startswith('head') for part in heads)
    assert {n for n, p in model.named_parameters() if not p.stop_gradient} == set(heads)


def test_models_without_a_classifier_are_refused():
    config = get_config(opts=['MODEL.TYPE', 'segmenter', 'TRAIN.TASK', 'linear_probe', 'MODEL.NUM_CLASSES', 3])
    with pytest.raises(UserError, match='linear_probe needs a classifier, but MODEL.TYPE is segmenter'):
        build_task(config).attach(build_model(config), quiet, training=True)


def test_batch_normalization_before_the_classifier():
    """MAE's probe: the classifier sees features normalized by the batch, and in evaluation by running statistics."""
    _, model = attached('MODEL.TRANS.HEAD_NORM', True)
    assert {name for name, p in model.named_parameters() if not p.stop_gradient} == {'head.weight', 'head.bias'}
    model.train()
    x = paddle.randn([8, 3, 16, 16])
    features = model.forward_head(model.forward_features(x), pre_logits=True).numpy()
    weight = model.head.weight.numpy()
    normalized = (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-6)
    assert_close(model(x), normalized @ weight, 1e-4)
    model.eval()  # after one step, the running statistics are 0.9 times (0, 1) and 0.1 times those of the batch
    normalized = (features - 0.1 * features.mean(0)) / np.sqrt(0.9 + 0.1 * features.var(0, ddof=1) + 1e-6)
    assert_close(model(x), normalized @ weight, 1e-5)
    model.reset_classifier(0)
    assert_close(model(x), features, 1e-6)


def test_weights_of_the_probe():
    """Names of MAE's code; a file without the statistics starts a training, and evaluation names the key."""
    config = get_config(RECIPE, [*SMALL, 'MODEL.NUM_CLASSES', 3, 'MODEL.TRANS.HEAD_NORM', True])
    model, plain = build_model(config), build_model(get_config(RECIPE, [*SMALL, 'MODEL.NUM_CLASSES', 3]))
    statistics = {'head.0.running_mean': np.arange(24.0), 'head.0.running_var': 2 + np.arange(24.0)}
    body = {name: value.numpy() for name, value in plain.state_dict().items()}
    source = {name: array.T if name in linear_weights(plain) else array for name, array in body.items()}
    source = {name.replace('head.', 'head.1.'): array for name, array in source.items()}
    ported = port_state_dict(model, {**source, **statistics, 'head.0.num_batches_tracked': np.array(3)})
    np.testing.assert_array_equal(ported['head_norm._variance'], 2 + np.arange(24.0))
    np.testing.assert_array_equal(ported['head.weight'], body['head.weight'])
    load_state(model, ported, replace_head=False)
    with pytest.raises(UserError, match='set MODEL.TRANS.HEAD_NORM to True'):
        load_state(plain, ported)
    with pytest.raises(UserError, match='set MODEL.TRANS.HEAD_NORM to False'):
        load_state(model, body, replace_head=False)
    lines: list[str] = []
    load_state(build_model(config), body, log=lines.append)
    assert any('the file has no batch normalization before the classifier' in line for line in lines)


def test_one_classifier_only():
    with pytest.raises(UserError, match='HEAD_NORM is for models with one classifier'):
        attached('MODEL.TRANS.HEAD_NORM', True, 'MODEL.TRANS.DISTILLED', True)


def run(images, folder, *flags, opts=()):
    words = [str(word) for word in (*SMALL, 'MODEL.TRANS.HEAD_NORM', True, *opts)]
    line = [f'-cfg={RECIPE}', f'-data_path={images}', f'-output={folder}', *flags, '-opts', *words]
    run_config(update_config(get_config(), get_arguments(line)))


def test_a_run_from_pre_trained_weights(images, tmp_path):
    """The weights of the encoder are equal before and after, the classifier is not; evaluation and resume work.

    With batch normalization, which adds its statistics to what is saved.
    """
    encoder = build_model(get_config(RECIPE, [*SMALL, 'MODEL.NUM_CLASSES', 0]))
    state = {f'base_encoder.{name}': value.numpy() for name, value in encoder.state_dict().items()}
    write_pdparams(state, str(tmp_path / 'moco.pdparams'))
    run(images, tmp_path, f'-pretrained={tmp_path}/moco.pdparams', '-tag=run')
    trained = read_state(str(tmp_path / 'run' / 'last.pdparams'))
    for name, value in encoder.state_dict().items():
        np.testing.assert_array_equal(trained['model'][name], value.numpy(), err_msg=name)
    assert np.abs(trained['model']['head.weight']).max() > 0.05
    assert np.abs(trained['model']['head_norm._mean']).max() > 0.01
    assert {name for kind in trained['optimizer'].values() for name in kind} == {'head.weight', 'head.bias'}
    run(images, tmp_path, f'-pretrained={tmp_path}/run', '-eval', '-tag=eval')
    run(images, tmp_path, f'-resume={tmp_path}/run', opts=('TRAIN.NUM_EPOCHS', 3))
    with open(tmp_path / 'run' / 'metrics.jsonl', encoding='utf-8') as file:
        epochs = [row['epoch'] for row in map(json.loads, file) if row['kind'] == 'train']
    assert epochs == [1, 2, 3]
