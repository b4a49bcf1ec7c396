# SPDX-License-Identifier: Apache-2.0
"""Exported segmentation models: parity at the training size and at others, and sizes that a model does not take."""

import json

import numpy as np
import paddle
import pytest

from config import get_config
from datasets.dense import crop_size
from deploy.inference import load_classifier
from models import build_model
from models.exported import Predictor
from models.segmentation.inference import slide_inference
from tests.conftest import assert_close
from tests.runs.conftest import run
from tests.tools.conftest import write_config
from tools import export
from utils.errors import UserError
from utils.formats import write_pdparams

BASE = {
    'TRAIN.TASK': 'segmentation', 'DATA.DATASET': 'digit_scenes', 'MODEL.NUM_CLASSES': 11, 'DATA.IMAGE_SIZE': 32,
    'DATA.IMAGE_SCALE': (128, 32), 'MODEL.TRANS.PATCH_SIZE': 8, 'MODEL.TRANS.EMBED_DIM': 16, 'MODEL.TRANS.DEPTH': 4,
    'MODEL.TRANS.NUM_HEADS': 2, 'TRAIN.RANDOM_ERASE_PROB': 0.0,
}  # fmt: skip
UPERNET = {
    'MODEL.TYPE': 'upernet', 'MODEL.UPERNET.OUT_INDICES': (0, 1, 2, 3), 'MODEL.UPERNET.CHANNELS': 8,
    'MODEL.UPERNET.AUX_CHANNELS': 8,
}  # fmt: skip
REMOVED = {'MODEL.LAMBDA.PRUNE_LAYERS': (0, 2), 'MODEL.LAMBDA.REMOVED': True}
MODELS = {
    'linear': {'MODEL.TYPE': 'segmenter', 'MODEL.SEGMENTER.DECODER': 'linear'},
    'mask': {'MODEL.TYPE': 'segmenter', 'MODEL.SEGMENTER.DECODER': 'mask', **REMOVED},
    'pyramid': {**UPERNET, 'MODEL.UPERNET.NECK': 'pyramid', **REMOVED},
    'mln': {**UPERNET, 'MODEL.UPERNET.NECK': 'mln'},
    'relative': {**UPERNET, 'MODEL.TRANS.REL_POS': ('block',), 'MODEL.TRANS.LAYER_SCALE': 1.0, **REMOVED},
}


@pytest.fixture
def trained(tmp_path):
    """`trained(name)`: flags of a model of MODELS with random weights and statistics."""

    def make(name: str) -> list[str]:
        config = get_config(opts=[item for pair in {**BASE, **MODELS[name]}.items() for item in pair])
        cfg, weights = tmp_path / f'{name}.yaml', tmp_path / f'{name}.pdparams'
        write_config(config, cfg)
        model, rng = build_model(config), np.random.default_rng(0)
        state = {key: value.numpy() for key, value in model.state_dict().items()}
        change = {key: rng.normal(0, 0.3, value.shape).astype('float32') for key, value in state.items()}
        changed = {
            key: value + (abs(change[key]) if 'variance' in key else change[key]) for key, value in state.items()
        }
        write_pdparams(changed, str(weights))
        return [f'-cfg={cfg}', f'-pretrained={weights}', f'-output={tmp_path / "exported"}']

    return make


def check_parity(flags, folder, *opts):
    """The program, run on the exported files alone, in windows of an image too, gives the logits of the model."""
    config = export.trained_config(export.parse([*flags, *opts]))
    size = crop_size(config)
    spec = json.loads((folder / 'exported.preprocess.json').read_text())
    assert (spec['input']['shape'], spec['image_size']) == ([None, 3, *size], list(size))
    assert (spec['class_names'][0], spec['resize_scale']) == ('ground', [128, 32])
    model, program = load_classifier(config), Predictor(str(folder / 'exported'))
    images = np.random.default_rng(1).standard_normal((2, 3, *size), 'float32')
    with paddle.no_grad():
        expected = model(paddle.to_tensor(images)).numpy()
    assert expected.shape[:2] == (2, 11) and np.ptp(expected) > 0.1
    assert_close(program(images), expected, 1e-5)
    whole = paddle.randn([1, 3, size[0] + 8, size[1] + 16])

    def run_program(windows):
        return paddle.to_tensor(program(windows.numpy()))

    run_program.patch_size, run_program.image_size, run_program.fixed_size = model.patch_size, model.image_size, False
    with paddle.no_grad():
        logits = [slide_inference(subject, whole, size, (16, 16)).numpy() for subject in (run_program, model)]
    assert_close(*logits, 1e-5)


@pytest.mark.parametrize('name', ['linear', 'pyramid', 'mln', 'relative'])
def test_parity_at_the_training_size(trained, tmp_path, name):
    flags = trained(name)
    export.main(flags)
    check_parity(flags, tmp_path)


def test_the_command(trained, tmp_path):
    flags = trained('mask')
    out, _ = run('tools/export.py', *flags)
    assert 'largest relative difference between program and model:' in out
    check_parity(flags, tmp_path)


@pytest.mark.parametrize(
    ('name', 'opts'), [('mask', ('-opts', 'DATA.CROP_SIZE', '[32,48]')), ('pyramid', ('-image_size=48',))]
)
def test_parity_at_other_sizes(trained, tmp_path, name, opts):
    """The position embedding is resized: in the program, or once when the weights are loaded."""
    flags = trained(name)
    export.main([*flags, *opts])
    check_parity(flags, tmp_path, *opts)


def test_relative_positions_at_another_size(trained, tmp_path):
    """The tables are resized when the weights are loaded."""
    flags = trained('relative')
    export.main([*flags, '-image_size=48'])
    check_parity(flags, tmp_path, '-image_size=48')


def test_sizes_that_a_model_does_not_take(trained):
    with pytest.raises(UserError, match='relative positions of this model need images of 32 pixels'):
        export.main([*trained('relative'), '-opts', 'DATA.CROP_SIZE', '[32,48]'])
    with pytest.raises(UserError, match='an image of 30x32 pixels does not divide into patches of 8'):
        export.main([*trained('mask'), '-opts', 'DATA.CROP_SIZE', '[30,32]'])
