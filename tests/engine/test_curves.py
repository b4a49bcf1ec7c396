# SPDX-License-Identifier: Apache-2.0
"""Loss curves of twenty steps of tiny recipes, with everything on. A refactoring must keep them, to the last bit.

`python -m tests.engine.test_curves` records them anew: only where a change of numbers is meant, and CHANGELOG says so.
Bits depend on the instruction set of the CPU, so elsewhere than where they were recorded they are compared to 1e-5.
"""

import json
import os
import sys
import tempfile

import numpy as np
import paddle
import pytest

import datasets
from config import get_config
from engine.distributed import Context
from engine.tasks import SupervisedTask
from engine.train import LOSS, Trainer
from models import build_model
from tests.conftest import HERE, make_images
from utils.runlog import RunLog

COMMON = {
    'DATA.DATASET': 'folder', 'DATA.IMAGE_SIZE': 32, 'DATA.CROP': 'resized', 'DATA.FAST_RESIZE': False,
    'DATA.BATCH_SIZE': 8, 'DATA.NUM_WORKERS': 0,
    'MODEL.NUM_CLASSES': 3, 'MODEL.DROPPATH': 0.1, 'MODEL.DROPOUT': 0.1, 'TRAIN.NUM_EPOCHS': 4, 'TRAIN.WARMUP_EPOCHS': 1,
    'TRAIN.LINEAR_SCALED_LR': None, 'TRAIN.LR_SCHEDULER.UPDATE': 'step', 'TRAIN.ACCUM_ITER': 2, 'TRAIN.GRAD_CLIP': 1.0,
    'TRAIN.MODEL_EMA': True,
}  # fmt: skip
VIT = {
    'MODEL.TYPE': 'deit', 'MODEL.TRANS.PATCH_SIZE': 8, 'MODEL.TRANS.EMBED_DIM': 32, 'MODEL.TRANS.DEPTH': 4,
    'MODEL.TRANS.NUM_HEADS': 4, 'MODEL.EVIT.DROP_LOC': (1, 2),
}  # fmt: skip
RECIPES = {
    'gmlp': {
        'MODEL.TYPE': 'gmlp', 'MODEL.MIXER.PATCH_SIZE': 8, 'MODEL.MIXER.EMBED_DIM': 32, 'MODEL.MIXER.DEPTH': 4,
        'MODEL.MIXER.MLP_RATIO': 4.0,
    },
    'deit': VIT,
    'evit': {**VIT, 'MODEL.EVIT.KEEP_RATE': 0.6, 'MODEL.EVIT.FUSE_TOKEN': True, 'MODEL.EVIT.SHRINK_EPOCHS': 2},
}  # fmt: skip
CURVES = os.path.join(HERE, 'goldens', 'curves')


def curve(name: str, images: str, folder: str) -> list[float]:
    """Losses of the first twenty steps of a recipe."""
    options = {**COMMON, **RECIPES[name], 'DATA.DATA_PATH': images}
    config = get_config(opts=[item for pair in options.items() for item in pair])
    paddle.seed(config.SEED)
    model = build_model(config)
    loaders = [
        datasets.build_dataloader(config, datasets.build_dataset(config, split), split == 'train')
        for split in ('train', 'val')
    ]
    context = Context(0, 1, False)
    trainer = Trainer(config, model, SupervisedTask(config, 3), *loaders, context, RunLog(folder, 0), folder)
    losses = []
    take = trainer._take

    def listen(sums, *rest):
        values = take(sums, *rest)
        losses.append(values[LOSS])
        return values

    trainer._take = listen
    trainer.fit()
    return losses[:20]


def instruction_set() -> str:
    """What decides the bits: the vector extensions of this CPU."""
    with open('/proc/cpuinfo', encoding='utf-8') as file:
        flags = next(line for line in file if line.startswith('flags')).split()
    return ' '.join(sorted(flag for flag in flags if flag.startswith(('avx', 'amx', 'fma'))))


@pytest.mark.parametrize('name', RECIPES)
def test_losses_are_what_they_were(name, images, tmp_path):
    with open(os.path.join(CURVES, f'{name}.json'), encoding='utf-8') as file:
        recorded = json.load(file)
    losses = curve(name, images, str(tmp_path))
    assert len(losses) == 20
    here = {'paddle': paddle.__version__, 'cpu': instruction_set()}
    if here == {key: recorded[key] for key in here}:
        assert losses == recorded['losses']
    else:
        np.testing.assert_allclose(losses, recorded['losses'], rtol=1e-5)


if __name__ == '__main__':
    os.makedirs(CURVES, exist_ok=True)
    for recipe in sys.argv[1:] or RECIPES:
        with tempfile.TemporaryDirectory() as place:
            losses = curve(recipe, make_images(os.path.join(place, 'images')), place)
        content = {'paddle': paddle.__version__, 'cpu': instruction_set(), 'losses': losses}
        with open(os.path.join(CURVES, f'{recipe}.json'), 'w', encoding='utf-8') as file:
            json.dump(content, file, indent=1)
