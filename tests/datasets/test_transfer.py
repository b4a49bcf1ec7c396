# SPDX-License-Identifier: Apache-2.0
"""Flowers-102, Pets, Aircraft, Cars and iNaturalist in the layouts of their authors: MAE-Lite's lists, and every fault."""

import os
import re
import signal
import sys

import numpy as np
import pytest
from scipy.io import savemat

from config import get_config
from datasets import build_dataset, list_datasets, resolve_num_classes, transfer
from models import list_models
from models.registry import config_file
from tests.conftest import golden
from tests.datasets.layouts import write_cars, write_case, write_devkit_cars, write_flowers, write_text
from tests.datasets.test_datasets import write_cifar
from tools import make_lmdb, make_zip, verify_data
from utils.errors import UserError

# Our name of each case of the reference, and how many classes its training part has.
CASES = {
    'aircraft': ('aircraft', 6),
    'pets': ('pets', 37),
    'flowers': ('flowers102', 102),
    'cars': ('cars', 196),
    'inat': ('inaturalist2018', 3),
}
VGG = 'https://www.robots.ox.ac.uk/~vgg/data'
# Each file that a part is read from, and where it is published.
FILES = [
    ('flowers', 'train', 'imagelabels.mat', f'{VGG}/flowers/102/'),
    ('flowers', 'val', 'setid.mat', f'{VGG}/flowers/102/'),
    ('pets', 'train', 'annotations/trainval.txt', f'{VGG}/pets/'),
    ('pets', 'val', 'annotations/test.txt', f'{VGG}/pets/'),
    ('aircraft', 'train', 'fgvc-aircraft-2013b/data/images_variant_trainval.txt', f'{VGG}/fgvc-aircraft/'),
    ('aircraft', 'val', 'fgvc-aircraft-2013b/data/images_variant_test.txt', f'{VGG}/fgvc-aircraft/'),
    ('cars', 'train', 'cars_annos.mat', 'http://ai.stanford.edu/~jkrause/car196/cars_annos.mat'),
    ('inat', 'train', 'categories.json', 'categories.json.tar.gz of https://github.com/visipedia/inat_comp/'),
    ('inat', 'val', 'train2018.json', 'train2018.json.tar.gz of https://github.com/visipedia/inat_comp/'),
    ('inat', 'val', 'val2018.json', 'val2018.json.tar.gz of https://github.com/visipedia/inat_comp/'),
]


@pytest.fixture
def layout(tmp_path, make_config):
    """`layout(case, **keys)` writes a case of the reference to tmp_path and returns a configuration that reads it."""

    def make(case: str, **keys):
        write_case(tmp_path, golden('mae_lite-datasets').meta['cases'][case])
        return make_config(tmp_path, DATA__DATASET=CASES[case][0], **keys)

    return make


def listed(dataset, root) -> list:
    """[path relative to `root`, label] of each image."""
    return [[os.path.relpath(dataset.describe(i), root), label] for i, label in enumerate(dataset.labels.tolist())]


# ---------------------------------------------------------------------------------------------------- what is read
@pytest.mark.parametrize('case', CASES)
def test_lists(layout, tmp_path, write_image, case):
    """Those of the original, in its order; an image is missed, by its path, when it is read."""
    expected = golden('mae_lite-datasets').meta['cases'][case]['expected']
    config = layout(case)
    train, val = build_dataset(config, 'train'), build_dataset(config, 'val')
    assert listed(train, tmp_path) == expected['train']
    assert listed(val, tmp_path) == expected.get('test', expected.get('val'))
    assert train.labels.dtype == val.labels.dtype == np.int64
    assert train.num_classes == val.num_classes == len(train.class_names) == CASES[case][1]
    assert train.num_classes == expected.get('num_classes_train', expected.get('num_classes', train.num_classes))
    assert case == 'pets' or train.class_names == val.class_names  # those of pets are called as images of the part are
    path = expected['train'][1][0]
    with pytest.raises(UserError, match=f'{re.escape(path)}.*number 1 of .*No such file'):
        train.load(1)
    write_image(tmp_path / path)
    assert train.load(1).mode == 'RGB'
    with pytest.raises(UserError, match=f'NUM_CLASSES is 5, but .* has {CASES[case][1]} classes'):
        resolve_num_classes(layout(case, MODEL__NUM_CLASSES=5), train)


