# SPDX-License-Identifier: Apache-2.0
"""tools/make_zip.py: what it writes, and that it writes all or nothing."""

import io
import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from config import get_config
from datasets import build_dataset
from datasets.images import decode_image
from tests.conftest import ROOT
from tools import make_lmdb, make_zip
from utils.errors import UserError

COMMAND = [sys.executable, os.path.join(ROOT, 'tools', 'make_zip.py')]
FILES = ['train.zip', 'train_map.txt', 'val.zip', 'val_map.txt']


@pytest.fixture
def tree(tmp_path):
    """`tree('train/a/1.png', ...)` makes pictures that differ."""

    def make(*names):
        for number, name in enumerate(names):
            path = tmp_path / 'data' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path, 'PNG')
        return tmp_path / 'data'

    return make


def opened(path, split: str, kind: str = 'zip'):
    return build_dataset(get_config(None, ['DATA.DATASET', kind, 'DATA.DATA_PATH', str(path)]), split)


def test_from_folders(tree, tmp_path):
    """As a user runs it: stored members, maps with one TAB, images byte by byte; twice the same files."""
    path = tree('train/b b/2.png', 'train/b b/ü.PNG', 'train/a/x/9.jpeg', 'val/b b/v.bmp')
    done = subprocess.run([*COMMAND, '-data_path', path, '-output', tmp_path / 'one'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r'train\.zip: 3 images, 2 classes, 0\.0 MB\n.*val\.zip: 1 images', done.stdout)
    assert sorted(os.listdir(tmp_path / 'one')) == FILES
    assert (tmp_path / 'one' / 'train_map.txt').read_text() == 'a/x/9.jpeg\t0\nb b/2.png\t1\nb b/ü.PNG\t1\n'
    assert (tmp_path / 'one' / 'val_map.txt').read_text() == 'b b/v.bmp\t1\n'
    with zipfile.ZipFile(tmp_path / 'one' / 'train.zip') as file:
        assert {member.compress_type for member in file.infolist()} == {zipfile.ZIP_STORED}
        assert file.testzip() is None
    for split in ('train', 'val'):
        files, packed = opened(path, split, 'folder'), opened(tmp_path / 'one', split)
        assert packed.labels.tolist() == files.labels.tolist()
        assert all(packed.storage.read(i) == files.storage.read(i) for i in range(len(files)))
    make_zip.main(['-data_path', str(path), '-output', str(tmp_path / 'two')])
    for name in FILES:
        assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes()


def write_picture(path, size, **options) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC).convert(options.pop('mode', 'RGB')).save(
        path, **options
    )


@pytest.mark.parametrize('tool', [make_zip, make_lmdb])
def test_larger_images_are_shrunk(tmp_path, tool):
    """To the wanted longer side, in their kind of file, with their orientation; small images keep their bytes."""
    data, exif = tmp_path / 'data', Image.Exif()
    exif[0x0112] = 6
    write_picture(data / 'train/a/small.jpg', (40, 30))
    write_picture(data / 'train/a/turned.jpg', (120, 60), exif=exif, quality=95)
    write_picture(data / 'train/b/gray.jpg', (3, 400), mode='L', quality=95)
    write_picture(data / 'train/b/print.jpg', (100, 80), mode='CMYK', quality=95)
    write_picture(data / 'train/b/flat.png', (64, 100), mode='P')
    kind = tool.__name__.split('_')[-1]
    tool.main(
        ['-data_path', str(data), '-dataset', 'folder', '-split', 'train', '-max_side', '40', '-output', str(tmp_path)]
    )
    files, packed = opened(data, 'train', 'folder'), opened(tmp_path, 'train', kind)
    assert packed.labels.tolist() == files.labels.tolist()
    sizes = {'small': (40, 30), 'turned': (40, 20), 'gray': (1, 40), 'print': (40, 32), 'flat': (26, 40)}
    for index in range(len(files)):
        name, suffix = os.path.splitext(os.path.basename(files.describe(index)))
        before, after = files.storage.read(index), packed.storage.read(index)
        assert (before == after) == (name == 'small')
        picture = Image.open(io.BytesIO(after))
        assert (picture.size, picture.format) == (sizes[name], 'PNG' if suffix == '.png' else 'JPEG')
        assert picture.getexif().get(0x0112) == (6 if name == 'turned' else None)
        expected = decode_image(before).resize(sizes[name], Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(decode_image(after), int) - np.asarray(expected, int)).mean() < 4


def test_images_that_cannot_be_shrunk(tree, tmp_path):
    path = tree('train/a/1.png')
    (path / 'train/a/2.png').write_bytes(b'no image')
    with pytest.raises(UserError, match=r"2\.png': not an image"):
        make_zip.main(['-data_path', str(path), '-split', 'train', '-dataset', 'folder', '-max_side', '4'])
    with pytest.raises(UserError, match='-max_side is 0'):
        make_zip.main(['-data_path', str(path), '-max_side', '0'])
    assert not (path / 'train.zip').exists()


