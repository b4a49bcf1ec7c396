# SPDX-License-Identifier: Apache-2.0
"""Real runs: launchers in their own processes, on a small folder of images."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from tests.conftest import ROOT

CONFIG = """
DATA: {{DATASET: folder, DATA_PATH: '{data}', IMAGE_SIZE: 16, BATCH_SIZE: 8, NUM_WORKERS: 2, CROP_PCT: 1.0}}
MODEL:
  TYPE: gmlp
  NAME: tiny
  DROPOUT: 0.1
  DROPPATH: 0.1
  MIXER: {{PATCH_SIZE: 4, EMBED_DIM: 16, DEPTH: 2, MLP_RATIO: 2}}
TRAIN:
  NUM_EPOCHS: 3
  WARMUP_EPOCHS: 1
  ACCUM_ITER: 2
  MODEL_EMA: true
  MODEL_EMA_DECAY: 0.9
  GRAD_CLIP: 1.0
  LR_SCHEDULER: {{UPDATE: step}}
REPORT_FREQ: 1
SAVE_STEPS: 1
SAVE_FREQ: 1
SAVE: '{output}'
"""


@pytest.fixture
def recipe(tmp_path, images):
    """Path of a small recipe that uses workers, augmentation, mixing, accumulation, clipping, dropout and EMA."""
    path = tmp_path / 'tiny.yaml'
    path.write_text(CONFIG.format(data=images, output=tmp_path / 'out'))
    return str(path)


def write_recipe(folder, images, text):
    """Path of a recipe that changes the small one, in a folder of its own."""
    (folder / 'tiny.yaml').write_text(CONFIG.format(data=images, output=folder))
    (folder / 'recipe.yaml').write_text('BASE: [tiny.yaml]' + text)
    return str(folder / 'recipe.yaml')


def environment(**variables):
    return {**{k: v for k, v in os.environ.items() if not k.startswith(('PADDLE_', 'FLAGS_', 'MALLOC_'))}, **variables}


def start(script, *argv, **variables):
    command = [sys.executable, os.path.join(ROOT, script), *argv]
    return subprocess.Popen(
        command, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def finish(process, timeout=180):
    """(exit status, standard output, standard error) of a launcher."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f'still running after {timeout} s:\n{out[-2000:]}\n{err[-2000:]}') from None
    return process.returncode, out, err


def run(script, *argv, status=0, **variables):
    """Runs a launcher to its end and checks its exit status."""
    code, out, err = finish(start(script, *argv, **variables))
    assert code == status, f'status {code}\n{out[-3000:]}\n{err[-3000:]}'
    return out, err


def wait_for(path, text, process, timeout=120):
    """Waits until a line of the file `path` holds `text`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if os.path.exists(path):
            with open(path, encoding='utf-8') as file:
                if text in file.read():
                    return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"'{text}' did not appear in {path}")


def send(process, number):
    """Signals a launcher; SIGKILL reaches every process it started, as when a machine goes down."""
    if number == signal.SIGKILL:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.send_signal(number)
    return finish(process)


def state(folder, name='last.pdparams'):
    """Content of a checkpoint that this very test run wrote."""
    with open(os.path.join(folder, name), 'rb') as file:
        return pickle.load(file)


def metrics(folder):
    with open(os.path.join(folder, 'metrics.jsonl'), encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def learnt(folder):
    """What two equal runs must agree on, to the last bit: losses, accuracies, weights, moments, averages, position."""
    timing = ('seconds', 'images_per_second')
    rows = [{key: value for key, value in row.items() if key not in timing} for row in metrics(folder)]
    content = state(folder)
    return {
        'rows': rows,
        'position': (content['epoch'], content['step'], content['sampler'], content['progress']),
        **{f'{part}/{key}': flat for part in ('model', 'model_ema') for key, flat in content[part].items()},
        **{f'{kind}/{key}': value for kind, values in content['optimizer'].items() for key, value in values.items()},
    }


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, right[key], err_msg=key)
        else:
            assert value == right[key], key


def train_on_two(recipe, folder, *more):
    """The folder of a run on two processes."""
    run('main_multi_gpu.py', f'-cfg={recipe}', f'-output={folder}', '-tag=run', *more, NPROC='2')
    return folder / 'run'


def check_that_it_resumes(recipe, straight, folder, *more):
    """Stops a run on two processes in its second epoch and goes on; it must equal the run `straight`."""
    flags = (f'-cfg={recipe}', f'-output={folder}', '-tag=cut', *more)
    process = start('main_multi_gpu.py', *flags, NPROC='2')
    wait_for(folder / 'cut' / 'log.txt', 'Epoch[002/003], Step[0001/', process)
    status, out, err = send(process, signal.SIGTERM)
    assert status == 143, out + err
    run('main_multi_gpu.py', *flags, f'-resume={folder / "cut"}', NPROC='2')
    assert_same(learnt(folder / 'cut'), learnt(straight))
