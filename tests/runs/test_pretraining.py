# SPDX-License-Identifier: Apache-2.0
"""Objectives without labels, from pre-training on two processes to a fine-tuned classifier."""

import numpy as np
import pytest
from PIL import Image
from visualdl import LogReader

from tasks.pictures import GAP
from tests.runs.conftest import check_that_it_resumes, metrics, run, train_on_two, write_recipe

ENCODER = """
DATA: {CROP: resized, IMAGE_SIZE: 32}
MODEL:
  TYPE: vit
  NAME: tiny_vit
  TRANS: {PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 2, NUM_HEADS: 2, GLOBAL_POOL: true}
"""
MAE = (
    ENCODER.replace('TYPE: vit', 'TYPE: mae').replace(', GLOBAL_POOL: true', '')
    + """
  MAE: {DECODER_EMBED_DIM: 16, DECODER_DEPTH: 1, DECODER_NUM_HEADS: 2}
TRAIN: {TASK: mae, RAND_AUGMENT: false, RANDOM_ERASE_PROB: 0.0, RECOMPUTE: true}
"""
)


@pytest.fixture(scope='module')
def recipe(tmp_path_factory, images):
    return write_recipe(tmp_path_factory.mktemp('mae'), images, MAE)


@pytest.fixture(scope='module')
def straight(recipe, tmp_path_factory):
    return train_on_two(recipe, tmp_path_factory.mktemp('straight'))


def test_the_loss_falls(straight):
    losses = [row['loss'] for row in metrics(straight) if row['kind'] == 'val']
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)


def test_a_stopped_run_resumes_bit_equal(recipe, straight, tmp_path):
    check_that_it_resumes(recipe, straight, tmp_path)


def test_each_validation_leaves_a_picture(straight):
    """Image, visible patches and reconstruction of the 7 of 13 images that the main process has."""
    pictures = sorted(straight.glob('*.png'))
    assert [path.name for path in pictures] == [f'reconstruction_{epoch:04d}.png' for epoch in (1, 2, 3)]
    sheets = [np.asarray(Image.open(path)) for path in pictures]
    assert sheets[0].shape == (7 * (32 + GAP) + GAP, 3 * (32 + GAP) + GAP, 3)
    given, rebuilt = np.s_[:, : 2 * (32 + GAP)], np.s_[:, 2 * (32 + GAP) :]
    np.testing.assert_array_equal(sheets[0][given], sheets[2][given])
    assert (sheets[0][rebuilt] != sheets[2][rebuilt]).any()
    (log,) = (straight / 'vdl').iterdir()
    assert len(LogReader(file_path=str(log)).get_data('image', 'reconstruction')) == 3


def test_evaluation_finds_the_loss_of_training(recipe, straight, tmp_path):
    """On another number of processes, with the same mask per image."""
    best = min(row['loss'] for row in metrics(straight) if row['kind'].startswith('val'))
    run('main_single_gpu.py', f'-cfg={recipe}', f'-output={tmp_path}', '-tag=eval', '-eval', f'-pretrained={straight}')
    (row,) = metrics(tmp_path / 'eval')
    assert row['loss'] == pytest.approx(best, rel=1e-6) and row['images'] == 13


def test_its_encoder_starts_a_classifier(straight, images, tmp_path):
    recipe = write_recipe(tmp_path, images, ENCODER)
    out, _ = run('main_single_gpu.py', f'-cfg={recipe}', f'-pretrained={straight}', '-opts', 'TRAIN.NUM_EPOCHS', '1')
    assert 'arrays of the model keep their initial values, the file normalizes before pooling: fc_norm' in out
    assert 'only pre-training uses them' in out and 'Finished: best Validation Acc@1' in out
