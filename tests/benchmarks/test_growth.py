# SPDX-License-Identifier: Apache-2.0
"""benchmarks/growth.py: exponents, models along the axes, list files, the picture."""

import json
import multiprocessing

import numpy as np
import pytest
from PIL import Image

from benchmarks import growth
from benchmarks.long_lists import measure_list

FAST = {'image size': 64, 'depth': 4, 'batch': 1, 'classes': 10}


def test_exponents():
    x = [1, 2, 4, 8]
    assert growth.exponent(x, [3 * value**1.5 for value in x]) == pytest.approx(1.5)
    assert growth.exponent(x, [7, 7, 7, 7]) == pytest.approx(0)


@pytest.mark.parametrize('name', ['EViT 0.5', 'gMLP-S'])
def test_a_step_of_each_model(name):
    """Values of the axes reach the model: twice the batch has twice the MACs, a class has one weight per channel."""
    one, wide = (growth.measure_step(name, {**FAST, **values}, 1) for values in ({}, {'batch': 2, 'classes': 11}))
    channels = 256 if name == 'gMLP-S' else 384
    assert wide['params'] - one['params'] == channels + 1
    assert wide['macs'] == 2 * (one['macs'] + channels)
    assert min(one['seconds'], one['cpu_seconds']) > 0


def test_tokens_are_dropped_at_the_quarters_of_the_depth():
    config = growth.configured('EViT 0.5', {**FAST, 'depth': 24})
    assert list(config.MODEL.EVIT.DROP_LOC) == [6, 12, 18] and config.MODEL.TRANS.DEPTH == 24


def test_a_list(tmp_path):
    row = measure_list(str(tmp_path), 600)
    assert row['images'] == 600 and row['list MB'] == pytest.approx(600 * 43 / 1e6, rel=0.1)
    assert row['data set s'] > 0 and row['epoch s'] > 0 and row['worker MB'] > 0
    assert not multiprocessing.active_children()


def test_the_file_and_the_picture(tmp_path, monkeypatch, capsys):
    def step(name, values, steps):
        cost = values['image size'] ** 2 * values['batch'] * values['depth'] + values['classes']
        return {'macs': cost, 'cpu_seconds': cost * 1e-9, 'memory_bytes': cost}

    def lists(folder, count):
        names = ('data set s', 'data set MB', 'data set peak MB', 'epoch s', 'epoch peak MB', 'worker MB')
        return {'images': count, **dict.fromkeys(names, count / 1e6)}

    monkeypatch.setattr(growth, 'measure_step', step)
    monkeypatch.setattr(growth, 'measure_list', lists)
    monkeypatch.setattr(growth, 'in_process', lambda function, *arguments: function(*arguments))
    growth.main(['-json', str(tmp_path / 'a.json'), '-picture', str(tmp_path / 'a.png'), '-images', '1e3', '1e5'])
    result = json.loads((tmp_path / 'a.json').read_text())
    found = {(row['name'], row['axis']): row['exponents']['macs']['all'] for row in result['models']}
    assert len(found) == len(growth.MODELS) * len(growth.AXES)
    assert found['gMLP-S', 'image size'] == pytest.approx(2, abs=0.01)
    assert [row['images'] for row in result['images']] == [1000, 100000]
    with Image.open(tmp_path / 'a.png') as picture:
        assert len(np.unique(np.asarray(picture.convert('L')))) > 20
    assert 'EViT 0.5, depth 4 to 24: exponents of macs 1.00' in capsys.readouterr().out
