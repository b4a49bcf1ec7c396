# SPDX-License-Identifier: Apache-2.0
"""Contrastive pre-training in real runs: two processes with all training options, stopped, resumed, fine-tuned."""

import pytest

from tests.runs.conftest import check_that_it_resumes, metrics, run, train_on_two, write_recipe

PRE_TRAINING = """
DATA: {VIEWS: 2, CROP: resized}
MODEL:
  TYPE: mocov3
  NAME: tiny_mocov3
  TRANS: {PATCH_SIZE: 4, EMBED_DIM: 16, DEPTH: 2, NUM_HEADS: 2}
  MOCO: {DIM: 8, MLP_DIM: 16}
TRAIN: {TASK: mocov3, RAND_AUGMENT: false, RANDOM_ERASE_PROB: 0.0, RECOMPUTE: true}
"""
FINE_TUNING = """
MODEL:
  TYPE: vit
  NAME: tiny_vit
  TRANS: {PATCH_SIZE: 4, EMBED_DIM: 16, DEPTH: 2, NUM_HEADS: 2, GLOBAL_POOL: true}
TRAIN: {LAYER_DECAY: 0.75, NUM_EPOCHS: 1, WARMUP_EPOCHS: 0}
"""


@pytest.fixture(scope='module')
def recipe(tmp_path_factory, images):
    return write_recipe(tmp_path_factory.mktemp('mocov3'), images, PRE_TRAINING)


@pytest.fixture(scope='module')
def straight(recipe, tmp_path_factory):
    return train_on_two(recipe, tmp_path_factory.mktemp('straight'))


def test_a_stopped_run_resumes_bit_equal(recipe, straight, tmp_path):
    check_that_it_resumes(recipe, straight, tmp_path)


def test_neighbors_are_the_same_on_another_number_of_processes(recipe, straight, tmp_path):
    (last,) = (row for row in metrics(straight) if row['kind'] == 'val' and row['epoch'] == 3)
    flags = (f'-cfg={recipe}', f'-output={tmp_path}', '-eval', f'-resume={straight}', '-tag=eval', '-batch_size=4')
    out, _ = run('main_multi_gpu.py', *flags, NPROC='3')
    assert f'Validation kNN Acc@1: {last["knn_acc1"]:.4f}' in out
    (row,) = metrics(tmp_path / 'eval')
    assert [row[key] for key in ('knn_acc1', 'knn_acc5')] == [last[key] for key in ('knn_acc1', 'knn_acc5')]
    assert row['images'] == last['images'] == 13


def test_its_encoder_starts_a_classifier(straight, images, tmp_path):
    recipe = write_recipe(tmp_path, images, FINE_TUNING)
    out, _ = run('main_single_gpu.py', f'-cfg={recipe}', f'-pretrained={straight}', '-tag=fine')
    assert 'only pre-training uses them' in out and 'which is re-initialized' in out
    assert metrics(tmp_path / 'fine')[-1]['acc1'] > 0
