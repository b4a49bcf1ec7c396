# SPDX-License-Identifier: Apache-2.0
"""Contrastive pre-training in real runs: on two processes with all that the loop offers, stopped, resumed, fine-tuned."""

import signal

import pytest

from tests.runs.conftest import CONFIG, assert_same, learnt, metrics, run, send, start, state, wait_for

PRE_TRAINING = """
BASE: [tiny.yaml]
DATA: {VIEWS: 2, CROP: resized}
MODEL:
  TYPE: mocov3
  NAME: tiny_mocov3
  TRANS: {PATCH_SIZE: 4, EMBED_DIM: 16, DEPTH: 2, NUM_HEADS: 2}
  MOCO: {DIM: 8, MLP_DIM: 16}
TRAIN: {TASK: mocov3, RAND_AUGMENT: false, RANDOM_ERASE_PROB: 0.0, RECOMPUTE: true}
"""
FINE_TUNING = """
BASE: [tiny.yaml]
MODEL:
  TYPE: vit
  NAME: tiny_vit
  TRANS: {PATCH_SIZE: 4, EMBED_DIM: 16, DEPTH: 2, NUM_HEADS: 2, GLOBAL_POOL: true}
TRAIN: {LAYER_DECAY: 0.75, NUM_EPOCHS: 1, WARMUP_EPOCHS: 0}
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory, images):
    """Recipes, and a run of two processes from start to end."""
    folder = tmp_path_factory.mktemp('mocov3')
    (folder / 'tiny.yaml').write_text(CONFIG.format(data=images, output=folder))
    (folder / 'pre.yaml').write_text(PRE_TRAINING)
    (folder / 'fine.yaml').write_text(FINE_TUNING)
    run('main_multi_gpu.py', f'-cfg={folder / "pre.yaml"}', '-tag=straight', NPROC='2')
    return folder


def test_a_run_resumes_in_an_epoch(folder):
    flags = (f'-cfg={folder / "pre.yaml"}', '-tag=cut')
    process = start('main_multi_gpu.py', *flags, NPROC='2')
    wait_for(folder / 'cut' / 'log.txt', 'Epoch[002/003], Step[0001/', process)
    status, out, err = send(process, signal.SIGTERM)
    assert status == 143, out + err
    assert state(folder / 'cut')['epoch'] in (1, 2)
    run('main_multi_gpu.py', *flags, NPROC='2')
    assert_same(learnt(folder / 'cut'), learnt(folder / 'straight'))


def test_neighbours_are_the_same_on_another_number_of_processes(folder):
    (last,) = (row for row in metrics(folder / 'straight') if row['kind'] == 'val' and row['epoch'] == 3)
    flags = (f'-cfg={folder / "pre.yaml"}', '-eval', f'-resume={folder / "straight"}', '-tag=eval', '-batch_size=4')
    out, _ = run('main_multi_gpu.py', *flags, NPROC='3')
    assert f'Validation kNN Acc@1: {last["knn_acc1"]:.4f}' in out
    assert_same(
        *({key: row[key] for key in ('knn_acc1', 'knn_acc5', 'images')} for row in (last, metrics(folder / 'eval')[-1]))
    )


def test_its_encoder_starts_a_classifier(folder):
    flags = (f'-cfg={folder / "fine.yaml"}', f'-pretrained={folder / "straight"}', '-tag=fine')
    out, _ = run('main_single_gpu.py', *flags)
    assert 'they serve the pre-training only' in out and 'which starts anew' in out
    assert metrics(folder / 'fine')[-1]['acc1'] > 0
