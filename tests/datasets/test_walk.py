# SPDX-License-Identifier: Apache-2.0
"""Which files below a folder are images, and what is said about the other ones."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from PIL import Image

from datasets import build_dataset
from datasets.images import EXTENSIONS
from datasets.walk import describe_counts, images_below
from tools._common import find_images
from utils.errors import UserError


@pytest.fixture
def touch(tmp_path):
    """`touch('a/1.jpg', ...)` makes empty files and returns their root."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    return make


HIDDEN = ['.ipynb_checkpoints', '@eaDir', '.thumbnails', '__MACOSX', '#recycle', '$RECYCLE.BIN', '.x/y']


def test_hidden_files_and_folders(touch):
    """At any depth; a class is none of them either, and a hidden folder that is asked for is read."""
    root = touch(
        'a/1.jpg', 'a/._1.jpg', 'a/.2.png', *(f'{below}{name}/1.jpg' for name in HIDDEN for below in ('a/', 'a/b/', ''))
    )
    assert images_below(root, 'a') == (['a/1.jpg'], Counter())
    assert images_below(os.path.join(root, '.x', 'y')) == (['./1.jpg'], Counter())
    assert find_images([root]) == [os.path.join(root, 'a', '1.jpg')]


def test_left_out(touch, capsys):
    root = touch('1.JPG', 'a/2.heic', 'a/3.HEIC', 'a/notes.txt', 'README', *(f'x.{number}' for number in range(5)))
    paths, left_out = images_below(root)
    assert paths == ['./1.JPG']
    assert left_out == Counter({'.heic': 2, '.txt': 1, '': 1, **{f'.{number}': 1 for number in range(5)}})
    assert describe_counts(Counter({'.heic': 2, '': 1})) == '2 .heic, 1 without extension'
    assert describe_counts(left_out).endswith('3 of other kinds')
    assert find_images([root]) == [os.path.join(root, '1.JPG')]
    assert '2 .heic' in capsys.readouterr().err
    with pytest.raises(UserError, match=r'no image .* below .*only other files \(2 \.heic, 1 \.txt\)'):
        find_images([os.path.join(root, 'a')])


LOOPS = {'self': '.', 'parent': '..', 'root': '../..', 'unreadable': 'unreadable', 'outside': '/'}


@pytest.mark.parametrize('link', LOOPS)
def test_links_to_folders_that_they_lie_in(touch, link):
    root = touch('a/b/1.jpg', 'c/2.jpg')
    os.symlink(LOOPS[link], os.path.join(root, 'a', 'b', link))
    assert images_below(root, 'a')[0] == ['a/b/1.jpg']


def test_links_to_other_folders(touch, tmp_path):
    """Are followed, once; a folder's own path goes before links to it. Links to each other are no loop."""
    root = touch('a/b/1.jpg', 'a/c/2.jpg', 'elsewhere/3.jpg')
    for link, target in (('a/0', 'b'), ('a/b/c', '../c'), ('a/c/b', '../b'), ('a/x', '../elsewhere'), ('a/y', 'x')):
        os.symlink(target, tmp_path / link)
    os.symlink('elsewhere/3.jpg', tmp_path / 'a' / '3.jpg')
    os.symlink('gone', tmp_path / 'a' / 'gone.jpg')
    os.mkfifo(tmp_path / 'a' / 'pipe.jpg')
    assert images_below(root, 'a')[0] == ['a/3.jpg', 'a/gone.jpg', 'a/b/1.jpg', 'a/c/2.jpg', 'a/x/3.jpg']


@pytest.mark.parametrize('target', ['.', '..'])
def test_classes(touch, tmp_path, make_config, target):
    """A link to the data folder itself is no class."""
    root = touch('train/b/1.jpg', 'train/a/1.gif', 'train/a/n.txt', *(f'train/{name}/1.jpg' for name in HIDDEN))
    os.symlink(target, tmp_path / 'train' / 'loop')
    dataset = build_dataset(make_config(root, DATA__DATASET='folder'), 'train')
    assert (dataset.class_names, dataset.labels.tolist()) == (['a', 'b'], [0, 1])
    assert dataset.notes == [f"left out below '{root}/train', not images by their extensions: 1 .txt (1 in all)."]


FORMATS = {
    '.jfif': 'JPEG',
    '.gif': 'GIF',
    '.jp2': 'JPEG2000',
    '.pbm': 'PPM',
    '.tiff': 'TIFF',
    '.dib': 'DIB',
    '.avif': 'AVIF',
}


@pytest.mark.parametrize('extension', [extension for extension in FORMATS if extension in EXTENSIONS])
def test_formats(tmp_path, make_config, extension):
    folder = tmp_path / 'train' / 'a'
    folder.mkdir(parents=True)
    Image.new('1' if extension == '.pbm' else 'RGB', (9, 8), 1).save(folder / f'x{extension}', FORMATS[extension])
    dataset = build_dataset(make_config(tmp_path, DATA__DATASET='folder'), 'train')
    assert (dataset.load(0).size, dataset.load(0).mode) == ((9, 8), 'RGB')


def test_programs_are_no_images(tmp_path, make_config):
    """PostScript, which Pillow would have Ghostscript run, is refused under any name."""
    folder = tmp_path / 'train' / 'a'
    folder.mkdir(parents=True)
    Image.new('RGB', (9, 8)).save(folder / 'x.jpg', 'EPS')
    dataset = build_dataset(make_config(tmp_path, DATA__DATASET='folder'), 'train')
    with pytest.raises(UserError, match='x.jpg.*not an image that Pillow knows'):
        dataset.load(0)
    assert not {'.eps', '.ps', '.wmf', '.pdf'} & set(EXTENSIONS)
