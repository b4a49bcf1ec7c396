# SPDX-License-Identifier: Apache-2.0
"""A small model, its weights, images and a checkpoint for the attacks."""

from __future__ import annotations

import os
from types import SimpleNamespace

from config import get_config
from models import build_model
from tests.conftest import make_images
from tests.engine.test_train import make_trainer
from tests.tools.conftest import CONFIG
from utils.formats import read_file


def build(folder: str) -> SimpleNamespace:
    """Build what the attacks need below `folder`: cfg, state, images, image, checkpoint."""
    images = make_images(os.path.join(folder, 'images'))
    cfg = os.path.join(folder, 'tiny.yaml')
    with open(cfg, 'w') as file:
        file.write(CONFIG.format(data=images, output=os.path.join(folder, 'output')))
    state = {
        name: value.numpy()
        for name, value in build_model(get_config(cfg, ['MODEL.NUM_CLASSES', 7])).state_dict().items()
    }
    trainer = make_trainer(os.path.join(folder, 'run'), images, TRAIN__MODEL_EMA=True, SAVE_STEPS=1)
    trainer.fit()
    return SimpleNamespace(
        folder=folder,
        cfg=cfg,
        state=state,
        images=images,
        image=os.path.join(images, 'val', 'class0', '0.png'),
        checkpoint=read_file(os.path.join(folder, 'run', 'last.pdparams')),
    )
