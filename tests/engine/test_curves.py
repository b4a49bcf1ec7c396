# SPDX-License-Identifier: Apache-2.0
"""Curves of tiny recipes, with everything on: losses, gradient norms, validations, weights. A refactoring keeps them.

`python -m tests.engine.test_curves NAME...` records curves: only where a change of numbers is meant, and CHANGELOG says so.
Bits depend on the instruction set of the CPU: a curve is compared bit for bit where it was recorded, else to 1e-5.
"""

import json
import os
import sys
import tempfile

import numpy as np
import pytest

from tests.conftest import make_images
from tests.engine.curves import ELSEWHERE, GOLDENS, check, check_numbers, record, train

VIT = {
    'MODEL.TYPE': 'deit', 'MODEL.TRANS.PATCH_SIZE': 8, 'MODEL.TRANS.EMBED_DIM': 32, 'MODEL.TRANS.DEPTH': 4,
    'MODEL.TRANS.NUM_HEADS': 4, 'MODEL.EVIT.DROP_LOC': (1, 2),
}  # fmt: skip
GMLP = {
    'MODEL.TYPE': 'gmlp', 'MODEL.MIXER.PATCH_SIZE': 8, 'MODEL.MIXER.EMBED_DIM': 32, 'MODEL.MIXER.DEPTH': 4,
    'MODEL.MIXER.MLP_RATIO': 4.0,
}  # fmt: skip
FIRST = {
    'gmlp': GMLP,
    'deit': VIT,
    'evit': {**VIT, 'MODEL.EVIT.KEEP_RATE': 0.6, 'MODEL.EVIT.FUSE_TOKEN': True, 'MODEL.EVIT.SHRINK_EPOCHS': 2},
}
IMAGES_PER_STEP = [16, 16, 16, 16, 11] * 4

