# SPDX-License-Identifier: Apache-2.0
"""Attention removal in a real run with EViT, ToMe and all training options, stopped and resumed."""

import signal

import numpy as np
import pytest

from config import get_config
from models import build_model
from tests.runs.conftest import CONFIG, assert_same, learnt, metrics, run, send, start, state, wait_for

FADING = """
BASE: [tiny.yaml]
DATA: {CROP: resized, IMAGE_SIZE: 32}
MODEL:
  TYPE: vit
  NAME: tiny_fading
  NUM_CLASSES: 3
  TRANS: {PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 4, NUM_HEADS: 2, FROZEN_STAGES: 0}
  EVIT: {KEEP_RATE: 0.8, DROP_LOC: [2], SHRINK_EPOCHS: 1}
  LAMBDA: {PRUNE_LAYERS: [1, 3], DECAY_EPOCHS: 2}
  TOME: {R: 2, START_IDX: 1}
TRAIN: {RECOMPUTE: true}
"""


@pytest.fixture(scope='module')
def recipe(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp('fading')
    (folder / 'tiny.yaml').write_text(CONFIG.format(data=images, output=folder))
    (folder / 'fading.yaml').write_text(FADING)
    return str(folder / 'fading.yaml')


@pytest.fixture(scope='module')
def straight(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp('straight')
    run('main_multi_gpu.py', f'-cfg={recipe}', f'-output={folder}', '-tag=run', NPROC='2')
    return folder / 'run'


def test_a_run_resumes_while_attention_decays(recipe, straight, tmp_path):
    flags = (f'-cfg={recipe}', f'-output={tmp_path}', '-tag=cut')
    process = start('main_multi_gpu.py', *flags, NPROC='2')
    wait_for(tmp_path / 'cut' / 'log.txt', 'Epoch[002/003], Step[0001/', process)
    status, out, err = send(process, signal.SIGTERM)
    assert status == 143, out + err
    assert state(tmp_path / 'cut')['model']['attn_lambda'].tolist() == [1, 0.5, 1, 0.5]
    run('main_multi_gpu.py', *flags, f'-resume={tmp_path / "cut"}', NPROC='2')
    assert_same(learnt(tmp_path / 'cut'), learnt(straight))


def test_only_a_model_without_that_attention_can_be_the_best(straight):
    log = (straight / 'log.txt').read_text()
    assert all(f'attn_lambda: {value}\n' in log for value in ('1', '0.5', '0'))
    final = max(row['acc1'] for row in metrics(straight) if row['kind'].startswith('val') and row['epoch'] == 3)
    assert f'best Validation Acc@1: {final:.4f} after epoch 3' in log
    assert state(straight, 'best.pdparams')['attn_lambda'].tolist() == [1, 0, 1, 0]


def test_frozen_weights_and_removed_attention_do_not_change(recipe, straight):
    """The attention of the last epoch is that of the one before, the frozen embedding that of the start."""
    before, after = (state(straight, f'epoch_{epoch:04d}.pdparams')['model'] for epoch in (2, 3))
    resting = (
        'patch_embed.',
        'pos_embed',
        'cls_token',
        'blocks.0.',
        *(f'blocks.{i}.{p}.' for i in (1, 3) for p in ('norm1', 'attn')),
    )
    for name, value in after.items():
        if name not in ('attn_lambda', 'StructuredToParameterName@@'):
            assert np.array_equal(value, before[name]) == name.startswith(resting), name


def test_a_finished_run_evaluates_without_the_attention(recipe, straight, tmp_path):
    best = max(row['acc1'] for row in metrics(straight) if row['kind'].startswith('val') and row['epoch'] == 3)
    for options in ((), ('-opts', 'MODEL.LAMBDA.REMOVED', 'True')):
        tag = f'removed{len(options)}'
        run(
            'main_single_gpu.py',
            f'-cfg={recipe}',
            f'-output={tmp_path}',
            f'-tag={tag}',
            '-eval',
            f'-pretrained={straight}',
            *options,
        )
        (row,) = metrics(tmp_path / tag)
        assert row['acc1'] == best
    small = build_model(get_config(recipe, ['MODEL.LAMBDA.REMOVED', True]))
    assert not [name for name in small.state_dict() if name.startswith(('blocks.1.attn', 'attn_lambda'))]


def test_unfinished_weights_are_refused(recipe, straight, tmp_path):
    _, err = run(
        'main_single_gpu.py', f'-cfg={recipe}', f'-output={tmp_path}', '-eval',
        f'-pretrained={straight}/epoch_0002.pdparams', '-opts', 'MODEL.LAMBDA.REMOVED', 'True', status=2,
    )  # fmt: skip
    assert 'block 1 has the weight 0.5, but in the model 0' in err and 'Traceback' not in err
