# SPDX-License-Identifier: Apache-2.0
"""Reading lists, folders, CIFAR and the digits; class counts; images in every condition."""

import io
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from config import get_config
from datasets import (
    Dataset,
    FileStorage,
    build_dataset,
    describe_empty,
    list_datasets,
    register_dataset,
    resolve_num_classes,
)
from datasets.dataset import PackedStrings
from datasets.digits import digits_folder
from datasets.folder import read_listing
from datasets.images import UnreadableImage, decode_image
from datasets.registry import DATASETS
from tests.conftest import ROOT
from utils.errors import UserError


# ---------------------------------------------------------------------------------------------------- lists
def test_list(tmp_path, write_image, make_config):
    """Blanks in paths, tabs, CRLF, blank lines, a byte order mark and no final newline."""
    for number, name in enumerate(['a b.png', 'c.png', 'ü.png']):
        write_image(tmp_path / 'x y' / name, number)
    text = '\ufeffx y/a b.png 2\r\n\r\n  \nx y/c.png\t0\nx y/ü.png   1'
    (tmp_path / 'val_list.txt').write_bytes(text.encode())
    dataset = build_dataset(make_config(tmp_path), 'val')
    assert len(dataset) == 3
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [2, 0, 1]
    assert (dataset.num_classes, dataset.class_names) == (3, None)
    assert dataset.describe(0) == str(tmp_path / 'x y' / 'a b.png')
    assert dataset.load(2).size == (24, 20)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('a.png 0\na.png\n', r'val_list\.txt:2: .*expected'),
        ('a.png 0\n\na.png x\n', r'val_list\.txt:3: '),
        ('a.png -1\n', r'val_list\.txt:1: '),
        ('a.png 1.0\n', r'val_list\.txt:1: '),
        ('a.png 0\n0\n', r'val_list\.txt:2: .*expected'),
        ('a.png,0\n', r'val_list\.txt:1: .*expected'),
        ('# a comment\na.png 0\n', r'val_list\.txt:1: .*expected'),
        (
            '# version 2\na.png 0\n',
            r"val_list\.txt:1: there is no file '# version'; remove the line if it is a comment",
        ),
        ('a.png 0\n\na\0.png 0\n', r'val_list\.txt:3: a zero byte'),
        ('a.png 0\n'.encode('utf-16'), r'val_list\.txt:1: a zero byte in the line.*UTF-8'),
        (f'a.png {2**64}\n', r'val_list\.txt:1: label 18446744073709551616 is out of range'),
        (f'a.png {"9" * 5000}\n', r'val_list\.txt:1: label 9{200} is out of range'),
        ('a.png 0\na.png 7\n', r'val_list\.txt:2: label 7 is out of range, MODEL\.NUM_CLASSES is 7'),
        ('\n \n', 'val_list.txt.* holds no image'),
        ('b/gone.png 0\n', r'b/gone\.png.*does not exist'),
    ],
)
def test_bad_list(tmp_path, write_image, make_config, text, message):
    write_image(tmp_path / 'a.png')
    (tmp_path / 'val_list.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        build_dataset(make_config(tmp_path, MODEL__NUM_CLASSES=7), 'val')


def test_labels_of_many_digits(tmp_path, write_image, make_config):
    write_image(tmp_path / 'a.png')
    (tmp_path / 'val_list.txt').write_text('a.png 00000000000003\n')
    assert build_dataset(make_config(tmp_path), 'val').labels.tolist() == [3]
    (tmp_path / 'val_list.txt').write_text('a.png 0\na.png 9999999999\n')
    with pytest.raises(UserError, match=r'val_list\.txt:2: label 9999999999 is too large'):
        build_dataset(make_config(tmp_path), 'val')


def test_contradictory_lines(tmp_path, write_image, make_config):
    """The same image with the same label is drawn more often; with another one it is said which lines are meant."""
    write_image(tmp_path / 'a.png')
    (tmp_path / 'val_list.txt').write_text('a.png 1\n\na.png 1\na.png 0\na.png 2\n')
    dataset = build_dataset(make_config(tmp_path), 'val')
    assert dataset.labels.tolist() == [1, 1, 0, 2]
    assert dataset.notes == [
        f"{tmp_path}/val_list.txt:4: 'a.png' has label 0, but 1 in line 1; 2 lines in total contradict an earlier one."
    ]
    (tmp_path / 'val_list.txt').write_text('a.png 0\na.png 0\n')
    assert build_dataset(make_config(tmp_path), 'val').notes == []


def test_names_that_no_file_has(tmp_path, write_image):
    """What lists of another kind than text may hold."""
    write_image(tmp_path / 'a.png')
    dataset = Dataset(FileStorage(str(tmp_path), ['a.png', 'a\0.png']), [0, 1], 'list')
    with pytest.raises(UserError, match='number 1 of list.*null byte'):
        dataset.load(1)
    with pytest.raises(UserError, match=r"'\\ud800\.png' cannot be the name of a file"):
        FileStorage(str(tmp_path), ['\ud800.png'])


def test_missing_list(tmp_path, make_config):
    for name in ('list', 'imagenet2012'):
        with pytest.raises(UserError, match=r'train_list\.txt.*missing.*tools/make_lists\.py'):
            build_dataset(make_config(tmp_path, DATA__DATASET=name), 'train')


def test_missing_data_folder(tmp_path, make_config):
    for name in ('list', 'imagenet2012', 'folder', 'cifar10'):
        with pytest.raises(UserError, match='data_path'):
            build_dataset(make_config(tmp_path / 'gone', DATA__DATASET=name), 'train')


def test_unknown_dataset(make_config, tmp_path):
    with pytest.raises(UserError, match="unknown data set 'imagnet2012'.*Did you mean 'imagenet2012'"):
        build_dataset(make_config(tmp_path, DATA__DATASET='imagnet2012'), 'train')


def test_evaluation_needs_no_training_part(list_data, make_config):
    path = list_data(3)
    (path / 'train_list.txt').unlink()
    assert len(build_dataset(make_config(path, DATA__DATASET='imagenet2012'), 'val')) == 3


# ---------------------------------------------------------------------------------------------------- folders
@pytest.fixture
def folder_data(tmp_path, write_image):
    for name in (
        'train/b/2.JPG',
        'train/b/1.png',
        'train/b/deep/0.png',
        'train/a/x.webp',
        'train/c/y.png',
        'val/c/v.png',
    ):
        write_image(tmp_path / name)
    (tmp_path / 'train' / 'a' / 'notes.txt').write_text('no image')
    (tmp_path / 'train' / 'a' / '.hidden.png').write_text('no image')
    (tmp_path / 'train' / '.cache').mkdir()
    return tmp_path


@pytest.mark.parametrize('name', ['folder', 'imagenet2012'])
def test_folder(folder_data, make_config, name):
    """ImageFolder's order and numbering; a validation part with fewer classes keeps the numbers of training."""
    config = make_config(folder_data, DATA__DATASET=name)
    train, val = build_dataset(config, 'train'), build_dataset(config, 'val')
    names = [os.path.relpath(train.describe(i), folder_data / 'train') for i in range(len(train))]
    assert names == ['a/x.webp', 'b/1.png', 'b/2.JPG', 'b/deep/0.png', 'c/y.png']
    assert train.labels.tolist() == [0, 1, 1, 1, 2]
    assert train.class_names == val.class_names == ['a', 'b', 'c']
    assert val.labels.tolist() == [2]


def test_folder_evaluation_alone(folder_data, make_config):
    shutil.rmtree(folder_data / 'train')
    val = build_dataset(make_config(folder_data, DATA__DATASET='folder'), 'val')
    assert (val.labels.tolist(), val.class_names) == ([0], ['c'])


def test_bad_folders(folder_data, make_config, write_image):
    config = make_config(folder_data, DATA__DATASET='folder')
    write_image(folder_data / 'val' / 'other' / '0.png')
    with pytest.raises(UserError, match='val/other.*no counterpart'):
        build_dataset(config, 'val')
    (folder_data / 'train' / 'empty').mkdir()
    with pytest.raises(UserError, match=r'train/empty.*holds no image \(\.jpg'):
        build_dataset(config, 'train')
    shutil.rmtree(folder_data / 'val')
    with pytest.raises(UserError, match='cannot read the folder .*val'):
        build_dataset(config, 'val')
    (folder_data / 'val').mkdir()
    with pytest.raises(UserError, match='no class folders'):
        build_dataset(config, 'val')


# ---------------------------------------------------------------------------------------------------- CIFAR
def write_cifar(root, name: str, rows: int = 3):
    """The published layout, pickled as Python 2 did: bytes for text, arrays as strings."""
    rng = np.random.default_rng(0)
    folder = root / name
    folder.mkdir()
    if name == 'cifar-10-batches-py':
        files, label_key, meta = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch'], 'labels', 'batches.meta'
        content = {'label_names': [f'class {i}' for i in range(10)]}
    else:
        files, label_key, meta = ['train', 'test'], 'fine_labels', 'meta'
        content = {'fine_label_names': [f'class {i}' for i in range(100)], 'coarse_label_names': ['x'] * 20}
    (folder / meta).write_bytes(pickle.dumps(content, protocol=2))
    data = {}
    for file in files:
        data[file] = rng.integers(0, 256, (rows, 3072), dtype=np.uint8)
        batch = {'data': data[file], label_key: [1, 2, 9], 'coarse_labels': [0, 0, 0], 'batch_label': 'training batch'}
        (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    return folder, data


@pytest.mark.parametrize(
    ('name', 'folder', 'classes', 'size'),
    [('cifar10', 'cifar-10-batches-py', 10, 15), ('cifar100', 'cifar-100-python', 100, 3)],
)
def test_cifar(tmp_path, make_config, name, folder, classes, size):
    inner, data = write_cifar(tmp_path, folder)
    for path in (tmp_path, inner):
        config = make_config(path, DATA__DATASET=name)
        train, val = build_dataset(config, 'train'), build_dataset(config, 'val')
        assert (len(train), len(val)) == (size, 3)
        assert train.num_classes == len(train.class_names) == classes
        assert val.labels.tolist() == [1, 2, 9]
        pixels = np.asarray(val.load(1))
        expected = data['test_batch' if classes == 10 else 'test'][1].reshape(3, 32, 32)
        assert np.array_equal(pixels.transpose(2, 0, 1), expected)
    assert resolve_num_classes(config, train) == classes


def test_bad_cifar(tmp_path, make_config):
    config = make_config(tmp_path, DATA__DATASET='cifar10')
    with pytest.raises(UserError, match=r'batches\.meta.*missing.*cifar-10-python\.tar\.gz'):
        build_dataset(config, 'val')
    folder, _ = write_cifar(tmp_path, 'cifar-10-batches-py')
    content = (folder / 'test_batch').read_bytes()
    (folder / 'test_batch').write_bytes(content[:-100])
    with pytest.raises(UserError, match='test_batch.*damaged'):
        build_dataset(config, 'val')
    for labels, message in (
        (None, 'test_batch.*no list of labels'),
        ([0, 1, 1.5], 'not whole numbers'),
        ([0, 1, 10], r'outside 0 to 9: 10 of .*\[2\]'),
        ([0, -1, 1], r'outside 0 to 9: -1 of .*\[1\]'),
        ([0, 1, 2**70], 'not whole numbers'),
        ([0, 1], '3 images, but 2 labels'),
    ):
        batch = {'data': np.zeros((3, 3072), np.uint8), 'labels': labels}
        (folder / 'test_batch').write_bytes(pickle.dumps(batch, protocol=2))
        with pytest.raises(UserError, match=message):
            build_dataset(config, 'val')


def test_cifar_runs_no_code(tmp_path, make_config):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)

    folder, _ = write_cifar(tmp_path, 'cifar-10-batches-py')
    (folder / 'test_batch').write_bytes(pickle.dumps({'data': Payload(), 'labels': [0]}, protocol=2))
    with pytest.raises(UserError, match='test_batch.*damaged'):
        build_dataset(make_config(tmp_path, DATA__DATASET='cifar10'), 'val')
    assert not (tmp_path / 'executed').exists()


# ---------------------------------------------------------------------------------------------------- digits
def test_digits(tmp_path, monkeypatch, make_config):
    """Two processes write at the same time; the parts are disjoint, stratified and those of scikit-learn."""
    from sklearn.datasets import load_digits

    monkeypatch.setenv('LEANVIT_CACHE', str(tmp_path / 'cache'))
    context = multiprocessing.get_context('fork')
    racers = [context.Process(target=digits_folder) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert os.listdir(tmp_path / 'cache') == ['digits']
    config = make_config('/nowhere', DATA__DATASET='digits')
    train, val = build_dataset(config, 'train'), build_dataset(config, 'val')
    assert (len(train), len(val)) == (1442, 355)
    assert train.class_names == val.class_names == list('0123456789')
    assert (np.bincount(val.labels) > 33).all()
    names = {os.path.basename(part.describe(i)) for part in (train, val) for i in range(len(part))}
    assert len(names) == 1797
    original = load_digits()
    for index in range(0, len(val), 50):
        number = int(os.path.basename(val.describe(index))[:-4])
        assert val.labels[index] == original.target[number]
        np.testing.assert_allclose(np.asarray(val.load(index))[..., 0], original.images[number] * 255 / 16, atol=0.51)


def test_digits_cache_not_writable(tmp_path, monkeypatch, make_config):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('LEANVIT_CACHE', str(tmp_path / 'file' / 'cache'))
    with pytest.raises(UserError, match='LEANVIT_CACHE'):
        build_dataset(make_config('', DATA__DATASET='digits'), 'val')


# ---------------------------------------------------------------------------------------------------- class counts
def test_class_counts(list_data, folder_data, make_config):
    folder = build_dataset(make_config(folder_data, DATA__DATASET='folder'), 'train')
    lists = build_dataset(make_config(list_data(4)), 'train')
    for dataset in (folder, lists):
        assert resolve_num_classes(get_config(), dataset) == 3
        assert resolve_num_classes(get_config(None, ['MODEL.NUM_CLASSES', 3]), dataset) == 3
        with pytest.raises(UserError, match='MODEL.NUM_CLASSES is 2, but .* set it to 3'):
            resolve_num_classes(get_config(None, ['MODEL.NUM_CLASSES', 2]), dataset)
    assert resolve_num_classes(get_config(None, ['MODEL.NUM_CLASSES', 1000]), lists) == 1000
    with pytest.raises(UserError, match=r"label 2 \('.*picture 2\.png'\)"):
        resolve_num_classes(get_config(None, ['MODEL.NUM_CLASSES', 2]), lists)
    with pytest.raises(UserError, match='MODEL.NUM_CLASSES is 1000, but .* has 3 classes'):
        resolve_num_classes(get_config(None, ['MODEL.NUM_CLASSES', 1000]), folder)


@pytest.mark.parametrize('labels', [[0, 2022123, 1], [2022123, 2022123, 2022123], [1000, 0, 0]])
def test_a_label_far_too_large(tmp_path, list_data, make_config, labels):
    """Does not make millions of classes, unless they are asked for; 1000 may be empty."""
    path, largest = list_data(3), max(labels)
    lines = [f'images/picture {number}.png {label}\n' for number, label in enumerate(labels)]
    (path / 'train_list.txt').write_text('\n'.join(lines))
    dataset = build_dataset(make_config(path), 'train')
    line = 1 + 2 * labels.index(largest)
    with pytest.raises(
        UserError, match=rf'train_list\.txt:{line}: label {largest} makes {largest + 1} classes.*-num_classes'
    ):
        resolve_num_classes(make_config(path), dataset)
    assert resolve_num_classes(make_config(path, MODEL__NUM_CLASSES=largest + 1), dataset) == largest + 1
    (path / 'train_list.txt').write_text(''.join(lines).replace(str(largest), '999'))
    assert resolve_num_classes(make_config(path), build_dataset(make_config(path), 'train')) == 1000


def test_many_classes_are_plausible_where_most_have_images():
    storage = FileStorage('', map(str, range(1500)))
    assert resolve_num_classes(get_config(), Dataset(storage, np.arange(1500) * 2 - np.arange(1500) % 2, 'x')) == 2998
    with pytest.raises(UserError, match="'1499': label 4497 makes 4498 classes"):
        resolve_num_classes(get_config(), Dataset(storage, np.arange(1500) * 3, 'x'))


def test_empty_classes():
    def of(labels, num_classes, names=None):
        return describe_empty(Dataset(FileStorage('', map(str, labels)), labels, "'list'", names), num_classes)

    assert of([0, 1, 2], 3) == ''
    assert of([1, 2, 3], 4) == (
        "1 of 4 classes have no image in 'list': 0. Do labels start from 1? They must start from 0."
    )
    assert of([1, 2], 3, ['a', 'b', 'c']) == "1 of 3 classes have no image in 'list': 0."
    assert of([0, 2, 9], 12) == "9 of 12 classes have no image in 'list': 1, 3, 4, 5, 6, and so on."
    assert of([0, 10**9], 10**9 + 1).startswith('999999999 of')


@pytest.mark.parametrize(
    'labels', [[0.5, 1], ['a', 'b'], [0, 2**63], [0, 2**64], [[0], [1, 2]], [[0, 1], [1, 2]], [True, False], [None, 0]]
)
def test_labels_that_are_no_whole_numbers(labels):
    with pytest.raises(UserError, match='list has labels that are not whole numbers'):
        Dataset(FileStorage('', ['a', 'b']), labels, 'list')


def test_negative_labels():
    with pytest.raises(UserError, match="labels outside 0 to 1: -1 of 'b'"):
        Dataset(FileStorage('', ['a', 'b']), [1, -1], 'list')


def test_own_dataset(make_config, monkeypatch):
    """A data set of one's own is a registered function."""

    class Squares:
        def __len__(self):
            return 5

        def open(self, index):
            return Image.new('RGB', (8, 8), (index, 0, 0))

        def describe(self, index):
            return f'square {index}'

    monkeypatch.setattr(DATASETS, '_entries', dict(DATASETS._entries))
    monkeypatch.setattr(DATASETS, '_aliases', dict(DATASETS._aliases))

    @register_dataset('squares')
    def build_squares(config, split):
        return Dataset(Squares(), [0, 1, 0, 1, 0], source='squares', class_names=['even', 'odd'])

    dataset = build_dataset(make_config('', DATA__DATASET='Squares'), 'train')
    assert (len(dataset), dataset.num_classes) == (5, 2)
    assert dataset.load(3).getpixel((0, 0)) == (3, 0, 0)
    assert 'squares' in list_datasets()
    with pytest.raises(UserError, match='labels outside 0 to 1'):
        Dataset(Squares(), [0, 1, 2, 1, 0], source='squares', class_names=['even', 'odd'])
    with pytest.raises(UserError, match='5 images, but 1 labels'):
        Dataset(Squares(), [0], source='squares')


# ---------------------------------------------------------------------------------------------------- images
def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_modes_become_rgb():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    gray = Image.fromarray(ramp)
    for data in (encoded(gray, 'PNG'), encoded(Image.merge('LA', (gray, gray)), 'PNG')):
        assert np.array_equal(np.asarray(decode_image(data)), np.stack([ramp] * 3, -1))
    color = Image.merge('RGB', (gray, gray.rotate(90), gray.rotate(180)))
    pixels = np.asarray(color)
    rgba = color.copy()
    rgba.putalpha(gray)
    assert np.array_equal(np.asarray(decode_image(encoded(rgba, 'PNG'))), pixels)
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    for kind in ('PNG', 'TIFF'):
        assert np.array_equal(np.asarray(decode_image(encoded(deep, kind)))[..., 0], ramp)
    palette = gray.convert('P')
    assert np.array_equal(np.asarray(decode_image(encoded(palette, 'PNG', transparency=b'\0\1\2')))[..., 1], ramp)
    assert decode_image(encoded(gray.convert('1'), 'PNG')).mode == 'RGB'
    cmyk = decode_image(encoded(Image.new('CMYK', (8, 8), (0, 255, 255, 0)), 'JPEG', quality=95))
    assert cmyk.mode == 'RGB'
    red, green, blue = cmyk.getpixel((4, 4))
    assert red > 240
    assert max(green, blue) < 15


JPEG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), 'JPEG')
BAD = {
    'empty': (b'', 'empty'),
    'text': (b'not an image at all', 'not an image'),
    'truncated': (JPEG[: len(JPEG) // 2], 'truncated'),
    'header only': (JPEG[:20], '.'),
    'png damaged': (encoded(Image.new('RGB', (50, 50)), 'PNG')[:60] + b'garbage', '.'),
    'float': (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), 'TIFF'), 'floating'),
    'bomb': (encoded(Image.new('1', (20000, 20000)), 'PNG'), 'exceeds limit'),
}