SHORT = {'TRAIN.NUM_EPOCHS': 2, 'TRAIN.MODEL_EMA_DECAY': 0.9}
SMALL = {
    **SHORT, 'DATA.IMAGE_SIZE': 16, 'MODEL.TYPE': 'vit', 'MODEL.TRANS.PATCH_SIZE': 4, 'MODEL.TRANS.EMBED_DIM': 24,
    'MODEL.TRANS.DEPTH': 3, 'MODEL.TRANS.NUM_HEADS': 3, 'MODEL.EVIT.DROP_LOC': (1, 2),
}  # fmt: skip
UNLABELED = {
    **SMALL, 'MODEL.NUM_CLASSES': None, 'TRAIN.BASE_LR': 2e-3,
    'TRAIN.RAND_AUGMENT': False, 'TRAIN.COLOR_JITTER': 0.0, 'TRAIN.RANDOM_ERASE_PROB': 0.0, 'TRAIN.DROP_LAST': True,
}  # fmt: skip
MAE = {
    **UNLABELED, 'MODEL.TYPE': 'mae', 'MODEL.MAE.DECODER_EMBED_DIM': 16, 'MODEL.MAE.DECODER_NUM_HEADS': 2,
    'MODEL.MAE.DECODER_DEPTH': 1, 'TRAIN.TASK': 'mae', 'TRAIN.OPTIMIZER.BETAS': (0.9, 0.95),
}  # fmt: skip
STUDENT = {**SMALL, 'MODEL.TRANS.DISTILLED': True, 'teacher': {**GMLP, 'DATA.IMAGE_SIZE': 16, 'MODEL.NUM_CLASSES': 3}}
RECIPES = {
    'ms_mlp': {
        **SHORT, 'MODEL.TYPE': 'ms_mlp', 'MODEL.MSMLP.PATCH_SIZE': 2, 'MODEL.MSMLP.EMBED_DIM': 10,
        'MODEL.MSMLP.DEPTHS': (1, 1, 2), 'MODEL.MSMLP.MIX_SIZE': ((1, 1, 3, 5, 7), (1, 3, 3, 5, 7), (1, 5, 5, 5, 7)),
    },
    'fading': {
        **SMALL, 'MODEL.LAMBDA.PRUNE_LAYERS': (0, 2), 'MODEL.LAMBDA.DECAY_EPOCHS': 2, 'TRAIN.NUM_EPOCHS': 3,
    },
    'tome': {**SMALL, 'MODEL.TOME.R': 3, 'MODEL.TRANS.GLOBAL_POOL': True},
    'evit_drop': {
        **SMALL, 'MODEL.EVIT.KEEP_RATE': 0.5, 'MODEL.EVIT.SHRINK_START_EPOCH': 1, 'MODEL.EVIT.SHRINK_EPOCHS': 1,
        'TRAIN.NUM_EPOCHS': 3,
    },
    'stacked': {
        **SMALL, 'MODEL.LAMBDA.PRUNE_LAYERS': (0,), 'MODEL.LAMBDA.REMOVED': True, 'MODEL.EVIT.KEEP_RATE': 0.75,
        'MODEL.EVIT.FUSE_TOKEN': True, 'MODEL.TOME.R': 1, 'TRAIN.RECOMPUTE': True,
    },
    'mae': MAE,
    'mae_distilled': {
        **MAE, 'TRAIN.MAE_DISTILL.ATTN_IDX': (3,), 'TRAIN.MAE_DISTILL.HIDDEN_IDX': (1, 3),
        'teacher': {**MAE, 'MODEL.TRANS.EMBED_DIM': 32, 'MODEL.TRANS.NUM_HEADS': 4},
    },
    'mocov3': {
        **UNLABELED, 'MODEL.TYPE': 'mocov3', 'DATA.VIEWS': 2, 'MODEL.MOCO.DIM': 8, 'MODEL.MOCO.MLP_DIM': 16,
        'TRAIN.TASK': 'mocov3', 'TRAIN.COLOR_JITTER': 0.4, 'TRAIN.OPTIMIZER.NAME': 'LARS', 'TRAIN.BASE_LR': 0.3,
        'DATA.BATCH_SIZE': 24, 'TRAIN.NUM_EPOCHS': 3,
    },
    'distilled_soft': {**STUDENT, 'TRAIN.DISTILLATION_TYPE': 'soft', 'TRAIN.DISTILLATION_TAU': 3.0},
    'distilled_hard': {**STUDENT, 'TRAIN.DISTILLATION_TYPE': 'hard', 'TRAIN.DISTILLATION_ALPHA': 0.3},
    'rpe_finetuning': {
        **SMALL, 'MODEL.TRANS.REL_POS': ('block', 'shared'), 'MODEL.TRANS.KEY_BIAS': False, 'MODEL.TRANS.LAYER_SCALE': 0.1,
        'MODEL.TRANS.RESCALED_INIT': True, 'MODEL.TRANS.GLOBAL_POOL': True, 'MODEL.DROPPATH_RAMP': True,
        'TRAIN.LAYER_DECAY': 0.75, 'encoder': MAE,
    },
    'augmented': {
        **SMALL, 'TRAIN.RANDOM_ERASE_PROB': 0.5, 'TRAIN.RANDOM_ERASE_COUNT': 2, 'TRAIN.MIXUP_MODE': 'elem',
        'TRAIN.MIXUP_PROB': 0.9, 'TRAIN.ACCUM_ITER': 3, 'MODEL.TRANS.REPRESENTATION_SIZE': 8, 'MODEL.TRANS.FROZEN_STAGES': 0,
    },
}  # fmt: skip
TOLERANCES = {'mocov3': 1e-4}  # batch norm of features that are nearly the same in all images amplifies rounding errors


@pytest.mark.parametrize('name', FIRST)
def test_losses_are_what_they_were(name, images, tmp_path):
    """The oldest records hold the loss of each step summed over its images."""
    with open(os.path.join(GOLDENS, 'curves', f'{name}.json'), encoding='utf-8') as file:
        recorded = json.load(file)
    means = [float(np.float32(total / n)) for total, n in zip(recorded.pop('losses'), IMAGES_PER_STEP)]
    assert len(means) == 20
    check_numbers(train(FIRST[name], images, str(tmp_path))['loss'], means, recorded)


@pytest.mark.parametrize('name', RECIPES)
def test_curves_are_what_they_were(name, images, tmp_path):
    check(train(RECIPES[name], images, str(tmp_path)), f'curves/{name}', TOLERANCES.get(name, ELSEWHERE))


@pytest.mark.parametrize('name', ['stacked', 'mae_distilled', 'rpe_finetuning'])
def test_operators_give_the_same_curves(name, images, tmp_path):
    check(train(RECIPES[name], images, str(tmp_path), operators=True), f'curves/{name}', bits=False)


if __name__ == '__main__':
    for recipe in sys.argv[1:] or RECIPES:
        with tempfile.TemporaryDirectory() as place:
            record(train(RECIPES[recipe], make_images(os.path.join(place, 'images')), place), f'curves/{recipe}')
