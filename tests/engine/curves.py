# SPDX-License-Identifier: Apache-2.0
"""Training curves of tiny recipes: run a recipe as a launcher does, read the files of the run, compare with a record.

Only the keys of the configuration and the files of a run are used, so a refactoring of the engine leaves this file alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
from unittest import mock

import paddle
import pytest
from visualdl import LogReader

import ops
from config import get_arguments, get_config, update_config
from engine.run import run_config
from models import build_model
from tests.conftest import HERE
from utils.formats import write_pdparams
from utils.weights import METADATA

GOLDENS = os.path.join(HERE, 'goldens')
ELSEWHERE = 1e-5  # relative tolerance where another CPU or another Paddle recorded the numbers
TIMES = ('seconds', 'images_per_second')

# A run on the images of tests/conftest.py that uses what the training loop offers; recipes change it.
COMMON = {
    'DATA.DATASET': 'folder', 'DATA.IMAGE_SIZE': 32, 'DATA.CROP': 'resized', 'DATA.FAST_RESIZE': False,
    'DATA.BATCH_SIZE': 8, 'DATA.NUM_WORKERS': 0,
    'MODEL.NUM_CLASSES': 3, 'MODEL.DROPPATH': 0.1, 'MODEL.DROPOUT': 0.1, 'TRAIN.NUM_EPOCHS': 4, 'TRAIN.WARMUP_EPOCHS': 1,
    'TRAIN.LINEAR_SCALED_LR': None, 'TRAIN.LR_SCHEDULER.UPDATE': 'step', 'TRAIN.ACCUM_ITER': 2, 'TRAIN.GRAD_CLIP': 1.0,
    'TRAIN.MODEL_EMA': True, 'REPORT_FREQ': 1, 'SAVE_FREQ': 0, 'TAG': 'run',
}  # fmt: skip
CLASSIFIER_KEYS = ('MODEL.DROPPATH', 'MODEL.DROPOUT', 'MODEL.EVIT.DROP_LOC')


def train(options: dict, images: str, folder: str, operators: bool = False) -> dict:
    """Trains in `folder`/run on the image folder `images` and returns the curve of the run, see `read_curve`.

    A recipe names weights to make first by `teacher` or `encoder`: options of a model that is built with seed 1.
    `operators`: with those of `ops`, whose last bits differ from those of Paddle's layers, which the records have.
    """
    options = {**COMMON, **options, 'DATA.DATA_PATH': images, 'SAVE': folder}
    if 'teacher' in options:
        cfg, weights = _random_model(options.pop('teacher'), os.path.join(folder, 'teacher'))
        options.update({'TRAIN.TEACHER_CFG': cfg, 'TRAIN.TEACHER_MODEL': weights})
    if 'encoder' in options:
        _, options['MODEL.PRETRAINED'] = _random_model(options.pop('encoder'), os.path.join(folder, 'encoder'))
    config = _config(options)
    config.defrost()
    with contextlib.nullcontext() if operators else _paddles_layers():
        run_config(config)
    return read_curve(os.path.join(folder, 'run'))


def resume(folder: str, images: str) -> dict:
    """Continues the run in `folder` as `-resume=FOLDER` does and returns the curve of the rest."""
    with _paddles_layers():
        run_config(update_config(get_config(), get_arguments([f'-resume={folder}', f'-data_path={images}'])))
    return read_curve(folder)


def _paddles_layers() -> contextlib.AbstractContextManager:
    return mock.patch.object(ops, 'usable', lambda *_: False)


def read_curve(folder: str) -> dict:
    """The numbers that a run left.

    Returns:
        loss, grad_norm: of each step. rows: metrics.jsonl without times. progress: the position and the best value.
        norms: of weights, averages and moments of the optimizer, each the root of the sum of squares.
    """
    state = read_state(os.path.join(folder, 'last.pdparams'))
    with open(os.path.join(folder, 'metrics.jsonl'), encoding='utf-8') as file:
        rows = [json.loads(line) for line in file]
    parts = {**{name: state[name] for name in ('model', 'model_ema') if name in state}, **state['optimizer']}
    return {
        **_steps(os.path.join(folder, 'vdl')),
        'rows': {
            f'{row.pop("kind")} {row["epoch"]}': {key: row[key] for key in row if key not in TIMES} for row in rows
        },
        'progress': {
            'epoch': state['epoch'],
            'step': state['step'],
            **{name: state['progress'][name] for name in ('validated', 'best', 'best_epoch')},
        },
        'norms': {name: _norm(arrays) for name, arrays in parts.items()},
    }


def read_state(path: str) -> dict:
    """Content of a checkpoint that this repository holds or that this test run wrote."""
    with open(path, 'rb') as file:
        return pickle.load(file)


def check(curve: dict, name: str, tolerance: float = ELSEWHERE, bits: bool = True) -> None:
    """Compares with the record `name`, see `check_numbers`; without `bits` to the tolerance on each machine."""
    with open(os.path.join(GOLDENS, f'{name}.json'), encoding='utf-8') as file:
        recorded = json.load(file)
    check_numbers(curve, recorded.pop('curve'), recorded if bits else {}, tolerance)


def check_numbers(actual, recorded, machine: dict, tolerance: float = ELSEWHERE) -> None:
    """Compares nested numbers: bit for bit on the `machine` that recorded them, else to the relative `tolerance`."""
    actual, recorded = dict(_flat(actual)), dict(_flat(recorded))
    assert not set(recorded) - set(actual)  # new fields may have joined
    relative = 0.0 if machine == this_machine() else tolerance
    wrong = [name for name in recorded if actual[name] != pytest.approx(recorded[name], rel=relative, abs=0.0)]
    assert not wrong, f'{len(wrong)} differ; first {wrong[0]}: {actual[wrong[0]]}, recorded {recorded[wrong[0]]}'


def record(curve: dict, name: str) -> None:
    """Writes what `check` reads."""
    with open(os.path.join(GOLDENS, f'{name}.json'), 'w', encoding='utf-8') as file:
        json.dump({**this_machine(), 'curve': curve}, file, indent=1)
        file.write('\n')


def this_machine() -> dict[str, str]:
    """What decides the bits: the version of Paddle and the vector extensions of this CPU."""
    with open('/proc/cpuinfo', encoding='utf-8') as file:
        flags = next(line for line in file if line.startswith('flags')).split()
    extensions = ' '.join(sorted(flag for flag in flags if flag.startswith(('avx', 'amx', 'fma'))))
    return {'paddle': paddle.__version__, 'cpu': extensions}


def _config(options: dict):
    """Keys of classifiers, which recipes share, are left out of pre-training, where they have no effect."""
    if options['MODEL.TYPE'] in ('mae', 'mocov3'):
        options = {key: value for key, value in options.items() if key not in CLASSIFIER_KEYS}
    return get_config(opts=[item for pair in options.items() for item in pair])


def _random_model(options: dict, prefix: str) -> tuple[str, str]:
    """Writes the configuration and the weights of a model."""
    config, cfg, weights = _config(options), f'{prefix}.yaml', f'{prefix}.pdparams'
    with open(cfg, 'w', encoding='utf-8') as file:
        file.write(config.dump())
    paddle.seed(1)
    model = build_model(config)
    write_pdparams({**model.state_dict(), METADATA: model.weight_rules.metadata(model)}, weights)
    return cfg, weights


def _steps(folder: str) -> dict[str, list[float]]:
    (name,) = os.listdir(folder)
    reader = LogReader(file_path=os.path.join(folder, name))
    return {key: [row.value for row in reader.get_data('scalar', f'train/{key}')] for key in ('loss', 'grad_norm')}


def _norm(arrays: dict) -> float:
    """Exactly rounded, so that it does not depend on the order of summation."""
    numbers = (value for array in arrays.values() if hasattr(array, 'ravel') for value in array.ravel().tolist())
    return math.sqrt(math.fsum(value * value for value in numbers))


def _flat(content, name: str = ''):
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _flat(value, f'{name}/{key}')
    else:
        yield name, content
