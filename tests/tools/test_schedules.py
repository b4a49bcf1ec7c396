# SPDX-License-Identifier: Apache-2.0
"""`config.py -plot`: the curves are the values that a training uses in its steps."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from visualdl import LogReader

from config import get_config, main
from datasets.loader import batches_per_epoch
from engine.run_curves import run_curves
from tasks import build_task
from tests.conftest import ROOT
from tests.engine.curves import COMMON, _config, train
from tests.engine.test_curves import GMLP, RECIPES
from tests.tools.conftest import write_config
from utils.errors import UserError

STEPS = {**GMLP, 'TRAIN.NUM_ITERS': 7, 'TRAIN.WARMUP_ITERS': 3, 'TRAIN.LR_SCHEDULER.NAME': 'poly', 'VALIDATE_ITERS': 7}
RUNS = {
    'evit': {**RECIPES['evit_drop'], 'TRAIN.LR_SCHEDULER.UPDATE': 'epoch'},
    'lambda': RECIPES['fading'],
    'mocov3': {**RECIPES['mocov3'], 'TRAIN.ACCUM_ITER': 1, 'TRAIN.NUM_EPOCHS': 2},
    'steps': {**STEPS, 'TRAIN.LINEAR_SCALED_LR': 64},
}


def logged(folder: str, name: str) -> list[float]:
    """A value by step, from the VisualDL file of a run."""
    (file,) = os.listdir(os.path.join(folder, 'vdl'))
    return [
        row.value for row in LogReader(file_path=os.path.join(folder, 'vdl', file)).get_data('scalar', f'train/{name}')
    ]


@pytest.mark.parametrize(
    'name, scheduled', [('evit', 'keep_rate'), ('lambda', 'attn_lambda'), ('mocov3', 'momentum'), ('steps', '')]
)
def test_curves_are_those_of_a_training(name, scheduled, images, tmp_path):
    train(RUNS[name], images, str(tmp_path))
    config = get_config(str(tmp_path / 'run' / 'config.yaml'))
    global_batch = config.DATA.BATCH_SIZE * config.TRAIN.ACCUM_ITER
    steps = -(-batches_per_epoch(config, 75, 1) // config.TRAIN.ACCUM_ITER)
    epochs, curves = run_curves(config, build_task(config), global_batch, steps)
    assert [curve.name for curve in curves] == ['lr', *filter(None, [scheduled]), 'ema_decay']
    assert (curves[-1].values == config.TRAIN.MODEL_EMA_DECAY).all()
    assert len(epochs) == (config.TRAIN.NUM_ITERS or config.TRAIN.NUM_EPOCHS * steps)
    for curve in curves[: 1 + bool(scheduled)]:
        np.testing.assert_allclose(
            curve.values, np.array(logged(str(tmp_path / 'run'), curve.name), 'float64'), rtol=1e-6
        )


@pytest.mark.parametrize(
    'images, processes, drop, batches', [(75, 1, False, 10), (75, 1, True, 9), (75, 2, False, 5), (80, 2, True, 5)]
)
def test_batches_per_epoch(images, processes, drop, batches):
    config = get_config(opts=['DATA.BATCH_SIZE', 8, 'TRAIN.DROP_LAST', drop])
    assert batches_per_epoch(config, images, processes) == batches


def test_both_spellings_draw_the_same(tmp_path):
    pictures = []
    for number, program in enumerate((['config.py'], ['-m', 'config'])):
        target = str(tmp_path / f'{number}.png')
        command = [*program, '-cfg=configs/evit_small_patch16_224_k07_fuse.yaml', '-plot', target, '-ngpus', '8']
        result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, '')
        lines = result.stdout.splitlines()
        assert lines[1] == 'keep rate: 1 at the start, 0.7 at the end, 0.7 to 1' and lines[-1] == target
        pictures.append(np.asarray(Image.open(target)))
    np.testing.assert_array_equal(*pictures)


def plot(monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, 'argv', ['config.py', *map(str, argv)])
    main()


def test_images_are_counted_where_a_schedule_needs_steps(images, tmp_path, monkeypatch, capsys):
    config = _config({**COMMON, **STEPS, 'DATA.DATA_PATH': images})
    write_config(config, tmp_path / 'steps.yaml')
    plot(monkeypatch, '-cfg', tmp_path / 'steps.yaml', '-plot', tmp_path / 'steps.png')
    assert capsys.readouterr().out.startswith('learning rate: 1e-06 at the start, ')
    with pytest.raises(UserError, match='none'):
        plot(monkeypatch, '-cfg', tmp_path / 'steps.yaml', '-plot', tmp_path / 'x.png', '-data_path', tmp_path / 'none')
    assert sorted(os.listdir(tmp_path)) == ['steps.png', 'steps.yaml']


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"-plot is '.*x.jpg', but must end in .png"):
        plot(monkeypatch, '-plot', tmp_path / 'x.jpg')
    argv = ['-opts', 'MODEL.TYPE', 'evit', 'MODEL.EVIT.KEEP_RATE', '0.5', 'TRAIN.NUM_ITERS', '9']
    with pytest.raises(UserError, match='keep_rate of the model follows epochs'):
        plot(monkeypatch, '-plot', tmp_path / 'x.png', *argv)
