# SPDX-License-Identifier: Apache-2.0
"""A trained classifier, as far as the tools need, and images for it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from PIL import Image

from config import get_config
from models import build_model
from tests.models.helpers import small_config
from utils.formats import write_pdparams

CLASSES = 7
CONFIG = """
DATA:
  DATASET: folder
  DATA_PATH: '{data}'
  IMAGE_SIZE: 40
  CROP_PCT: 0.9
  BATCH_SIZE: 8
  NUM_WORKERS: 2
  IMAGENET_MEAN: [0.485, 0.456, 0.406]
  IMAGENET_STD: [0.229, 0.224, 0.225]
MODEL:
  TYPE: gmlp
  NAME: tiny
  MIXER: {{PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 2, MLP_RATIO: 2}}
SAVE: '{output}'
"""


@pytest.fixture(scope='session')
def trained(tmp_path_factory) -> SimpleNamespace:
    """A tiny gMLP of seven classes with all weights random (`cfg`, `weights`), and a validation folder (`images`)."""
    root = tmp_path_factory.mktemp('trained')
    cfg, weights = root / 'tiny.yaml', root / 'tiny.pdparams'
    cfg.write_text(CONFIG.format(data=root / 'data', output=root / 'out'))
    write_images(root / 'data' / 'val')
    write_pdparams(random_state(str(cfg), seed=0), str(weights))
    return SimpleNamespace(cfg=str(cfg), weights=str(weights), images=str(root / 'data' / 'val'))


def write_config(config, path) -> None:
    """A YAML file that inherits from no other one; `path`: pathlib's."""
    config.defrost()
    config.BASE = ['']
    path.write_text(config.dump())


def write_transformer(folder, name: str, data: str, *opts) -> tuple[str, str]:
    """A Vision Transformer at the size of a toy, with weights that make its heads differ: configuration and weights.

    Args:
        folder: to write to, pathlib's.
        name: a configuration of the suite.
        data: an image folder.
    """
    options = ['DATA.DATASET', 'folder', 'DATA.DATA_PATH', data, 'DATA.NUM_WORKERS', 0, 'DATA.BATCH_SIZE', 16]
    config = small_config(name, *options, 'MODEL.NUM_CLASSES', 3, *opts)
    cfg, weights = folder / f'{name}.yaml', folder / f'{name}.pdparams'
    write_config(config, cfg)
    paddle.seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.set_value(parameter + 0.3 * paddle.randn(parameter.shape))
    write_pdparams(model.state_dict(), str(weights))
    return str(cfg), str(weights)


def random_state(cfg: str, seed: int) -> dict[str, np.ndarray]:
    """Weights under which the likeliest class differs from image to image: large matrices, small biases, unit scales."""
    model = build_model(get_config(cfg, ['MODEL.NUM_CLASSES', CLASSES]))
    rng = np.random.default_rng(seed)
    state = {}
    for name, value in model.state_dict().items():
        numbers = rng.normal(0, 0.5 if value.ndim > 1 else 0.1, value.shape)
        state[name] = (numbers + name.endswith('norm.weight')).astype('float32')
    return state


def write_images(folder) -> None:
    """Three pictures of each class, of many sizes and modes."""
    rng = np.random.default_rng(1)
    for number in range(3 * CLASSES):
        size = (int(rng.integers(30, 90)), int(rng.integers(30, 90)))
        pixels = rng.integers(0, 156, (5, 5, 3)) + rng.integers(0, 101, 3)
        blobs = Image.fromarray(pixels.astype('uint8')).resize(size, Image.Resampling.BICUBIC)
        path = folder / f'class{number % CLASSES}' / f'{number}.png'
        os.makedirs(path.parent, exist_ok=True)
        blobs.convert(('RGB', 'L', 'RGBA', 'P')[number % 4]).save(path)


def evaluated_logits(trained: SimpleNamespace) -> np.ndarray:
    """Logits [N, K] of the validation images, computed by the evaluation's own parts."""
    from datasets import build_dataloader, build_dataset
    from datasets.batch import to_device
    from models.weights.load import load_pretrained

    config = get_config(trained.cfg, ['MODEL.NUM_CLASSES', CLASSES, 'DATA.NUM_WORKERS', 0])
    model = build_model(config)
    load_pretrained(model, trained.weights)
    model.eval()
    with paddle.no_grad(), build_dataloader(config, build_dataset(config, 'val'), training=False) as loader:
        statistics = (config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
        return np.concatenate([model(to_device(batch, *statistics).images).numpy() for batch in loader.epoch(0)])