@pytest.mark.parametrize('kind', BAD)
def test_unreadable(tmp_path, make_config, kind):
    """Each error names path, number and reason."""
    data, reason = BAD[kind]
    with pytest.raises(UnreadableImage, match=reason):
        decode_image(data)
    (tmp_path / 'bad.jpg').write_bytes(data)
    (tmp_path / 'val_list.txt').write_text('bad.jpg 0\n')
    dataset = build_dataset(make_config(tmp_path), 'val')
    with pytest.raises(UserError, match=f'bad.jpg.*number 0 of .*val_list.txt.*{reason}'):
        dataset.load(0)


def test_missing_image(list_data, make_config):
    path = list_data(3)
    (path / 'images' / 'picture 1.png').unlink()
    with pytest.raises(UserError, match=r'picture 1\.png.*number 1.*No such file'):
        build_dataset(make_config(path), 'val').load(1)


# ---------------------------------------------------------------------------------------------------- process hygiene
def test_packed_strings():
    strings = ['', 'a', 'b' * 300, 'ü', os.fsdecode(b'\xff.png'), '']
    packed = PackedStrings(iter(strings))
    assert len(packed) == len(strings) and list(packed) == [packed[i] for i in range(len(packed))] == strings
    assert list(PackedStrings([])) == []


def test_packed_strings_by_their_first_character():
    assert PackedStrings(['#a', '', 'a#', '#', '']).starting_with('#') == [0, 3]
    assert PackedStrings(['', 'a']).starting_with('#') == PackedStrings([]).starting_with('#') == []


def test_long_lists_need_little_memory(tmp_path):
    """Bytes per line while the list is read: the name, and four numbers with the spare space of growing arrays."""
    path, lines = tmp_path / 'train_list.txt', 20000
    path.write_text(''.join(f'train/n{i % 9:08d}/n{i % 9:08d}_{i:08d}.JPEG {i % 9}\n' for i in range(lines)))
    length = len('train/n00000000/n00000000_00000000.JPEG')
    tracemalloc.start()
    listing = read_listing(str(path), str.split, 'form', 'hint', 9)
    assert not listing.dataset(FileStorage('', listing.names)).notes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / lines < 1.5 * (length + 4 * 8)


def test_paddle_is_not_imported():
    """Worker processes run everything that this imports."""
    code = (
        'import sys, datasets, datasets.workers, datasets.transforms, datasets.erasing;'
        "sys.exit(not {'paddle', 'sklearn', 'scipy'}.isdisjoint(sys.modules))"
    )
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)
