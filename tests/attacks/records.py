# SPDX-License-Identifier: Apache-2.0
"""Hostile and damaged data sets: archives, LMDB, pickles, MATLAB files, annotations, lists, and YAML files."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np

from config import get_config
from datasets import build_dataset
from datasets.arrow import deserialize
from datasets.classes import read_classes
from datasets.coco import read_annotations
from datasets.dataset import BadImageError
from datasets.lmdb import CLASSES_KEY, FORMAT, FORMAT_KEY, LABELS_KEY, pack_record
from datasets.packed_maps import read_description
from datasets.polygons import coco_masks, decoded_rle
from tests.attacks.mutations import mutants
from tests.conftest import golden
from tests.datasets.layouts import write_cars, write_flowers, write_text
from tests.datasets.test_hostile import COCO
from tests.datasets.test_lmdb import writing
from tests.tools.conftest import CONFIG

FOLDERS = ('zip', 'lmdb', 'upstream', 'cifar', 'flowers', 'cars', 'lists')  # of `layouts`


def data_set(root: str, name: str, split: str = 'train') -> None:
    """Build a data set and read its first and last image."""
    dataset = build_dataset(get_config(opts=['DATA.DATASET', name, 'DATA.DATA_PATH', root]), split)
    for index in (0, len(dataset) - 1):
        dataset.load(index)


def annotations(path: str) -> None:
    found = read_annotations(path)
    for index in range(len(found.files)):
        for entry in found.objects_of(index):
            polygons, size = entry['segmentation'], found.sizes[index].tolist()
            if isinstance(polygons, dict):
                decoded_rle(polygons)
            elif polygons:
                coco_masks().decode(coco_masks().frPyObjects(polygons, *size))


def layouts(lab: SimpleNamespace) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Yield (kind, path of a valid file, what reads it)."""

    def folder(name: str) -> str:
        path = os.path.join(lab.folder, name)
        os.makedirs(path)
        shutil.copy(lab.image, os.path.join(path, 'a.png'))
        return path

    def kind(name: str, file: str, root: str, split: str = 'train') -> tuple[str, str, Callable[[], object]]:
        return name, os.path.join(root, file), lambda: data_set(root, name, split)

    with open(lab.image, 'rb') as file:
        image = file.read()
    root = folder('zip')
    with zipfile.ZipFile(os.path.join(root, 'train.zip'), 'w', zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f'{number}.png', image)
    write_text(pathlib.Path(root), {'train_map.txt': ''.join(f'{number}.png\t{number}\n' for number in range(3))})
    yield kind('zip', 'train.zip', root)
    yield kind('zip', 'train_map.txt', root)
    root = folder('lmdb')
    with writing(os.path.join(root, 'train.lmdb')) as transaction:
        for number in range(3):
            transaction.put(b'%d' % number, pack_record(image * (1 + 40 * number), number))
        for key, value in {FORMAT_KEY: FORMAT, LABELS_KEY: bytes(12), CLASSES_KEY: b'["a", "b"]'}.items():
            transaction.put(key, value)
    yield kind('lmdb', 'train.lmdb', root)
    root, reference = folder('upstream'), golden('evit-lmdb')
    with writing(os.path.join(root, 'train.lmdb')) as transaction:
        for number in range(3):
            transaction.put(b'%d' % number, reference[f'in/rec{number}'].astype('u1').tobytes())
        transaction.put(b'__len__', reference['in/len'].astype('u1').tobytes())
    yield kind('lmdb', 'train.lmdb', root)
    root = folder('cifar')
    batch = {'data': np.zeros((2, 3072), 'u1'), 'labels': [0, 1], 'filenames': ['a', 'b']}
    for number in range(1, 6):
        _write(root, f'data_batch_{number}', pickle.dumps(batch, number % 4))
    _write(root, 'batches.meta', pickle.dumps({'label_names': ['a', 'b']}, 2))
    for name in ('data_batch_1', 'data_batch_2', 'data_batch_4', 'batches.meta'):
        yield kind('cifar10', name, root)
    root = folder('flowers')
    write_flowers(pathlib.Path(root), [1, 2, 3], [1], [2], [3])
    yield kind('flowers102', 'imagelabels.mat', root)
    yield kind('flowers102', 'setid.mat', root)
    root = folder('cars')
    write_cars(pathlib.Path(root), [{'relative_im_path': 'a.png', 'class': 1, 'test': 0}] * 3)
    yield kind('cars', 'cars_annos.mat', root)
    root = folder('lists')
    texts = {
        'train_list.txt': 'a.png 0\na.png 1\n',
        'annotations/trainval.txt': 'a_1 1 1 1\na_2 2 1 1\n',
        'images_variant_trainval.txt': 'a 707\nb A 320\n',
        'categories.json': [{'name': 'a'}, {'name': 'b'}],
        'train2018.json': {
            'annotations': [{'category_id': 0}, {'category_id': 1}],
            'images': [{'file_name': 'x/y/0/a.jpg'}, {'file_name': 'x/y/1/b.jpg'}],
        },
    }
    write_text(pathlib.Path(root), texts)
    for name, file in zip(('list', 'pets', 'aircraft', 'inaturalist2018', 'inaturalist2018'), texts):
        yield kind(name, file, root)
    path = os.path.join(root, 'coco.json')
    rle = {**COCO['annotations'][0], 'id': 2, 'segmentation': {'size': [8, 8], 'counts': [10, 20, 34]}}
    text = {**rle, 'id': 3, 'segmentation': {'size': [8, 8], 'counts': ':d0R1'}}
    _write(root, 'coco.json', json.dumps({**COCO, 'annotations': [*COCO['annotations'], rle, text]}).encode())
    yield 'coco', path, lambda: annotations(path)
    classes = _write(root, 'classes.txt', b'a\t#000000\nb\t#ffffff\nc\n')
    yield 'classes', classes, lambda: read_classes(classes)
    maps = _write(
        root,
        'maps.json',
        b'{"classes": [["a", "#000000"], ["b", "#ffffff"]], "reduce_zero": false, "ids": [0, null, 1]}',
    )
    yield 'maps', maps, lambda: read_description(_read(maps), maps)
    record = _write(root, 'record', reference['in/rec0'].astype('u1').tobytes())
    yield 'arrow', record, lambda: _arrow(record)


