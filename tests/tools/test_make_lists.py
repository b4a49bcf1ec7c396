# SPDX-License-Identifier: Apache-2.0
"""tools/make_lists.py as a user runs it."""

import os
import re
import subprocess
import sys

import pytest

from datasets.folder import read_list
from tests.conftest import ROOT


def run(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, os.path.join(ROOT, 'tools', 'make_lists.py'), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd='/')


@pytest.fixture
def tree(tmp_path):
    """`tree('train/a/1.jpg', ...)` makes empty files."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return make


def entries(path) -> list:
    names, labels = read_list(str(path))
    return list(zip(names, labels.tolist()))


def test_train_and_val(tree):
    """Sorted classes, sub-folders, blanks in names; a validation part with fewer classes keeps their numbers."""
    path = tree('train/b b/2.jpg', 'train/b b/1 1.PNG', 'train/a/x/9.jpeg', 'train/a/readme.txt', 'val/b b/v.bmp')
    done = run('-data_path', path)
    assert done.returncode == 0, done.stderr
    assert entries(path / 'train_list.txt') == [
        ('train/a/x/9.jpeg', 0),
        ('train/b b/1 1.PNG', 1),
        ('train/b b/2.jpg', 1),
    ]
    assert entries(path / 'val_list.txt') == [('val/b b/v.bmp', 1)]
    assert 'train_list.txt: 3 images, 2 of 2 classes' in done.stdout
    assert 'val_list.txt: 1 images, 1 of 2 classes' in done.stdout
    assert sorted(os.listdir(path)) == ['train', 'train_list.txt', 'val', 'val_list.txt']


@pytest.mark.parametrize('below', ['', 'train/'])
def test_split(tree, below):
    """The same share of each class, no image twice, the same draw each time."""
    path = tree(*(f'{below}{name}/{i}.jpg' for name, count in (('a', 20), ('b', 10), ('c', 2)) for i in range(count)))
    assert run('-data_path', path, '-split', 0.2).returncode == 0
    train, val = entries(path / 'train_list.txt'), entries(path / 'val_list.txt')
    assert [sum(label == k for _, label in val) for k in range(3)] == [4, 2, 1]
    assert len(set(train) | set(val)) == 32 == len(train) + len(val)
    assert all((path / name).exists() for name, _ in train + val)
    before = (path / 'val_list.txt').read_bytes()
    assert run('-data_path', path, '-split', 0.2, '-force').returncode == 0
    assert (path / 'val_list.txt').read_bytes() == before
    assert run('-data_path', path, '-split', 0.2, '-force', '-seed', 1).returncode == 0
    assert (path / 'val_list.txt').read_bytes() != before


def test_few_of_each_class(tree):
    """So many of each class for training, other ones with another seed; validation stays whole."""
    names = [f'{part}/{name}/{i}.jpg' for part in ('train', 'val') for name in 'ab' for i in range(9)]
    path = tree(*names)
    draws = set()
    for seed in (0, 0, 1):
        assert run('-data_path', path, '-per_class', 3, '-seed', seed, '-force').returncode == 0
        train = entries(path / 'train_list.txt')
        assert [label for _, label in train] == [0, 0, 0, 1, 1, 1] and train == sorted(set(train))
        draws.add(tuple(train))
        assert len(entries(path / 'val_list.txt')) == 18
    assert len(draws) == 2


def test_does_not_overwrite(tree):
    path = tree('train/a/1.jpg', 'val/a/1.jpg', 'val_list.txt')
    done = run('-data_path', path)
    assert done.returncode == 2
    assert done.stderr == f"error: '{path}/val_list.txt' exists; -force overwrites it.\n"
    assert not (path / 'train_list.txt').exists()
    assert run('-data_path', path, '-force').returncode == 0
    assert entries(path / 'val_list.txt') == [('val/a/1.jpg', 0)]


@pytest.mark.parametrize(
    ('names', 'args', 'message'),
    [
        (['train/a/1.jpg'], [], 'has no val/; -split 0.1'),
        (['train/a/1.jpg', 'val/b/1.jpg'], [], 'val/b.*no counterpart'),
        (['train/a/1.jpg', 'train/b/1.txt', 'val/a/1.jpg'], [], 'train/b.*holds no image'),
        (['train/a/1.jpg', 'val/a/1.jpg'], ['-split', 0.1], 'remove -split'),
        (['a/1.jpg'], ['-split', 0.1], 'single image'),
        (['a/1.jpg'], ['-split', 1.0], '-split is 1.0'),
        (['train/a/1.jpg', 'val/a/1.jpg'], ['-per_class', 2], "'a' has 1 training images, fewer than -per_class 2"),
        (['train/a/1.jpg', 'val/a/1.jpg'], ['-per_class', 0], '-per_class is 0'),
        (['train/a/x\ny.jpg', 'val/a/1.jpg'], [], 'line break'),
    ],
)
def test_mistakes(tree, names, args, message):
    """One sentence, status 2, nothing written."""
    path = tree(*names)
    done = run('-data_path', path, *args)
    assert done.returncode == 2
    assert done.stderr.startswith('error: ')
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr)
    assert not list(path.glob('*.txt'))


def test_missing_folder(tmp_path):
    done = run('-data_path', tmp_path / 'gone')
    assert done.returncode == 2
    assert 'gone' in done.stderr