def test_class_names(layout, tmp_path, make_config):
    """From wherever the files have them; classes without a name are called by their numbers, from 1."""
    names = {case: build_dataset(layout(case), 'train').class_names for case in CASES}
    assert names['aircraft'] == ['707-320', 'A300B4', 'Boeing 717', 'DC-10', 'Gulfstream IV', 'Gulfstream V']
    assert (names['pets'][1], names['pets'][2], names['pets'][36]) == ('american_bulldog', '3', 'yorkshire_terrier')
    assert names['inat'] == ['species 2', 'species 0', 'species 3']
    assert names['flowers'][::101] == ['1', '102']
    assert names['cars'][::195] == ['1', '196']
    row = {'relative_im_path': 'car_ims/000001.jpg', 'class': 2, 'test': 0}
    write_cars(tmp_path, [row], ['AM General Hummer SUV 2000', 'Acura RL Sedan 2012'])  # one car: no row is left of it
    cars = build_dataset(make_config(tmp_path, DATA__DATASET='cars'), 'train')
    assert (cars.num_classes, cars.class_names[1], cars.labels.tolist()) == (2, 'Acura RL Sedan 2012', [1])


@pytest.mark.parametrize(
    ('case', 'outer'),
    [
        ('flowers', 'flowers-102'),
        ('pets', 'oxford-iiit-pet'),
        ('aircraft', ''),
        ('aircraft', 'fgvc-aircraft-2013b'),
        ('aircraft', 'fgvc-aircraft-2013b/data'),
    ],
)
def test_one_level_off(tmp_path, make_config, case, outer):
    """Where torchvision unpacks, and inside the folder that an archive makes."""
    description = golden('mae_lite-datasets').meta['cases'][case]
    inner = outer if case != 'aircraft' else ''
    (tmp_path / inner).mkdir(exist_ok=True)
    write_case(tmp_path / inner, description)
    path = tmp_path if inner else tmp_path / outer
    train = build_dataset(make_config(path, DATA__DATASET=CASES[case][0]), 'train')
    assert listed(train, tmp_path / inner) == description['expected']['train']


@pytest.mark.parametrize(('outer', 'labels'), [('', ''), ('stanford_cars', ''), ('', 'devkit')])
def test_devkit_of_cars(tmp_path, make_config, write_image, outer, labels):
    """As unpacked from the archives, and where torchvision unpacks them; the test labels beside the devkit or in it."""
    root, names = tmp_path / outer, ['AM General Hummer SUV 2000', 'Acura RL Sedan 2012']
    write_devkit_cars(root, [(2, '00001.jpg'), (1, '00002.jpg')], [(1, '00001.jpg')], names, labels)
    write_image(root / 'cars_train' / '00002.jpg')
    config = make_config(tmp_path, DATA__DATASET='cars')
    train, val = build_dataset(config, 'train'), build_dataset(config, 'val')
    assert listed(train, root) == [['cars_train/00001.jpg', 1], ['cars_train/00002.jpg', 0]]
    assert listed(val, root) == [['cars_test/00001.jpg', 0]]
    assert train.class_names == val.class_names == names
    assert train.load(1).mode == 'RGB'


def test_devkit_of_cars_without_some_files(tmp_path, make_config):
    """Names are optional, test labels are not; cars_annos.mat has precedence."""
    write_devkit_cars(tmp_path, [(196, '00001.jpg')], None)
    config = make_config(tmp_path, DATA__DATASET='cars')
    assert build_dataset(config, 'train').class_names[::195] == ['1', '196']
    with pytest.raises(
        UserError, match='cars_test_annos_withlabels.mat. is missing; .*car_dataset.html, .*/issues/7545'
    ):
        build_dataset(config, 'val')
    write_devkit_cars(tmp_path, [(197, '00001.jpg')], None)
    with pytest.raises(UserError, match='cars_train_annos.mat., class: number 1 is 197, .* 1 to 196'):
        build_dataset(config, 'train')
    savemat(tmp_path / 'devkit' / 'cars_train_annos.mat', {'annotations': 1})
    with pytest.raises(UserError, match="cars_train_annos.mat., annotations have no 'class'"):
        build_dataset(config, 'train')
    write_cars(tmp_path, [car()])
    assert listed(build_dataset(config, 'train'), tmp_path) == [['car_ims/000001.jpg', 0]]