def settings(lab: SimpleNamespace) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Yield (kind, path of a valid file, what reads it) of configuration files."""
    text = CONFIG.format(data=lab.images, output=lab.folder)
    path = _write(lab.folder, 'attack.yaml', text.encode())
    yield 'tiny', path, lambda: get_config(path)
    full = _write(lab.folder, 'full.yaml', get_config(path).dump().encode())
    yield 'full', full, lambda: get_config(full)


YAMLS = (
    'a: &a [x,x,x,x,x,x,x,x,x]\n' + ''.join(f'{c}: &{c} [{",".join([f"*{p}"] * 9)}]\n' for p, c in zip('abcdefgh', 'bcdefghi')),
    'BASE: &a [*a]', 'DATA: &a {X: *a}', '[' * 10_000, '{a: ' * 10_000, '- ' * 50_000, 'DATA: {BATCH_SIZE: ' + '9' * 100_000 + '}',
    'DATA: {BATCH_SIZE: 4611686018427387904}', 'DATA: {IMAGE_SIZE: 1099511627776}', 'DATA: {NUM_WORKERS: 1000000}',
    'DATA: {TIMEOUT: .inf}', 'DATA: {TIMEOUT: .nan}', 'DATA: {BATCH_SIZE: 1:2:3:4:5:6:7:8:9}', 'DATA: {BATCH_SIZE: 0x' + 'f' * 50 + '}',
    'DATA: !!python/object/apply:os.system ["touch HIT"]', 'DATA: !!python/name:os.system', '!!binary "x"', '!!set {a, b}',
    'DATA: {DATA_PATH: "\x1b[2J"}'.replace('\x1b', '\\x1b'), 'BASE: [/dev/zero]', 'BASE: [made.yaml]', '%YAML ' + '9' * 9000,
    '? [a]\n: b', 'DATA: {IMAGE_SIZE: 2001-01-01}', 'DATA:\n\tX: 1', '\0', 'MODEL: {NAME: ' + 'x' * 100_000 + '}', '--- a\n--- b', '*a',
    'MODEL: {MIXER: {DEPTH: 1000000000}}', 'MODEL: {NUM_CLASSES: 4611686018427387904}', 'TRAIN: {NUM_EPOCHS: 1.0e+308}',
)  # fmt: skip


def attacks(
    lab: SimpleNamespace, tries: int, sources: Callable = layouts, made: bool = True
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield (name, attack): YAML files made by hand if `made`, and `tries` damaged files, the same number of each kind."""
    for name in os.listdir(lab.folder):  # of an earlier process
        if name in FOLDERS:
            shutil.rmtree(os.path.join(lab.folder, name))
    kinds = list(sources(lab))
    if sources is settings and made:
        path = os.path.join(lab.folder, 'made.yaml')
        for number, text in enumerate(YAMLS):
            yield f'YAML {number}', lambda text=text: (_write(lab.folder, 'made.yaml', text.encode()), get_config(path))
    for index, (kind, path, read) in enumerate(kinds):
        data = _read(path)
        with contextlib.suppress(BadImageError):  # the valid file, some of which name images that are not there
            read()
        for number, damaged in enumerate(mutants(data, tries // len(kinds), seed=index)):
            yield f'{number} of {kind} {os.path.basename(path)}', _damaging(path, damaged, read)
        _write('', path, data)


def _damaging(path: str, damaged: bytes, read: Callable[[], object]) -> Callable[[], object]:
    def attack() -> None:
        _write('', path, damaged)
        labels = path + '.labels.npy'
        if os.path.exists(labels):
            os.unlink(labels)
        read()

    return attack


def _arrow(path: str) -> None:
    try:
        deserialize(_read(path))
    except ValueError:
        raise SystemExit(2) from None


def _read(path: str) -> bytes:
    with open(path, 'rb') as file:
        return file.read()


def _write(root: str, name: str, data: bytes) -> str:
    path = os.path.join(root, name)
    with open(path, 'wb') as file:
        file.write(data)
    return path
