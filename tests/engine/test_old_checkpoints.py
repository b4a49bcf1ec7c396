# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of older versions resume within an epoch, and the runs continue with the numbers of those versions.

tests/goldens/checkpoints/NAME holds the folder of a run after a crash within an epoch, the files of its teacher, and the
curve of the rest. `python -m tests.engine.test_old_checkpoints NAME...` adds new ones; existing ones are never replaced.
"""

import os
import shutil
import sys
import tempfile
from unittest import mock

import pytest

import engine.train
from tests.conftest import make_images
from tests.engine.curves import (
    ELSEWHERE,
    GOLDENS,
    check,
    check_numbers,
    read_state,
    record,
    resume,
    this_machine,
    train,
)
from tests.engine.test_curves import MAE, RECIPES, TOLERANCES

MIDDLE = {'TRAIN.NUM_EPOCHS': 3, 'SAVE_STEPS': 8}
RENAMED = ('progress/best_score', 'progress/totals')  # of version 0.1.0: a signed score, and a list
TINY = {
    'MODEL.TRANS.EMBED_DIM': 8, 'MODEL.TRANS.NUM_HEADS': 2, 'MODEL.TRANS.DEPTH': 2, 'MODEL.TRANS.MLP_RATIO': 2.0,
    'MODEL.EVIT.DROP_LOC': (),
}  # fmt: skip
GMLP = {
    'DATA.IMAGE_SIZE': 16, 'MODEL.TYPE': 'gmlp', 'MODEL.MIXER.PATCH_SIZE': 4, 'MODEL.MIXER.EMBED_DIM': 12,
    'MODEL.MIXER.DEPTH': 2, 'MODEL.MIXER.MLP_RATIO': 2.0, 'MODEL.NUM_CLASSES': 3, 'TRAIN.MODEL_EMA_DECAY': 0.9,
}  # fmt: skip
CHECKPOINTS = {
    'gmlp': {**GMLP, **MIDDLE},
    'distilled': {**RECIPES['distilled_hard'], **TINY, **MIDDLE, 'teacher': GMLP},
    'fading': {**RECIPES['fading'], **TINY, **MIDDLE, 'MODEL.LAMBDA.PRUNE_LAYERS': (1,)},
    'mae_distilled': {
        **RECIPES['mae_distilled'], **TINY, **MIDDLE, 'TRAIN.MAE_DISTILL.ATTN_IDX': (2,),
        'TRAIN.MAE_DISTILL.HIDDEN_IDX': (0, 2), 'MODEL.MAE.DECODER_EMBED_DIM': 8,
        'teacher': {**MAE, **TINY, 'MODEL.MAE.DECODER_EMBED_DIM': 8, 'MODEL.TRANS.NUM_HEADS': 4},
    },
    'mocov3': {**RECIPES['mocov3'], **TINY, **MIDDLE, 'SAVE_STEPS': 3, 'TRAIN.MODEL_EMA': False},
}  # fmt: skip


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_resumed_run_continues_with_the_recorded_numbers(name, images, tmp_path, monkeypatch):
    shutil.copytree(os.path.join(GOLDENS, 'checkpoints', name), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # the files of a run name the teacher by a relative path
    before = read_state('run/last.pdparams')
    assert before['sampler']['samples'] and before['epoch'] == 1
    check(resume('run', images), f'checkpoints/{name}/rest', TOLERANCES.get(name, ELSEWHERE))
    after = dict(kinds(read_state('run/last.pdparams')))
    for entry, kind in kinds(before):
        if entry not in RENAMED:
            assert after[entry] == kind, entry
    assert 'progress/best' in after


def kinds(state: dict, prefix: str = ''):
    """Types of the entries of a checkpoint; of arrays also the shape."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from kinds(value, f'{prefix}{key}/')
        else:
            yield f'{prefix}{key}', (type(value), getattr(value, 'dtype', None), getattr(value, 'shape', None))


def write(name: str) -> None:
    """Trains in the current folder, keeps the last checkpoint within an epoch, and checks that it gives the same rest."""
    make_images('images')
    save = engine.train.save_last

    def save_and_copy(folder: str, state: dict) -> None:
        save(folder, state)
        if state['sampler']['samples']:
            shutil.copy(os.path.join(folder, 'last.pdparams'), 'kept.pdparams')

    with mock.patch('engine.train.save_last', save_and_copy):
        whole = train(CHECKPOINTS[name], 'images', '.')
    target = os.path.join(GOLDENS, 'checkpoints', name)
    os.makedirs(os.path.join(target, 'run'))
    shutil.copy('run/config.yaml', os.path.join(target, 'run'))
    shutil.copy('kept.pdparams', os.path.join(target, 'run', 'last.pdparams'))
    for file in ('teacher.yaml', 'teacher.pdparams'):
        if os.path.exists(file):
            shutil.copy(file, target)
    shutil.copytree(os.path.join(target, 'run'), 'again')
    rest = resume('again', 'images')
    steps = read_state('kept.pdparams')['step']
    tail = {key: whole[key][steps:] for key in ('loss', 'grad_norm')}
    tail['rows'] = {key: whole['rows'][key] for key in rest['rows']}
    check_numbers(rest, {**whole, **tail}, this_machine())
    record(rest, f'checkpoints/{name}/rest')


if __name__ == '__main__':
    for checkpoint in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)  # so that the files of the run name no folder of this machine
            write(checkpoint)
            os.chdir(GOLDENS)