def test_aircraft_levels(tmp_path, make_config):
    """Families and manufacturers; a test list that lacks a class does not shift the others."""
    folder = tmp_path / 'fgvc-aircraft-2013b' / 'data'
    for level, names in (
        ('family', ['Boeing 707', 'DC-10', 'A300']),
        ('manufacturer', ['Boeing', 'Douglas', 'Airbus']),
    ):
        train = ''.join(f'000000{i} {name}\r\n' for i, name in enumerate(names))
        write_text(folder, {f'images_{level}_trainval.txt': train, f'images_{level}_test.txt': f'0000009 {names[1]}'})
        config = make_config(tmp_path, DATA__DATASET=f'aircraft_{level}')
        assert build_dataset(config, 'train').labels.tolist() == [1, 2, 0]
        val = build_dataset(config, 'val')
        assert (val.labels.tolist(), val.class_names) == ([2], sorted(names))
        (folder / f'images_{level}_trainval.txt').unlink()
        assert build_dataset(config, 'val').labels.tolist() == [0]
        write_text(folder, {f'images_{level}_trainval.txt': '0000001 Concorde'})
        with pytest.raises(UserError, match=f'images_{level}_test.txt:1: .*no image of .{names[1]}'):
            build_dataset(config, 'val')


def test_categories_that_training_lacks(layout, tmp_path):
    """Categories 1 and 4 have no class. One that only validation has is a fault."""
    config = layout('inat')
    write_text(tmp_path, {'val2018.json': {'images': [{'file_name': 'train_val2018/Aves/4/x.jpg'}]}})
    with pytest.raises(UserError, match=r'val2018.json., images\[0\]: no annotation of .*train2018.json'):
        build_dataset(config, 'val')


# ---------------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize(('case', 'split', 'name', 'published'), FILES)
def test_missing_file(layout, tmp_path, case, split, name, published):
    config = layout(case)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"'{re.escape(str(tmp_path / name))}' is missing; .*{re.escape(published)}"):
        build_dataset(config, split)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f'{re.escape(name)}.*directory'):
        build_dataset(config, split)


@pytest.mark.parametrize(
    ('case', 'name', 'content', 'message'),
    [
        (
            'pets',
            'annotations/trainval.txt',
            'Abyssinian_1 1 1 1\n\nBirman_2 8 1\n',
            r"trainval.txt:3: .*'Birman_2 8 1'",
        ),
        ('pets', 'annotations/trainval.txt', 'Abyssinian_1 0 1 1\n', 'trainval.txt:1: .*from 1 to 37'),
        ('pets', 'annotations/trainval.txt', 'Abyssinian_1 38 1 1\n', 'trainval.txt:1: .*from 1 to 37'),
        ('pets', 'annotations/trainval.txt', 'Abyssinian_1 x 1 1\n', 'trainval.txt:1: '),
        ('pets', 'annotations/trainval.txt', '\n', 'trainval.txt. holds no image'),
        ('aircraft', FILES[4][2], '1025794 707-320\n1340192 \n', 'trainval.txt:2: expected'),
        ('inat', 'train2018.json', '{"images": [\n1,\n', r'train2018.json:3: damaged'),
        ('inat', 'train2018.json', '\udcff', 'train2018.json. is damaged'),
        ('inat', 'train2018.json', '[' * 100000, 'train2018.json. is damaged'),
        ('inat', 'train2018.json', '9' * 9999, 'train2018.json. is damaged'),
        ('inat', 'train2018.json', '[]', 'train2018.json. has no list of annotations'),
        ('inat', 'train2018.json', '{"annotations": [{}]}', r'train2018.json., annotations\[0\] has no category_id'),
        ('inat', 'train2018.json', '{"annotations": [{"category_id": 5}]}', r'annotations\[0\]: .*no category 5'),
        ('inat', 'train2018.json', '{"annotations": [{"category_id": -1}]}', r'annotations\[0\]: .*no category -1'),
        ('inat', 'train2018.json', '{"annotations": [], "images": [{}]}', r'images\[0\] has no file_name'),
        (
            'inat',
            'train2018.json',
            '{"annotations": [], "images": [{"file_name": "a/2.jpg"}]}',
            r'images\[0\]: .*a/2.jpg',
        ),
        (
            'inat',
            'train2018.json',
            '{"annotations": [], "images": [{"file_name": "a/b/9/c"}]}',
            r'images\[0\]: .*a/b/9/c',
        ),
        ('inat', 'train2018.json', '{"annotations": [], "images": []}', 'train2018.json. holds no image'),
        ('inat', 'categories.json', '{}', 'categories.json. has no list of entries'),
        ('inat', 'categories.json', '[{"id": 0}]', r'categories.json., entries\[0\] has no name'),
        ('flowers', 'setid.mat', '', 'setid.mat. cannot be read'),
        ('cars', 'cars_annos.mat', '<html>404 Not Found</html>' * 9, 'cars_annos.mat. cannot be read'),
    ],
)
def test_bad_text(layout, tmp_path, case, name, content, message):
    config = layout(case)
    (tmp_path / name).write_bytes(content.encode(errors='surrogateescape'))
    with pytest.raises(UserError, match=message):
        build_dataset(config, 'train')


