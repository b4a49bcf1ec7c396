# SPDX-License-Identifier: Apache-2.0
"""Weights and number of classes of an evaluation, and the configuration of a finished run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from config import get_config
from engine.run import run_config
from models import build_model
from utils.errors import UserError
from utils.formats import write_pdparams

SMALL = {
    'DATA.IMAGE_SIZE': 16, 'DATA.NUM_WORKERS': 0, 'DATA.BATCH_SIZE': 4, 'DATA.BATCH_SIZE_EVAL': 4, 'EVAL': True,
    'MODEL.TYPE': 'gmlp', 'MODEL.MIXER.PATCH_SIZE': 8, 'MODEL.MIXER.EMBED_DIM': 8, 'MODEL.MIXER.DEPTH': 1,
    'MODEL.MIXER.MLP_RATIO': 2, 'TAG': 'run',
}  # fmt: skip


def configured(**options):
    options = {**SMALL, **{key.replace('__', '.'): value for key, value in options.items()}}
    config = get_config(opts=[item for pair in options.items() for item in pair])
    config.defrost()
    return config


@pytest.fixture
def subset(tmp_path):
    """Weights of 20 classes whose answer is always 12, and a list of images of the classes 3 and 12."""
    model = build_model(configured(MODEL__NUM_CLASSES=20))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    state['head.bias'] = np.eye(20, dtype='float32')[12]
    state['head.weight'] = np.zeros_like(state['head.weight'])
    write_pdparams(state, str(tmp_path / 'w.pdparams'))
    for name in ('a', 'b', 'c', 'd'):
        Image.new('RGB', (16, 16)).save(tmp_path / f'{name}.png')
    (tmp_path / 'val_list.txt').write_text('a.png 3\nb.png 12\nc.png 12\nd.png 12\n')
    return tmp_path


@pytest.mark.parametrize('kind', ['pretrained', 'resume'])
def test_a_list_of_some_classes_is_evaluated_with_all_classes_of_the_weights(subset, kind):
    key = 'MODEL__PRETRAINED' if kind == 'pretrained' else 'MODEL__RESUME'
    data = {'DATA__DATASET': 'list', 'DATA__DATA_PATH': str(subset), 'SAVE': str(subset / kind)}
    run_config(configured(**data, **{key: str(subset / 'w.pdparams')}))
    row = json.loads((subset / kind / 'run' / 'metrics.jsonl').read_text())
    assert (row['images'], row['acc1']) == (4, 0.75)
    assert get_config(str(subset / kind / 'run' / 'config.yaml')).MODEL.NUM_CLASSES == 20
    with pytest.raises(UserError, match='set MODEL.NUM_CLASSES to 20'):
        run_config(configured(**data, **{key: str(subset / 'w.pdparams')}, MODEL__NUM_CLASSES=13))


def test_a_finished_run_keeps_its_configuration(subset):
    (subset / 'train_list.txt').write_text('a.png 0\nb.png 1\nc.png 0\nd.png 1\n')
    (subset / 'val_list.txt').write_text('a.png 0\nb.png 1\n')
    options = {'DATA__DATASET': 'list', 'DATA__DATA_PATH': str(subset), 'EVAL': False, 'TRAIN__WARMUP_EPOCHS': 0}
    for seed, epochs, kept in ((1, 1, 1), (2, 1, 1), (3, 2, 3)):
        run_config(configured(**options, SAVE=str(subset / 'out'), SEED=seed, TRAIN__NUM_EPOCHS=epochs))
        saved = get_config(str(subset / 'out' / 'run' / 'config.yaml'))
        assert kept == saved.SEED


def test_folders_of_some_classes_are_refused(subset):
    for name in ('cat', 'dog'):
        (subset / 'val' / name).mkdir(parents=True)
        Image.new('RGB', (16, 16)).save(subset / 'val' / name / 'x.png')
    config = configured(
        DATA__DATASET='folder',
        DATA__DATA_PATH=str(subset),
        SAVE=str(subset / 'out'),
        MODEL__PRETRAINED=str(subset / 'w'),
    )
    with pytest.raises(UserError, match=r'20 classes, but .* has 2 classes, .*DATA\.DATASET list'):
        run_config(config)


@pytest.mark.parametrize('name, text', [('none', 'there is neither'), ('', 'holds no last.pdparams')])
def test_a_wrong_name_of_a_run_is_reported_before_missing_data(tmp_path, name, text):
    with pytest.raises(UserError, match=f'-resume: .*{text}'):
        run_config(configured(MODEL__RESUME=f'{tmp_path}/{name}', DATA__DATA_PATH=f'{tmp_path}/no data', EVAL=False))
