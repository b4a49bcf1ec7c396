# SPDX-License-Identifier: Apache-2.0
"""The tool that chooses layers: its files, alone and on two processes."""

import argparse
import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from config import get_config
from datasets import build_dataset
from datasets.subset import random_subset
from tests.conftest import ROOT
from tests.runs.conftest import environment
from tests.tools.conftest import write_transformer
from tools import select_layers
from utils.errors import UserError
from utils.files import atomic_write


@pytest.fixture(scope='module')
def trained(tmp_path_factory, images):
    """Path of a configuration, of weights, and their folder."""
    folder = tmp_path_factory.mktemp('selection')
    return *write_transformer(folder, 'deit_tiny_patch16_224', images), folder


@pytest.fixture(scope='module')
def chosen(trained):
    """What the tool wrote: its result, and the path of the configuration."""
    cfg, weights, folder = trained
    target = str(folder / 'out' / 'alone')
    select_layers.main(['-cfg', cfg, '-pretrained', weights, '-number', '2', '-images', '60', '-output', target])
    with open(f'{target}.json', encoding='utf-8') as file:
        return json.load(file), target


def test_files(chosen, trained):
    result, target = chosen
    assert result['images'] == 60 and len(result['order']) == 2 and sorted(result['order']) == result['layers']
    for step in result['steps']:
        assert min(step['transfer'], key=step['transfer'].get) == str(step['chosen'])
    assert [len(layers) for layers in result['branches'].values()] == [4, 4]
    with Image.open(f'{target}.png') as picture:
        assert picture.width > 1000
    config = get_config(f'{target}.yaml')
    assert tuple(result['layers']) == config.MODEL.LAMBDA.PRUNE_LAYERS
    assert config.MODEL.TRANS.EMBED_DIM == 24  # of the configuration it was chosen on
    assert sorted(os.listdir(os.path.dirname(target))) == ['alone.json', 'alone.png', 'alone.yaml']


@pytest.mark.parametrize('folder', ['plain', 'dat\udce9: #数', 'long ' * 40])
def test_the_configuration_finds_its_base_by_any_name(chosen, trained, tmp_path, folder):
    cfg = str(tmp_path / folder / 'base.yaml')
    os.makedirs(os.path.dirname(cfg))
    shutil.copy(trained[0], cfg)
    config = get_config(cfg)
    args = argparse.Namespace(cfg=cfg, target=str(tmp_path / 'out' / 'x'))
    with atomic_write(f'{args.target}.yaml', 'w') as file:
        file.write(select_layers.recipe(args, config, chosen[0]))
    assert get_config(f'{args.target}.yaml').MODEL.TRANS.EMBED_DIM == 24


def test_two_processes_find_the_same(chosen, trained):
    cfg, weights, folder = trained
    target = str(folder / 'shared' / 'two')
    command = [
        sys.executable,
        '-m',
        'paddle.distributed.launch',
        '--nproc_per_node',
        '2',
        '--log_dir',
        str(folder / 'log'),
    ]
    arguments = [
        '-cfg',
        cfg,
        '-pretrained',
        weights,
        '-number',
        '2',
        '-images',
        '60',
        '-output',
        target,
        '-batch_size',
        '7',
    ]
    subprocess.run(
        [*command, os.path.join(ROOT, 'tools', 'select_layers.py'), *arguments],
        env=environment(PADDLE_DISTRI_BACKEND='gloo'), cwd=ROOT, check=True, capture_output=True, timeout=180,
    )  # fmt: skip
    with open(f'{target}.json', encoding='utf-8') as file:
        result = json.load(file)
    assert result['order'] == chosen[0]['order']
    for ours, theirs in zip(result['steps'], chosen[0]['steps']):
        assert ours['base'] == pytest.approx(theirs['base'], abs=1e-4)
        assert ours['entropies'] == pytest.approx(theirs['entropies'], abs=1e-4)
    assert result['branches']['attn'] == pytest.approx(chosen[0]['branches']['attn'], abs=1e-4)


def test_the_images_are_drawn_from_all_classes(trained):
    data = build_dataset(get_config(trained[0]), 'train')
    part = random_subset(data, 30, seed=0)
    assert len(part) == 30 and set(part.labels.tolist()) == {0, 1, 2}
    names = [part.describe(i) for i in range(30)]
    assert len(set(names)) == 30 and names == sorted(names)
    labels = {data.describe(i): label for i, label in enumerate(data.labels.tolist())}
    assert [labels[name] for name in names] == part.labels.tolist()
    assert random_subset(data, 1000, seed=0) is data
    assert part.load(3).size == data.load(0).size


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['-number', '4'], 'cannot select 4 attention layers'),
        (['-number', '1', '-images', '1'], '1 images are too few'),
        (['-number', '1', '-opts', 'MODEL.TOME.R', '2'], 'MODEL.TOME.R to 0'),
    ],
)
def test_mistakes(trained, arguments, words):
    cfg, weights, folder = trained
    target = str(folder / 'mistake' / 'x')
    with pytest.raises(UserError, match=words):
        select_layers.main(['-cfg', cfg, '-pretrained', weights, '-output', target, *arguments])
    assert not os.path.exists(os.path.dirname(target)) or not os.listdir(os.path.dirname(target))
