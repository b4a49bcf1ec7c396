# SPDX-License-Identifier: Apache-2.0
"""EViT with all training options, and the use of its weights."""

import json

import numpy as np
import pytest

from config import get_config
from models import build_model
from models.weights.load import load_pretrained
from tests.runs.conftest import check_that_it_resumes, metrics, run, train_on_two, write_recipe

EVIT = """
DATA: {CROP: resized, IMAGE_SIZE: 32}
MODEL:
  TYPE: evit
  NAME: tiny_evit
  NUM_CLASSES: 3
  TRANS: {PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 3, NUM_HEADS: 2}
  EVIT: {KEEP_RATE: 0.5, DROP_LOC: [1, 2], FUSE_TOKEN: true, SHRINK_START_EPOCH: 1, SHRINK_EPOCHS: 1}
TRAIN: {RECOMPUTE: true, REPEATED_AUG: 0}
"""


@pytest.fixture(scope='module')
def recipe(tmp_path_factory, images):
    return write_recipe(tmp_path_factory.mktemp('evit'), images, EVIT)


@pytest.fixture(scope='module')
def straight(recipe, tmp_path_factory):
    return train_on_two(recipe, tmp_path_factory.mktemp('straight'), '-amp')


def test_evit_resumes_inside_its_keep_rate_schedule(recipe, straight, tmp_path):
    """Recompute, EMA, accumulation, clipping, dropout, -amp, two processes; stopped where the rate falls."""
    check_that_it_resumes(recipe, straight, tmp_path, '-amp')


def test_only_the_final_keep_rate_can_be_the_best(straight):
    """Validation in the first two epochs uses more tokens than the final model."""
    log = (straight / 'log.txt').read_text()
    assert 'keep_rate: 1\n' in log and 'keep_rate: 0.5\n' in log
    rows = [row for row in metrics(straight) if row['kind'].startswith('val')]
    final = max(row['acc1'] for row in rows if row['epoch'] == 3)
    assert f'best Validation Acc@1: {final:.4f} after epoch 3' in log


def test_evit_weights_export_and_predict(recipe, straight, images, tmp_path):
    """The exported program and the predictions agree with the model."""
    run('tools/export.py', f'-cfg={recipe}', f'-pretrained={straight}', f'-output={tmp_path / "exported"}')
    assert (tmp_path / 'exported.json').exists() and (tmp_path / 'exported.pdiparams').exists()
    output = tmp_path / 'predictions.json'
    run('tools/predict.py', f'-cfg={recipe}', f'-pretrained={straight}', f'-output={output}', f'{images}/val/class0')
    assert len(json.loads(output.read_text())) == 5


def test_a_trained_model_evaluates_at_any_other_keep_rate(recipe, straight):
    model = build_model(get_config(recipe))
    load_pretrained(model, str(straight / 'best.pdparams'))
    model.eval()
    x = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype('float32')
    import paddle

    outputs = []
    for rate in (None, 1.0, 0.75):
        logits, kept = model(paddle.to_tensor(x), keep_rate=rate, get_idx=True)
        outputs.append((logits.numpy(), [index.shape[1] for index in kept]))
    assert [counts for _, counts in outputs] == [[8, 5], [], [12, 10]]
    assert not np.allclose(outputs[0][0], outputs[1][0])
