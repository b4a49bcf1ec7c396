# SPDX-License-Identifier: Apache-2.0
"""`benchmark` and `plan` on segmentation models: rows of encoders with removed attention, by the shape of the task."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from config import get_config
from models import build_model
from models.profile import profile
from tests.runs.conftest import metrics, run
from tools import benchmark, plan
from utils.formats import write_pdparams

CONFIG = """
DATA: {{DATASET: segmentation, DATA_PATH: '{data}', IMAGE_SIZE: 32, IMAGE_SCALE: [128, 32], NUM_WORKERS: 0}}
MODEL:
  TYPE: {kind}
  NAME: tiny_{kind}
  NUM_CLASSES: 2
  TRANS: {{PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 4, NUM_HEADS: 2}}
  {own}
TRAIN: {{TASK: segmentation, RANDOM_ERASE_PROB: 0.0}}
SAVE: '{data}/out'
"""
OWN = {'segmenter': 'SEGMENTER: {DECODER: linear}', 'upernet': 'UPERNET: {OUT_INDICES: [0, 1, 2, 3], CHANNELS: 8}'}
REMOVED = ['MODEL.LAMBDA.PRUNE_LAYERS', (0, 2), 'MODEL.LAMBDA.REMOVED', True]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Configurations of a model of each kind, and a validation set of four images."""
    rng = np.random.default_rng(0)
    (tmp_path / 'classes.txt').write_text('dark\nbright\n')
    for kind in ('images', 'annotations'):
        os.makedirs(tmp_path / kind / 'val')
    for number in range(4):
        labels = rng.integers(0, 2, (32, 40)).astype('uint8')
        Image.fromarray(labels).save(tmp_path / 'annotations' / 'val' / f'{number}.png')
        Image.fromarray((labels[..., None] * [90, 120, 60]).astype('uint8')).save(tmp_path / f'images/val/{number}.png')
    for kind, own in OWN.items():
        (tmp_path / f'{kind}.yaml').write_text(CONFIG.format(data=tmp_path, kind=kind, own=own))
    return {kind: str(tmp_path / f'{kind}.yaml') for kind in OWN}


def cost(path, size, *opts):
    return profile(build_model(get_config(path, list(opts))), [1, 3, *size])


def test_rows_of_removed_attention(files, tmp_path, capsys):
    """The same names, crops of another ratio; attention costs parameters and MACs."""
    lean = tmp_path / 'lean.yaml'
    lean.write_text('BASE: [upernet.yaml]\nMODEL: {LAMBDA: {PRUNE_LAYERS: [0, 2], REMOVED: True}}\n')
    flags = ['-batch_size=2', '-rounds=2', f'-json={tmp_path / "out.json"}']
    benchmark.main([files['upernet'], str(lean), *flags, '-opts', 'DATA.CROP_SIZE', '[32,48]'])
    dense, removed = json.loads((tmp_path / 'out.json').read_text())['models']
    assert dense['image_size'] == removed['image_size'] == [32, 48]
    for row, opts in ((dense, []), (removed, REMOVED)):
        expected = cost(files['upernet'], (32, 48), *opts)
        assert (row['params'], row['macs']) == (expected.params, expected.macs)
        assert row['images_per_second'] > 0 and row['latency_ms'] > 0
    assert removed['params'] < dense['params'] and removed['macs'] < dense['macs']
    assert str(lean) in capsys.readouterr().out


def test_plan(files, tmp_path, capsys):
    """Rows by removed attention with the mIoU that an evaluation gives; keep rates and merging are left out with a reason."""
    weights, rng = str(tmp_path / 'weights.pdparams'), np.random.default_rng(0)
    state = build_model(get_config(files['segmenter'])).state_dict()
    write_pdparams({name: rng.normal(0, 0.5, value.shape).astype('float32') for name, value in state.items()}, weights)
    flags = [f'-cfg={files["segmenter"]}', f'-output={tmp_path / "plan"}', '-rounds=2', '-batch_size=2']
    plan.main([*flags, '-remove=none;0,2', '-keep_rates=1,0.5', '-r=0,3', f'-pretrained={weights}'])
    result = json.loads((tmp_path / 'plan' / 'results.json').read_text())
    assert result['frontier'] == ['images_per_second', 'miou']
    assert [row['remove'] for row in result['points']] == [[], [0, 2]]
    assert len(result['left_out']) == 6
    assert all('MODEL.EVIT' in row['reason'] or 'MODEL.TOME' in row['reason'] for row in result['left_out'])
    for row, opts in zip(result['points'], ([], REMOVED)):
        expected = cost(files['segmenter'], (32, 32), *opts)
        assert (row['params'], row['macs']) == (expected.params, expected.macs)
        assert 0 <= row['miou'] <= row['aacc'] <= 1
    out = capsys.readouterr().out
    assert 'mIoU' in out.partition('latency ms')[2].partition('\n')[0]
    assert (tmp_path / 'plan' / 'pareto.png').stat().st_size > 0
    row = next(row for row in result['points'] if row['yaml'])
    flags = (f'-cfg={tmp_path / "plan" / row["yaml"]}', '-eval', f'-pretrained={weights}', '-tag=eval')
    run('main_single_gpu.py', *flags, f'-output={tmp_path}')
    assert metrics(tmp_path / 'eval')[-1]['miou'] == row['miou']
