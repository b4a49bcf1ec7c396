# SPDX-License-Identifier: Apache-2.0
"""Loading of trained models, and predictions in the order of the files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from deploy.inference import load_classifier, load_trained, predict_files
from models import build_model
from tasks import PredictionOptions
from tests.models.helpers import small_config
from utils.errors import UserError
from utils.formats import write_pdparams


def saved(tmp_path, name: str, *opts):
    """A small configuration whose weights are in a file."""
    config = small_config(name, 'DATA.NUM_WORKERS', 0, *opts)
    config.defrost()
    config.MODEL.PRETRAINED = str(tmp_path / 'w.pdparams')
    write_pdparams(build_model(config).state_dict(), config.MODEL.PRETRAINED)
    return config


def test_unreadable_files_keep_their_place(tmp_path):
    config = saved(tmp_path, 'deit_tiny_patch16_224', 'DATA.BATCH_SIZE_EVAL', 2)
    paths = [str(tmp_path / f'{number}.png') for number in range(5)]
    for number in (0, 2, 4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(paths[number])
    (tmp_path / '1.png').write_bytes(b'no image')
    config.MODEL.NUM_CLASSES = None  # the weights say it
    task, model = load_trained(config, log=lambda line: None)
    assert config.MODEL.NUM_CLASSES == 5
    found = list(predict_files(config, task, model, paths, PredictionOptions(topk=1)))
    assert [file.image for file in found] == paths
    assert [file.prediction is None for file in found] == [False, True, False, True, False]
    assert all((file.error is None) == (file.prediction is not None) for file in found)


def test_a_classifier_is_needed(tmp_path):
    config = saved(tmp_path, 'mae_tiny_patch16_224')
    with pytest.raises(UserError, match='has no classifier'):
        load_classifier(config, log=lambda line: None)