def test_another_side_starts_over(tree, monkeypatch):
    """An interrupted make_lmdb continues only with the same -max_side."""
    path = tree('train/a/1.png', 'train/a/2.png')
    arguments = ['-data_path', str(path), '-dataset', 'folder', '-split', 'train', '-output', str(path)]
    verify = make_lmdb.verify
    monkeypatch.setattr(make_lmdb, 'verify', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_lmdb.main(arguments)
    monkeypatch.setattr(make_lmdb, 'verify', verify)
    make_lmdb.main([*arguments, '-max_side', '4'])
    packed = opened(path, 'train', 'lmdb')
    assert [Image.open(io.BytesIO(packed.storage.read(index))).size for index in range(2)] == [(4, 4)] * 2


def test_from_lists(tree):
    """Order and labels of the lists; an image that is listed twice is stored once."""
    path = tree('images/1.png', 'images/2.png', 'images/3.png')
    (path / 'train_list.txt').write_text('images/3.png 5\nimages/1.png 0\nimages/3.png 5\n')
    make_zip.main(['-data_path', str(path), '-split', 'train'])
    dataset = opened(path, 'train')
    assert (path / 'train_map.txt').read_text() == 'images/3.png\t5\nimages/1.png\t0\nimages/3.png\t5\n'
    assert dataset.storage.read(0) == dataset.storage.read(2) == (path / 'images' / '3.png').read_bytes()
    with zipfile.ZipFile(path / 'train.zip') as file:
        assert file.namelist() == ['images/3.png', 'images/1.png']


def test_does_not_overwrite(tree):
    path = tree('train/a/1.png', 'val/a/2.png')
    (path / 'val_map.txt').write_text('mine')
    with pytest.raises(UserError, match=r"val_map\.txt' exists; -force overwrites it"):
        make_zip.main(['-data_path', str(path)])
    assert sorted(os.listdir(path)) == ['train', 'val', 'val_map.txt']
    assert make_zip.main(['-data_path', str(path), '-force']) is None
    assert (path / 'val_map.txt').read_text() == 'a/2.png\t0\n'


@pytest.mark.parametrize(
    ('listed', 'message'),
    [
        ('images/gone.png', r'images/gone\.png.*No such file.*repair it or remove it from the list'),
        ('images/a\tb.png', 'tab or a line break'),
        ('images/note.txt', 'not an image by its name'),
        ('images/\udcff.png', 'not UTF-8'),
    ],
)
def test_mistakes(tree, listed, message):
    """Nothing is written."""
    path = tree('images/1.png', 'images/a\tb.png', 'images/note.txt', 'images/\udcff.png')
    (path / 'train_list.txt').write_bytes(os.fsencode(f'images/1.png 0\n{listed} 1\n'))
    with pytest.raises(UserError, match=message):
        make_zip.main(['-data_path', str(path), '-split', 'train'])
    assert sorted(os.listdir(path)) == ['images', 'train_list.txt']


def test_verification(tree, monkeypatch):
    """A member that comes back differently: nothing is left."""
    path = tree('train/a/1.png', 'train/a/2.png')
    original = zipfile.ZipFile.writestr

    def writestr(self, member, data):
        original(self, member, data[:-1] + b'?' if member.filename == 'a/2.png' else data)

    monkeypatch.setattr(zipfile.ZipFile, 'writestr', writestr)
    with pytest.raises(UserError, match=r"'a/2\.png' in .* differs from its image file"):
        make_zip.main(['-data_path', str(path), '-split', 'train'])
    assert os.listdir(path) == ['train']


@pytest.mark.parametrize('step', ['write_members', 'verify'])
def test_interrupted(tree, monkeypatch, step):
    """What was there before stays, as a pair."""
    path = tree('train/a/1.png', 'train/a/2.png')
    make_zip.main(['-data_path', str(path), '-split', 'train'])
    before = {name: (path / name).read_bytes() for name in FILES[:2]}
    (path / 'train' / 'a' / '1.png').unlink()
    monkeypatch.setattr(make_zip, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert make_zip.main(['-data_path', str(path), '-split', 'train', '-force']) == 130
    assert {name: (path / name).read_bytes() for name in FILES[:2]} == before
    assert sorted(os.listdir(path)) == ['train', *FILES[:2]]


def test_killed(tree):
    """Without warning, again and again: there is never a map with an archive that it does not belong to."""
    path = tree(*(f'train/{number % 5}/{number}.png' for number in range(200)))
    command = [*COMMAND, '-data_path', path, '-split', 'train', '-force']
    subprocess.run(command, check=True, capture_output=True)
    for number in range(100):
        (path / 'train' / str(number % 5) / f'{number}.png').unlink()
    for delay in (0.0, 0.01):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(path.glob('.train*')):
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (path / 'train_map.txt').exists():
            assert len(opened(path, 'train')) in (100, 200)
    subprocess.run(command, check=True, capture_output=True)
    assert len(opened(path, 'train')) == 100
