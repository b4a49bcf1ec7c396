# SPDX-License-Identifier: Apache-2.0
"""Tasks on images that are not square."""

import numpy as np
import paddle
import pytest

from config import get_config
from datasets.dense import crop_size
from models import build_model
from models.registry import config_file
from tasks import build_task
from utils.errors import UserError

SEGMENTATION = ['DATA.IMAGE_SIZE', (16, 32), 'DATA.CROP_SIZE', None, 'MODEL.NUM_CLASSES', 4]


def config_of(*options):
    config = get_config(config_file('segment_digits'), [*SEGMENTATION, *options])
    config.defrost()
    return config


def test_segmentation_crops_have_the_size():
    config = config_of()
    task, model = build_task(config), build_model(config)
    assert crop_size(config) == (16, 32) and task.image_shape()[1:] == [16, 32]
    batch = task.example(2)
    loss = task.loss(model, batch, np.random.default_rng(0))
    assert np.isfinite(loss.total.item())
    model.eval()
    images = paddle.randn([1, *task.image_shape()])
    assert task.probabilities(model, [images], (20, 50)).shape == [1, 4, 20, 50]


def test_relative_positions_of_segmentation_models():
    """Windows must have the size that the model is built for, rows and columns."""
    relative = ('MODEL.TRANS.REL_POS', ['block'], 'VAL.IS_SLIDE', True)
    config = config_of(*relative)
    model = build_model(config)
    assert model.fixed_size and model.image_size == (16, 32)
    build_task(config).attach(model, print, training=True)
    with pytest.raises(UserError, match='need crops of 16 x 32 pixels'):
        build_task(config_of(*relative, 'DATA.CROP_SIZE', (32, 16))).attach(model, print, training=True)


def test_detection_is_refused_with_its_reason():
    options = ['TRAIN.TASK', 'detection', 'DATA.IMAGE_SIZE', (64, 96), 'TRAIN.RANDOM_ERASE_PROB', 0]
    with pytest.raises(UserError, match='pads every image to a square, .* such as 96'):
        build_task(get_config(None, options))
