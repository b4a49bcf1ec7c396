# SPDX-License-Identifier: Apache-2.0
"""tools/verify_data.py: what counts as a problem and what does not."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from datasets import Dataset
from datasets.registry import DATASETS
from tests.conftest import ROOT
from tools import make_zip, verify_data
from utils.errors import UserError


def encoded(image: Image.Image, kind: str = 'PNG', **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 17, 3), dtype=np.uint8))


GOOD = {
    '1x1.png': encoded(Image.new('RGB', (1, 1))),
    'cmyk.jpg': encoded(picture(1).convert('CMYK'), 'JPEG'),
    'gray.jpg': encoded(picture(2).convert('L'), 'JPEG'),
    'palette.png': encoded(picture(3).convert('P')),
    'transparent.png': encoded(picture(4).convert('P'), transparency=b'\0\1'),
    'deep.png': encoded(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)),
    'bits.png': encoded(Image.new('1', (8, 8))),
    'jpeg.png': encoded(picture(5), 'JPEG'),  # the name does not matter
    'photograph.jpg': encoded(picture(6), 'JPEG'),
}
BAD = {
    'truncated.jpg': (encoded(picture(7), 'JPEG')[:-9], 'truncated'),
    'truncated.png': (encoded(picture(8))[:-200], 'truncated'),
    'text.jpg': (b'<html>404 Not Found</html>', 'not an image'),
    'empty.jpg': (b'', 'empty'),
    'huge.png': (encoded(Image.new('1', (20000, 20000))), 'exceeds limit'),
    'float.tif': (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), 'TIFF'), 'floating'),
}


@pytest.fixture
def write(tmp_path):
    """`write({'train/a/1.png': bytes, ...})` makes files and returns their root."""

    def make(files: dict):
        for name, data in files.items():
            path = tmp_path / 'data' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / 'data'

    return make


def verify(path, *args, dataset: str = 'folder') -> tuple[int, dict]:
    """Exit status and report."""
    report = path.parent / 'report.json'
    status = verify_data.main(['-dataset', dataset, '-data_path', str(path), '-report', str(report), *args])
    return status, json.loads(report.read_text())


CLEAN = {**{f'train/a/{name}': data for name, data in GOOD.items()}, 'val/a/0.png': encoded(picture(0))}


@pytest.mark.parametrize('workers', ['0', '2'])
def test_clean(write, workers, capsys):
    """Everything that training can use is no problem."""
    status, report = verify(write(CLEAN), '-num_workers', workers)
    assert (status, report['problems']) == (0, [])
    facts = {'images': 9, 'classes': 1, 'empty_classes': [], 'images_per_class': [9, 9], 'unreadable': 0}
    assert report['parts']['train'] == facts
    assert report['parts']['val'] == {**facts, 'images': 1, 'images_per_class': [1, 1]}
    assert 'train: 9 images in 1 classes of 9 to 9' in capsys.readouterr().out


@pytest.mark.parametrize('workers', ['0', '3'])
def test_unreadable(write, workers, capsys):
    path = write({**CLEAN, **{f'train/b/{name}': data for name, (data, _) in BAD.items()}})
    status, report = verify(path, '-num_workers', workers)
    assert status == 1
    assert report['parts']['train']['unreadable'] == len(BAD)
    found = {os.path.basename(problem['image']): problem for problem in report['problems']}
    assert found.keys() == BAD.keys()
    for name, (_, reason) in BAD.items():
        assert reason in found[name]['reason']
        assert (found[name]['kind'], found[name]['part']) == ('unreadable', 'train')
        assert found[name]['image'] == str(path / 'train' / 'b' / name)
    assert 'unreadable: ' in capsys.readouterr().out


def test_copies(write, capsys):
    """Within a part, across parts, and with different labels; names do not matter, unreadable files are reported once."""
    same, leaked = encoded(picture(1)), encoded(picture(2))
    path = write(
        {
            'train/a/1.png': same,
            'train/b/1.png': same,
            'train/a/2.png': leaked,
            'val/a/3.png': leaked,
            'train/a/4.png': encoded(picture(4)),
            'val/b/4.png': encoded(picture(5)),
            'train/a/5.png': b'',
            'val/b/6.png': b'',
        }
    )
    status, report = verify(path)
    assert status == 1
    kinds = {problem['kind']: problem for problem in report['problems'] if problem['kind'] != 'unreadable'}
    assert len(report['problems']) == 4
    assert kinds['duplicate']['images'] == [str(path / name) for name in ('train/a/1.png', 'train/b/1.png')]
    assert (kinds['duplicate']['parts'], kinds['duplicate']['labels']) == (['train', 'train'], [0, 1])
    assert kinds['leak']['images'] == [str(path / name) for name in ('train/a/2.png', 'val/a/3.png')]
    assert (kinds['leak']['parts'], kinds['leak']['labels']) == (['train', 'val'], [0, 0])
    output = capsys.readouterr().out
    assert 'with different labels [0, 1]' in output
    assert output.count('with different labels') == 1


def test_lists(write):
    """Lines and labels: file and line in the report; what can be opened is checked all the same."""
    path = write({'1.png': encoded(picture(1)), '2.png': encoded(picture(2))})
    (path / 'train_list.txt').write_text('1.png 0\n2.png 1\n')
    (path / 'val_list.txt').write_text('1.png 0\n2.png 2\n')
    status, report = verify(path, dataset='list')
    assert status == 1
    (problem,) = report['problems']
    assert (problem['kind'], problem['part']) == ('list', 'val')
    assert 'val_list.txt:2: label 2 is out of range' in problem['reason']
    assert report['parts'].keys() == {'train'}
    status, report = verify(path, '-num_classes', '5', dataset='list')
    assert [problem['kind'] for problem in report['problems']] == ['leak', 'leak']


def test_labels(write, capsys):
    """Labels from 1, a label that is far too large, contradictory lines, a zero byte: none of them is clean."""
    path = write({f'{number}.png': encoded(picture(number)) for number in range(4)})
    (path / 'val_list.txt').write_text('3.png 1\n')
    (path / 'train_list.txt').write_text('0.png 1\n1.png 2\n2.png 3\n')
    status, report = verify(path, dataset='list')
    (problem,) = report['problems']
    assert (status, problem['kind'], problem['part']) == (1, 'empty', 'train')
    assert re.search(
        r'1 of 4 classes have no image in .*train_list\.txt.*: 0\. Do labels start from 1', problem['reason']
    )
    assert f'empty: {problem["reason"]}' in capsys.readouterr().out
    assert report['parts']['train']['empty_classes'] == [0]
    assert report['parts']['train']['images_per_class'] == [0, 1]

    (path / 'train_list.txt').write_text('0.png 0\n1.png 999999999\n2.png 1\n')
    status, report = verify(path, dataset='list')
    assert status == 1
    assert 'train_list.txt:2: label 999999999 makes' in report['problems'][0]['reason']
    assert len(report['parts']['train']['empty_classes']) == 1000

    (path / 'train_list.txt').write_text('0.png 0\n0.png 1\n1.png 1\n')
    status, report = verify(path, dataset='list')
    assert [(problem['kind'], problem['labels']) for problem in report['problems']] == [('duplicate', [0, 1])]
    assert 'train_list.txt:2' in report['notes'][0]

    (path / 'train_list.txt').write_text('0.png 0\n1\0.png 1\n')
    status, report = verify(path, dataset='list')
    assert (status, report['problems'][0]['kind']) == (1, 'list')
    assert 'train_list.txt:2: a zero byte' in report['problems'][0]['reason']


def test_left_out(write, capsys):
    """Files that are no images by their names are a note, and hidden ones nothing."""
    path = write({**CLEAN, 'train/a/x.heic': b'', 'val/a/.ipynb_checkpoints/0.png': CLEAN['val/a/0.png']})
    status, report = verify(path)
    assert (status, report['problems']) == (0, [])
    (note,) = report['notes']
    assert re.match("train: left out below '.*train', .*: 1 .heic", note)
    assert note in capsys.readouterr().out.splitlines()


def test_a_folder_that_is_not_there(tmp_path):
    """Nothing to report on: a mistake of the command."""
    with pytest.raises(UserError, match='gone'):
        verify(tmp_path / 'gone')
    assert not (tmp_path / 'report.json').exists()


def test_zip(write):
    """Through a storage, with a damaged member."""
    path = write(CLEAN)
    make_zip.main(['-data_path', str(path)])
    data = bytearray((path / 'train.zip').read_bytes())
    data[data.index(GOOD['photograph.jpg']) + 100] ^= 1
    (path / 'train.zip').write_bytes(data)
    status, report = verify(path, dataset='zip')
    assert (status, len(report['problems'])) == (1, 1)
    assert report['problems'][0]['image'].endswith('train.zip@/a/photograph.jpg')


def test_pictures_in_memory(tmp_path, monkeypatch):
    """Data without image files are compared by their pixels."""

    class Squares:
        def __len__(self):
            return 4

        def open(self, index):
            return Image.new('RGB', (4, 4), (index // 2, 0, 0))

        def describe(self, index):
            return f'square {index}'

    monkeypatch.setattr(DATASETS, '_entries', dict(DATASETS._entries))
    monkeypatch.setattr(DATASETS, '_aliases', dict(DATASETS._aliases))
    DATASETS.register('squares')(lambda config, split: Dataset(Squares(), [0, 1, 0, 1], 'squares', ['a', 'b']))
    _, report = verify(tmp_path / 'x', dataset='squares')
    assert [problem['images'] for problem in report['problems']] == [
        ['square 0', 'square 1', 'square 0', 'square 1'],
        ['square 2', 'square 3', 'square 2', 'square 3'],
    ]


def test_a_worker_that_is_killed(write, monkeypatch):
    """One sentence that says where it was."""
    path = write(CLEAN)

    def check_image(dataset, index):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(verify_data, 'check_image', check_image)
    with pytest.raises(UserError, match=r'a worker died .*train/a/1x1\.png.*memory'):
        verify(path, '-num_workers', '2')


def test_command(write, tmp_path):
    """Status 0, 1 and 2 as a shell sees them; a closed set of lines on the screen."""
    path = write({**CLEAN, 'train/b/1.jpg': b'no image'})
    command = [sys.executable, os.path.join(ROOT, 'tools', 'verify_data.py'), '-dataset=folder', '-num_workers=1']

    def run(*args):
        return subprocess.run([*command, *args], capture_output=True, text=True, cwd=tmp_path)

    done = run(f'-data_path={path}')
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, 'verify_data.json: 1 problems')
    assert json.loads((tmp_path / 'verify_data.json').read_text())['problems'][0]['kind'] == 'unreadable'
    (path / 'train' / 'b' / '1.jpg').write_bytes(encoded(picture(9)))
    done = run(f'-data_path={path}', '-report=clean.json')
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, 'clean.json: 0 problems')
    done = run('-data_path=/gone')
    assert (done.returncode, done.stderr.count('\n')) == (2, 1)