def car(**fields) -> dict:
    return {'relative_im_path': 'car_ims/000001.jpg', 'class': 1, 'test': 0, **fields}


@pytest.mark.parametrize(
    ('name', 'write', 'message'),
    [
        (
            'flowers102',
            lambda root: write_flowers(root, [1, 103], [1], [2], [1]),
            'labels: number 2 is 103, not .* 102',
        ),
        ('flowers102', lambda root: write_flowers(root, [1, 0], [1], [2], [1]), 'labels: number 2 is 0'),
        (
            'flowers102',
            lambda root: write_flowers(root, [1, 2], [1], [3], [1]),
            'setid.mat., valid: number 1 is 3, .*to 2',
        ),
        ('flowers102', lambda root: write_flowers(root, [1, 2], [0], [1], [1]), 'setid.mat., trnid: number 1 is 0'),
        ('flowers102', lambda root: savemat(root / 'imagelabels.mat', {'label': 1}), "no variable 'labels'"),
        ('flowers102', lambda root: savemat(root / 'imagelabels.mat', {'labels': 1.5}), 'labels: number 1 is 1.5'),
        ('flowers102', lambda root: savemat(root / 'imagelabels.mat', {'labels': float('nan')}), 'number 1 is nan'),
        ('flowers102', lambda root: savemat(root / 'imagelabels.mat', {'labels': 'text'}), "number 1 is 'text'"),
        ('cars', lambda root: write_cars(root, [car(), car(**{'class': 197})]), 'class: number 2 is 197, .* 1 to 196'),
        ('cars', lambda root: write_cars(root, [car(test=2)]), 'test: number 1 is 2'),
        ('cars', lambda root: write_cars(root, [car(**{'class': [1, 2]})]), 'class: number 1 is '),
        ('cars', lambda root: write_cars(root, [car(test=1)]), 'cars_annos.mat. holds no image'),
        ('cars', lambda root: savemat(root / 'cars_annos.mat', {'annotations': 1}), "have no 'class'"),
        ('cars', lambda root: savemat(root / 'cars_annos.mat', {'other': 1}), "no variable 'annotations'"),
    ],
)
def test_bad_mat(tmp_path, make_config, name, write, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        build_dataset(make_config(tmp_path, DATA__DATASET=name), 'train')


@pytest.mark.parametrize('case', ['flowers', 'cars'])
def test_damaged_mat(layout, tmp_path, case):
    """Cut off or overwritten anywhere: the file is named, or what was read is sound."""
    config = layout(case)
    path = tmp_path / ('setid.mat' if case == 'flowers' else 'cars_annos.mat')
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = []
    for place in rng.integers(0, len(content), 8):
        overwritten = content[:place] + bytes(rng.integers(0, 256, 4, dtype=np.uint8)) + content[place + 4 :]
        for damaged in (content[:place], overwritten):
            path.write_bytes(damaged)
            try:
                dataset = build_dataset(config, 'train')
                assert dataset.labels.max() < dataset.num_classes
            except UserError as error:
                refused.append(str(error))
                assert path.name in refused[-1]
    assert len(refused) > 8


def crash(path):
    os.kill(os.getpid(), signal.SIGSEGV)


def test_crash(layout, monkeypatch, capfd):
    """SciPy crashes on some damaged files; the run does not."""
    config = layout('flowers')
    monkeypatch.setattr(transfer, '_load_mat', crash)
    with pytest.raises(
        UserError,
        match=r'imagelabels.mat. is damaged: SciPy crashes on it, or does not read it in 15 seconds; .*/flowers/102/',
    ):
        build_dataset(config, 'train')
    assert capfd.readouterr().err == ''


def test_scipy_missing(layout, monkeypatch):
    config = layout('flowers')
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    with pytest.raises(UserError, match=r'imagelabels.mat. needs SciPy: pip install scipy'):
        build_dataset(config, 'train')


# ---------------------------------------------------------------------------------------------------- around it
@pytest.fixture
def pets(tmp_path, write_image):
    """Six images of pets, all different."""
    folder = tmp_path / 'pets'
    lists = {'trainval.txt': ['Abyssinian_1 1 1 1', 'pug_1 37 2 25'], 'test.txt': ['pug_2 37 2 25']}
    write_text(folder / 'annotations', {name: '\n'.join(lines) for name, lines in lists.items()})
    for number, name in enumerate(['Abyssinian_1', 'pug_1', 'pug_2']):
        write_image(folder / 'images' / f'{name}.jpg', number)
    return folder


@pytest.mark.parametrize('tool', [make_lmdb, make_zip])
def test_packing(pets, tmp_path, make_config, tool):
    tool.main(['-data_path', str(pets), '-output', str(tmp_path / 'packed'), '-dataset', 'pets'])
    packed = make_config(tmp_path / 'packed', DATA__DATASET='lmdb' if tool is make_lmdb else 'zip')
    for split in ('train', 'val'):
        plain, other = build_dataset(make_config(pets, DATA__DATASET='pets'), split), build_dataset(packed, split)
        assert plain.labels.tolist() == other.labels.tolist()
        for index in range(len(plain)):
            assert plain.storage.read(index) == other.storage.read(index)


@pytest.mark.parametrize('tool', [make_lmdb, make_zip])
def test_packing_needs_files(tmp_path, tool):
    write_cifar(tmp_path, 'cifar-10-batches-py')
    with pytest.raises(UserError, match='cifar10 does not consist of image files'):
        tool.main(['-data_path', str(tmp_path), '-dataset', 'cifar10'])
    assert os.listdir(tmp_path) == ['cifar-10-batches-py']


def test_verifying(pets, tmp_path):
    flags = ['-dataset', 'pets', '-data_path', str(pets), '-report', str(tmp_path / 'report.json'), '-num_workers', '0']
    assert verify_data.main(flags) == 0
    (pets / 'images' / 'pug_2.jpg').unlink()
    assert verify_data.main(flags) == 1
    assert 'pug_2.jpg' in (tmp_path / 'report.json').read_text()


@pytest.mark.parametrize('name', list_models('*_mae_transfer_*'))
def test_recipes(name):
    """One for each data set, which they name with its classes; all else is that of CIFAR-100."""
    classes = {
        'cifar10': 10, 'cifar100': 100, 'flowers102': 102, 'pets': 37, 'aircraft': 100, 'cars': 196,
        'inaturalist2018': 8142,
    }  # fmt: skip
    assert {model.rpartition('_')[2] for model in list_models('*_mae_transfer_*')} == set(classes)
    config, published = (
        get_config(config_file(name)),
        get_config(config_file('vit_tiny_patch16_224_mae_transfer_cifar100')),
    )
    assert name.endswith(f'_mae_transfer_{config.DATA.DATASET}')
    assert config.DATA.DATASET in list_datasets()
    assert classes[config.DATA.DATASET] == config.MODEL.NUM_CLASSES
    config.defrost()
    config.BASE = published.BASE
    config.DATA.DATASET, config.DATA.DATA_PATH = published.DATA.DATASET, published.DATA.DATA_PATH
    config.MODEL.NAME, config.MODEL.NUM_CLASSES = published.MODEL.NAME, published.MODEL.NUM_CLASSES
    assert config == published
