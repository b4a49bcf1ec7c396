# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/extending.md run as the page says, from a folder outside of the repository."""

import csv
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from config import VIT
from tests.conftest import ROOT
from tests.engine.curves import read_state
from tests.runs.conftest import environment, metrics

SHORT = ['-opts', 'TRAIN.NUM_EPOCHS', '1', 'TRAIN.WARMUP_EPOCHS', '0', 'DATA.BATCH_SIZE', '256']
with open(os.path.join(ROOT, 'docs', 'extending.md'), encoding='utf-8') as page:
    PAGE = page.read()
FILES = dict(re.findall(r'^```(?:python|yaml)\n# (\S+)\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r'^python .*$', PAGE.partition('\n## A model\n')[2], re.MULTILINE)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The examples and the repository, as the page places them, and files for the data set."""
    folder = tmp_path_factory.mktemp('extending')
    (folder / 'LeanViT').symlink_to(ROOT)
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding='utf-8')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        (folder / 'data' / 'pictures' / split).mkdir(parents=True)
        for number in range(8):
            picture = Image.fromarray(rng.integers(0, 255, (16, 16), 'uint8'))
            picture.save(folder / 'data' / 'pictures' / split / f'{("cat", "dog")[number % 2]}_{number}.png')
    return folder


def start(folder, *arguments, status=0) -> str:
    """Standard output of a command; the last line of standard error where it fails."""
    variables = environment(PYTHONPATH=str(folder / 'LeanViT'))
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stderr.splitlines()[-1] if status else done.stdout


def run_examples(folder, name: str) -> list[str]:
    """Runs the commands of one example, trainings for one epoch; returns what each printed."""
    outputs = []
    for command in COMMANDS:
        arguments = shlex.split(command)[1:]
        if arguments[0] == f'{name}.py':
            if 'port_weights' in command:
                publish(folder)
            outputs.append(start(folder, *arguments, *(SHORT if '-tag' in command else ())))
    return outputs


def publish(folder) -> None:
    """Writes the trained weights as a PyTorch program would have them."""
    state = read_state(str(folder / 'output' / 'convnet' / 'best.pdparams'))
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    np.savez(
        folder / 'convnet.npz',
        **{n.replace('head.', 'fc.'): a.T if n == 'head.weight' else a for n, a in arrays.items()},
    )


def rows(folder, run: str, kind: str) -> list[dict]:
    return [row for row in metrics(folder / 'output' / run) if row['kind'] == kind]


def test_the_page_has_one_module_and_one_recipe_for_each_example():
    names = [name.removesuffix('.py') for name in FILES if name.endswith('.py')]
    assert len(names) == 5 and sorted(FILES) == sorted(f'{name}.{end}' for name in names for end in ('py', 'yaml'))
    assert all(f'test_{name}' in globals() for name in names)


def test_convnet(folder):
    _, evaluated, exported, ported = run_examples(folder, 'convnet')
    (trained,) = rows(folder, 'convnet', 'val')
    assert f'Acc@1: {trained["acc1"]:.4f}' in evaluated
    assert 'written: exported/convnet.json' in exported and 'written: ported.pdparams' in ported
    best, copy = (read_state(str(folder / path)) for path in ('output/convnet/best.pdparams', 'ported.pdparams'))
    for name in best:
        np.testing.assert_array_equal(best[name], copy[name])


def test_keys_of_others_have_no_effect_for_a_users_model(folder):
    err = start(folder, 'convnet.py', 'config.py', '-cfg=convnet.yaml', '-opts', 'MODEL.TOME.R', '2', status=2)
    assert f'has no effect for MODEL.TYPE convnet, only for {", ".join(VIT)};' in err


def test_pooling(folder):
    run_examples(folder, 'pooling')
    names = read_state(str(folder / 'output' / 'pooling' / 'best.pdparams'))
    assert 'blocks.3.attn.qkv.weight' in names and not any(name.startswith('blocks.0.attn.') for name in names)


def test_patch_dropout(folder):
    run_examples(folder, 'patch_dropout')
    (row,) = rows(folder, 'patch_dropout', 'val')
    assert row['images'] == 355


def test_rotation(folder):
    _, predicted, measured = run_examples(folder, 'rotation')
    (trained,) = rows(folder, 'rotation', 'train')
    (row,) = rows(folder, 'rotation', 'val')
    assert {'loss', 'cross_entropy', 'entropy', 'correct'} <= trained.keys() and 0 <= row['error'] <= 1
    assert trained['loss'] == pytest.approx(trained['cross_entropy'] - 0.05 * trained['entropy'], rel=1e-4)
    with open(folder / 'rotation.csv', encoding='utf-8') as file:
        table = list(csv.DictReader(file))
    assert len(table) == 8 and set(table[0]) == {'image', 'turns', 'probability', 'error'}
    assert '8 images, 0 of them unreadable' in predicted and 'rotation.yaml' in measured


def test_pictures(folder):
    _, evaluated = run_examples(folder, 'pictures')
    (trained,) = rows(folder, 'pictures', 'val')
    assert f'Acc@1: {trained["acc1"]:.4f}' in evaluated
    err = start(folder, 'pictures.py', 'main_single_gpu.py', '-cfg=pictures.yaml', '-data_path=none', status=2)
    assert err == "error: there is no folder 'none/train': set DATA.DATA_PATH (-data_path)."
