# SPDX-License-Identifier: Apache-2.0
"""Data files of every wrong kind: built, or refused by one sentence; never a traceback, and never long."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
import zlib

import numpy as np
import pytest
from scipy.io import savemat

from datasets import build_dataset
from datasets.arrow import deserialize
from datasets.classes import read_classes
from datasets.coco import read_annotations
from datasets.dataset import FileStorage
from datasets.images import UnreadableImage
from datasets.packed_maps import read_description
from datasets.polygons import coco_masks, decoded_rle
from tests.conftest import ROOT
from tests.datasets.layouts import CAR_FIELDS, write_cars, write_flowers, write_text
from tests.datasets.test_datasets import write_cifar
from tests.datasets.test_lmdb import writing
from utils.errors import UserError
from utils.files import open_regular
from utils.formats import read_file
from utils.processes import run_in_subprocess
from utils.schema import shown

SECONDS = 20
NESTED: list = []
for _ in range(50):
    NESTED = [NESTED, NESTED]
VALUES = [
    None, True, 0, -1, 3.5, float('nan'), 10**30, 2**63, '', 'text', '\x1b[2J', 'x' * 10**5, b'bytes', [], {}, (), [None], ['a'],
    [b'a'], [[1]], [[1, 2], [3]], [1, 'a', None], [2**70], {'a': 1}, {1: 2}, [[0], [1], [2]], [0.5, 1, 2], [-1, 0, 1], NESTED,
]  # fmt: skip


def attempt(*arguments) -> str:
    """The sentence of a refusal; empty where the data set is built, and its parts can be looked at."""
    start = time.monotonic()
    try:
        dataset = build_dataset(*arguments)
        assert len(dataset) and dataset.labels.dtype == np.int64 and dataset.describe(0)
        return ''
    except UserError as error:
        text = str(error)
        assert '\n' not in text and '\x1b' not in text and len(text) < 5000
        return text
    finally:
        assert time.monotonic() - start < SECONDS


# ---------------------------------------------------------------------------------------------------- special files
@pytest.fixture(params=['pipe', '/dev/zero', 'holes'])
def special(request, tmp_path):
    """`special(path)` puts a file there that blocks, has no end, or reads as gigabytes of zeros."""

    def make(path) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.lexists(path):
            os.unlink(path)
        if request.param == 'pipe':
            os.mkfifo(path)
        elif request.param == 'holes':
            with open(path, 'wb') as file:
                file.write(b'\x80\x04')
                file.truncate(6 << 30)
        else:
            os.symlink(request.param, path)

    make.reason = 'it has' if request.param == 'holes' else 'not a regular file'
    return make


def test_special_files_are_not_opened(special, tmp_path):
    path = str(tmp_path / 'x')
    special(path)
    with pytest.raises(OSError, match=special.reason):
        open_regular(path)
    with pytest.raises(UserError, match=special.reason):
        read_file(path)
    with pytest.raises(UnreadableImage, match=special.reason):
        FileStorage(str(tmp_path), ['x']).read(0)


LAYOUTS = {
    'list': ['train_list.txt'],
    'zip': ['train.zip', 'train_map.txt'],
    'cifar10': ['cifar-10-batches-py/data_batch_1', 'cifar-10-batches-py/batches.meta'],
    'flowers102': ['imagelabels.mat', 'setid.mat'],
    'cars': ['cars_annos.mat', 'devkit/cars_train_annos.mat'],
    'pets': ['annotations/trainval.txt'],
    'aircraft': ['fgvc-aircraft-2013b/data/images_variant_trainval.txt'],
    'inaturalist2018': ['categories.json', 'train2018.json'],
    'lmdb': ['train.lmdb'],
    'segmentation': ['classes.txt'],
}


@pytest.mark.parametrize('name, path', [(name, path) for name, paths in LAYOUTS.items() for path in paths])
def test_special_files_of_data_sets(special, tmp_path, make_config, name, path):
    write_cifar(tmp_path, 'cifar-10-batches-py')
    write_flowers(tmp_path, [1, 2, 3], [1], [2], [3])
    write_text(tmp_path, {'categories.json': [{'name': 'a'}], 'train_map.txt': 'a.jpg\t0\n'})
    with zipfile.ZipFile(tmp_path / 'train.zip', 'w') as file:
        file.writestr('a.jpg', b'')
    special(str(tmp_path / path))
    text = attempt(make_config(tmp_path, DATA__DATASET=name), 'train')
    assert os.path.basename(path) in text


# ---------------------------------------------------------------------------------------------------- wrong kinds
def test_cifar_of_every_kind(tmp_path, make_config):
    folder, _ = write_cifar(tmp_path, 'cifar-10-batches-py')
    config = make_config(tmp_path, DATA__DATASET='cifar10')
    assert attempt(config, 'train') == ''
    good = pickle.loads((folder / 'data_batch_1').read_bytes())
    arrays = [
        np.zeros((3, 3072), 'f4'),
        np.zeros((0, 3072), 'u1'),
        np.zeros(3072, 'u1'),
        np.array(3),
        np.zeros((3, 1), int),
    ]
    for key in ('data', 'labels'):
        for value in [*VALUES[:-1], *arrays, np.zeros(3, 'c8'), np.full(3, 1e300), np.full(3, 2**63, 'u8')]:
            (folder / 'data_batch_1').write_bytes(pickle.dumps({**good, key: value}, 2))
            assert attempt(config, 'train'), (key, value)
    for value in (['x' * 10**6] * 10**5, [['x' * 10**6] * 10**5]):  # one text, but numpy would repeat it
        (folder / 'data_batch_1').write_bytes(pickle.dumps({**good, 'labels': value}, 2))
        assert 'labels that are not whole numbers' in attempt(config, 'train')
    for value in VALUES:
        (folder / 'data_batch_1').write_bytes(pickle.dumps(value, 2))
        assert attempt(config, 'train'), value
    (folder / 'data_batch_1').write_bytes(pickle.dumps(good, 2))
    for value in VALUES:
        (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': value}, 2))
        assert attempt(config, 'train'), value
    for data in (
        b'\x80\x04\x8e' + struct.pack('<Q', 1 << 60),
        b'\x80\x04\x95' + b'\xff' * 8,
        b'cos\nsystem\n(Vtrue\ntR.',
        b'',
    ):
        (folder / 'batches.meta').write_bytes(data)
        assert 'batches.meta' in attempt(config, 'train')


def test_json_of_every_kind(tmp_path, make_config):
    config = make_config(tmp_path, DATA__DATASET='inaturalist2018')
    good = {
        'categories.json': [{'name': 'a'}],
        'train2018.json': {'annotations': [{'category_id': 0}], 'images': [{'file_name': 'x/y/0/a.jpg'}]},
    }
    write_text(tmp_path, good)
    assert attempt(config, 'train') == ''
    plain = [value for value in VALUES[:-1] if not isinstance(value, bytes) and value != [b'a']]
    for value in plain:
        for name in good:
            write_text(tmp_path, {**good, name: [value] if isinstance(value, str) else value})
            assert attempt(config, 'train'), (name, value)
        write_text(tmp_path, {**good, 'categories.json': [{'name': value}]})
        assert isinstance(value, str) or attempt(config, 'train')
        for part, key in (('annotations', 'category_id'), ('images', 'file_name')):
            train = good['train2018.json']
            write_text(tmp_path, {**good, 'train2018.json': {**train, part: [{key: value}]}})
            assert attempt(config, 'train') or value in (0, False), (part, value)
            write_text(tmp_path, {**good, 'train2018.json': {**train, part: value}})
            assert attempt(config, 'train'), (part, value)
    for text in ('[' * 200_000, '{"a":' * 200_000, '9' * 100_000, '[' + '[],' * 1000, '\0', '\x1b[2J'):
        write_text(tmp_path, {**good, 'categories.json': text})
        assert 'categories.json' in attempt(config, 'train')


def test_matlab_of_every_kind(tmp_path, make_config):
    flowers, cars = (make_config(tmp_path, DATA__DATASET=name) for name in ('flowers102', 'cars'))
    write_flowers(tmp_path, [1, 2, 3], [1], [2], [3])
    assert attempt(flowers, 'train') == ''
    cell = np.empty((2, 2), object)
    cell[:] = [['a', np.eye(2)], [1j, {'x': 1}]]
    values = [
        np.eye(3), np.array([[1.5]]), np.array([[np.nan]]), np.array([[1e300]]), np.array([['text']]), np.zeros((0, 0)), cell,
        np.array([[1j]]), {'field': 1}, np.array([[True]]), np.array([[-1]]),
    ]  # fmt: skip
    for value in values:
        savemat(tmp_path / 'imagelabels.mat', {'labels': value})
        attempt(flowers, 'train')
    write_flowers(tmp_path, [1, 2, 3], [1], [2], [3])
    for value in values:
        savemat(tmp_path / 'setid.mat', {'trnid': value, 'valid': value})
        attempt(flowers, 'train')
    row = {'relative_im_path': 'car_ims/1.jpg', 'class': 1, 'test': 0}
    for field in ('relative_im_path', 'class', 'test'):
        for value in values:
            write_cars(tmp_path, [row, {**row, field: value}])
            attempt(cars, 'train')
    for value in values:
        savemat(tmp_path / 'cars_annos.mat', {'annotations': value})
        assert attempt(cars, 'train')
    matrix = np.empty((2, 2), [(field, object) for field in CAR_FIELDS])
    matrix[:] = tuple(row.get(field, 1) for field in CAR_FIELDS)
    savemat(tmp_path / 'cars_annos.mat', {'annotations': matrix, 'class_names': cell})
    attempt(cars, 'train')


def test_matlab_bomb(tmp_path, make_config):
    """A matrix of 256 MB in 300 kB, which lists of Python numbers would make 10 GB."""
    config = make_config(tmp_path, DATA__DATASET='flowers102')
    write_flowers(tmp_path, [1], [1], [1], [1])
    size = 1 << 28
    tag = struct.pack('<II', 14, size + 56) + struct.pack('<IIII', 6, 8, 9, 0) + struct.pack('<IIii', 5, 8, 1, size)
    tag += struct.pack('<II', 1, 6) + b'labels\0\0' + struct.pack('<II', 2, size)
    packer = zlib.compressobj(9)
    data = packer.compress(tag) + b''.join(packer.compress(bytes(1 << 24)) for _ in range(16)) + packer.flush()
    content = (
        b'MATLAB 5.0 MAT-file'.ljust(124)
        + struct.pack('<HH', 0x0100, 0x4D49)
        + struct.pack('<II', 15, len(data))
        + data
    )
    (tmp_path / 'imagelabels.mat').write_bytes(content)
    assert 'has 268435456 entries' in attempt(config, 'train')


def endless() -> None:
    while True:
        pass


def hungry() -> int:
    return len(bytearray(2 << 30))


def test_a_process_apart_is_bounded(monkeypatch):
    monkeypatch.setattr('utils.processes.SECONDS', 1)
    with pytest.raises(Exception, match='terminated abruptly'):
        run_in_subprocess(endless)
    with pytest.raises(MemoryError):
        run_in_subprocess(hungry)


def test_lmdb_of_every_kind(tmp_path, make_config):
    config = make_config(tmp_path, DATA__DATASET='lmdb')
    path, labels = tmp_path / 'train.lmdb', np.zeros(2, '<i4').tobytes()

    def text(**values: bytes) -> str:
        if path.exists():
            path.unlink()
        with writing(path) as transaction:
            for key, value in {'0': b'x', '1': b'x', **values}.items():
                transaction.put(key.encode(), value)
        return attempt(config, 'train')

    own = {'__format__': b'leanvit-lmdb-1', '__labels__': labels}
    assert text(**own) == '' and text(**own, __classes__=b'["a", "b"]') == ''
    for classes in (
        b'1',
        b'null1',
        b'{"a": 1}',
        b'[1, 2]',
        b'"text"',
        b'[' * 100_000,
        b'9' * 10_000,
        b'\xff',
        b'',
        b'["a", null]',
    ):
        assert text(**own, __classes__=classes), classes
    for stored in (b'', b'abc', labels * 100, b'\xff' * 8, struct.pack('<ii', 0, 2**31 - 1)):
        assert text(**{**own, '__labels__': stored, '__classes__': b'["a"]'}), stored
    for stored in (b'', b'text', b'\x1b[2J', b'\xff' * 100):
        assert text(__format__=stored)
        assert text(__len__=stored)


def test_descriptions_of_label_maps_of_every_kind():
    good = {'classes': [['a', '#000000'], ['b', '#ffffff']], 'reduce_zero': False, 'ids': None}
    assert read_description(json.dumps(good).encode(), 'x')[0].names == ['a', 'b']
    plain = [value for value in VALUES[:-1] if not isinstance(value, bytes) and value != [b'a']]
    pairs = [[['a', value]] for value in plain] + [
        [[value, '#000000']] for value in plain if not isinstance(value, str)
    ]
    cases = [('classes', value) for value in [*plain, *pairs, [['a', '#' + '00' * 10**5]]]]
    cases += [('reduce_zero', value) for value in plain if not isinstance(value, bool)]
    cases += [
        ('ids', value) for value in [*plain, [2], [-1], [True], [0] * 70_000] if value not in (None, (), [], [None])
    ]
    for key, value in cases:
        with pytest.raises(UserError, match='the description of its label maps cannot be read') as info:
            read_description(json.dumps({**good, key: value}).encode(), 'x')
        assert len(str(info.value)) < 400, (key, value)
    for data in (b'', b'[' * 10**5, b'\xff', b'[]', b'1'):
        with pytest.raises(UserError, match='the description of its label maps cannot be read'):
            read_description(data, 'x')


COCO = {
    'categories': [{'id': 1, 'name': 'a'}],
    'images': [{'id': 1, 'file_name': 'a.jpg', 'height': 8, 'width': 8}],
    'annotations': [
        {
            'id': 1, 'image_id': 1, 'category_id': 1, 'bbox': [0, 0, 4, 4], 'area': 16, 'iscrowd': 0,
            'segmentation': [[0, 0, 4, 0, 4, 4, 0, 4]],
        }
    ],
}  # fmt: skip


def annotations(tmp_path, **changes) -> str:
    """The sentence of a refusal; empty where the file is read and its objects can be drawn."""
    write_text(tmp_path, {'a.json': {**COCO, **changes}})
    start = time.monotonic()
    try:
        found = read_annotations(str(tmp_path / 'a.json'))
        for entry in found.objects_of(0) if found.files else ():
            polygons = entry['segmentation']
            decoded_rle(polygons) if isinstance(polygons, dict) else coco_masks().decode(
                coco_masks().frPyObjects(polygons, 8, 8)
            ) if polygons else None
        return ''
    except UserError as error:
        assert '\n' not in str(error) and len(str(error)) < 5000
        return str(error)
    finally:
        assert time.monotonic() - start < SECONDS


def test_annotations_of_every_kind(tmp_path):
    assert annotations(tmp_path) == ''
    plain = [value for value in VALUES[:-1] if not isinstance(value, bytes) and value != [b'a']]
    values = [*plain, 10**400, -(10**400), 1e300, [10**400] * 4, [1e300] * 6, [[1e300] * 6], [[10**9] * 6], [[0] * 7]]
    for part, entries in COCO.items():
        for value in values:
            annotations(tmp_path, **{part: value})
            annotations(tmp_path, **{part: [value]})
            for field in entries[0]:
                annotations(tmp_path, **{part: [{**entries[0], field: value}]})
    large = [{**COCO['images'][0], 'height': 60000, 'width': 60000}]
    assert 'are more than' in annotations(tmp_path, images=large)
    assert 'must be a number of pixels' in annotations(tmp_path, images=[{**large[0], 'height': 2**40}])
    assert 'coordinates beyond' in annotations(
        tmp_path, annotations=[{**COCO['annotations'][0], 'segmentation': [[0, 0, 10**9, 0, 10**9, 10**9]]}]
    )
    for counts in ([64], [63, 1], 'a' * 10**6, 'o' * 10**6, '', [2**62, 2**62], [-1, 65], [10**400], ['x'], None):
        rle = {'size': [8, 8], 'counts': counts}
        text = annotations(tmp_path, annotations=[{**COCO['annotations'][0], 'segmentation': rle}])
        assert bool(text) == (counts not in ([64], [63, 1])), counts
    for text in ('[' * 10**5, '{"images":' * 10**5, '9' * 10**5, '\xff', ''):
        (tmp_path / 'a.json').write_text(text, encoding='latin1')
        with pytest.raises(UserError, match='is no JSON file'):
            read_annotations(str(tmp_path / 'a.json'))


def test_special_annotations(special, tmp_path):
    special(str(tmp_path / 'a.json'))
    with pytest.raises(UserError, match=special.reason):
        read_annotations(str(tmp_path / 'a.json'))


def test_arrow_streams_that_lead_back_or_multiply():
    rng = np.random.default_rng(0)
    for size in (16, 40, 200, 1000):
        for _ in range(200):
            with pytest.raises(ValueError):
                deserialize(bytes(16) + rng.integers(0, 4, size, 'u1').tobytes() + rng.bytes(size))


# ---------------------------------------------------------------------------------------------------- archives and lists
def test_zip_bombs(tmp_path, make_config, monkeypatch):
    with zipfile.ZipFile(tmp_path / 'train.zip', 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('a.jpg', bytes(200 << 20))
    (tmp_path / 'train_map.txt').write_text('a.jpg\t0\n')
    dataset = build_dataset(make_config(tmp_path, DATA__DATASET='zip'), 'train')
    with pytest.raises(UserError, match=r'a\.jpg.*the member has 209715200 bytes, more than'):
        dataset.load(0)


@pytest.mark.parametrize('field', ['size', 'stored size', 'offset'])
def test_zip_numbers_of_64_bits(tmp_path, make_config, field):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as file:
        file.writestr('a.jpg', b'')
    data = buffer.getvalue()
    start = data.index(b'PK\1\2')
    entry = bytearray(data[start : data.index(b'PK\5\6')])
    place = {'size': 24, 'stored size': 20, 'offset': 42}[field]
    entry[place : place + 4] = b'\xff' * 4
    entry[30:32] = struct.pack('<H', 12)
    entry += struct.pack('<HHQ', 1, 8, 2**64 - 1)
    end = bytearray(data[data.index(b'PK\5\6') :])
    end[12:16] = struct.pack('<I', len(entry))
    (tmp_path / 'train.zip').write_bytes(data[:start] + bytes(entry) + bytes(end))
    (tmp_path / 'train_map.txt').write_text('a.jpg\t0\n')
    assert 'train.zip' in attempt(make_config(tmp_path, DATA__DATASET='zip'), 'train')


def test_lists_of_every_kind(tmp_path, make_config):
    config = make_config(tmp_path)
    for line in ('x' * 10**7, 'a.jpg ' + '9' * 10**6, 'a.jpg \x1b[2J', '\x1b]0;t\x07 0', 'a.jpg -1', '\0' * 100):
        (tmp_path / 'train_list.txt').write_text(line)
        assert 'train_list.txt' in attempt(config, 'train')


def test_many_class_names(tmp_path):
    """Names are compared with all before them, so the limit is checked on the way."""
    path = tmp_path / 'classes.txt'
    path.write_text('\n'.join(map(str, range(300_000))))
    start = time.monotonic()
    with pytest.raises(UserError, match='more than 65535 classes'):
        read_classes(str(path))
    assert time.monotonic() - start < SECONDS


def test_a_command_on_a_pipe_ends(tmp_path):
    """-cfg on a pipe that nobody writes to."""
    os.mkfifo(tmp_path / 'x.yaml')
    done = subprocess.run(
        [sys.executable, 'config.py', f'-cfg={tmp_path}/x.yaml'], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and 'not a regular file' in done.stderr and done.stderr.count('\n') == 1


def test_shown_values_are_short():
    assert len(shown('x' * 10**6)) < 200
