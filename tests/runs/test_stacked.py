# SPDX-License-Identifier: Apache-2.0
"""Removed attention, EViT and ToMe in one model: everything the suite does with a model, with this one."""

import json

import numpy as np
import paddle
import pytest

from config import get_config
from models import build_model
from models.exported import Predictor
from models.weights.load import load_pretrained
from tests.runs.conftest import check_that_it_resumes, metrics, run, train_on_two, write_recipe

STACKED = """
DATA: {CROP: resized, IMAGE_SIZE: 32}
MODEL:
  TYPE: vit
  NAME: tiny_stacked
  NUM_CLASSES: 3
  TRANS: {PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 4, NUM_HEADS: 2}
  LAMBDA: {PRUNE_LAYERS: [0], REMOVED: true}
  EVIT: {KEEP_RATE: 0.75, DROP_LOC: [1, 3], FUSE_TOKEN: true, SHRINK_EPOCHS: 2}
  TOME: {R: 2}
TRAIN: {RECOMPUTE: true}
"""
# 16 patches; blocks 1 and 3 keep three quarters and a fused token, then 2 tokens are merged in each block but the first
COUNTS = (16, 11, 9, 6)


@pytest.fixture(scope='module')
def recipe(tmp_path_factory, images):
    return write_recipe(tmp_path_factory.mktemp('stacked'), images, STACKED)


@pytest.fixture(scope='module')
def straight(recipe, tmp_path_factory):
    return train_on_two(recipe, tmp_path_factory.mktemp('straight'))


@pytest.fixture(scope='module')
def trained(recipe, straight):
    """The model with the weights of the best evaluation."""
    model = build_model(get_config(recipe))
    load_pretrained(model, str(straight / 'best.pdparams'))
    model.eval()
    return model


@pytest.fixture
def pictures():
    return np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype('float32')


def test_a_stopped_run_resumes_bit_equal(recipe, straight, tmp_path):
    check_that_it_resumes(recipe, straight, tmp_path)


def test_all_three_act(trained, pictures):
    """No attention in block 0, tokens dropped and fused in blocks 1 and 3, merged in 1, 2 and 3; each changes the result."""
    x = paddle.to_tensor(pictures)
    with paddle.no_grad():
        _, state = trained.forward_tokens(x)
        logits = trained(x)
        every_token = trained(x, keep_rate=1.0)
        trained.merge_tokens(0)
        unmerged = trained(x)
        trained.merge_tokens(2)
        np.testing.assert_array_equal(trained(x), logits)
    assert state.counts == COUNTS
    assert len(state.indices) == 2
    assert float(state.size.max()) > 1
    assert not [name for name in trained.state_dict() if name.startswith(('blocks.0.attn', 'blocks.0.norm1'))]
    for other in (every_token, unmerged):
        assert float((other - logits).abs().max()) > 1e-4


def test_its_weights_evaluate_to_what_training_saw(recipe, straight, tmp_path):
    best = max(row['acc1'] for row in metrics(straight) if row['kind'].startswith('val') and row['epoch'] == 3)
    run('main_multi_gpu.py', f'-cfg={recipe}', f'-output={tmp_path}', '-tag=eval', '-eval',
        f'-pretrained={straight}/best.pdparams', NPROC='2')  # fmt: skip
    (row,) = metrics(tmp_path / 'eval')
    assert row['acc1'] == best
    assert row['images'] == 13


def test_its_exported_program_computes_the_same(recipe, straight, trained, pictures, tmp_path):
    run('tools/export.py', f'-cfg={recipe}', f'-pretrained={straight}', f'-output={tmp_path / "net"}')
    with paddle.no_grad():
        np.testing.assert_allclose(
            Predictor(str(tmp_path / 'net'))(pictures), trained(paddle.to_tensor(pictures)), 1e-4, 1e-5
        )


def test_it_predicts(recipe, straight, images, tmp_path):
    output = tmp_path / 'predictions.json'
    run('tools/predict.py', f'-cfg={recipe}', f'-pretrained={straight}', f'-output={output}', f'{images}/val')
    rows = json.loads(output.read_text())
    assert len(rows) == 13
    for row in rows:
        assert sum(entry['probability'] for entry in row['predictions']) == pytest.approx(1, abs=1e-5)
    right = np.mean([f'class{row["predictions"][0]["class"]}' in row['image'] for row in rows])
    best = max(row['acc1'] for row in metrics(straight) if row['kind'].startswith('val') and row['epoch'] == 3)
    assert right == pytest.approx(best)
