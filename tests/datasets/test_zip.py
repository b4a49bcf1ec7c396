# SPDX-License-Identifier: Apache-2.0
"""Zip files: MS-MLP's own, batches that equal those of the plain files, and damaged ones."""

from __future__ import annotations

import os
import shutil
import zipfile

import numpy as np
import pytest

from datasets import build_dataloader, build_dataset, resolve_num_classes
from tests.conftest import HERE, golden
from tools import make_zip
from utils.errors import UserError

UPSTREAM = os.path.join(HERE, 'goldens', 'ms_mlp-zip')


# ---------------------------------------------------------------------------------------------------- the format
@pytest.mark.parametrize('split', ['train', 'val'])
def test_upstream_files(make_config, split):
    """Order, labels and pixels of a pair of files that MS-MLP reads; gray, alpha, deep paths, blanks, capitals."""
    reference = golden('ms_mlp-zip')
    config = make_config(UPSTREAM, DATA__DATASET='zip', DATA__IMAGE_SIZE=40)
    dataset = build_dataset(config, split)
    assert dataset.labels.tolist() == reference[f'out/{split}_labels'].tolist()
    (batch,) = build_dataloader(make_eval(config), dataset, training=False).epoch(0)
    for index, name in enumerate(reference.meta['items'][split]):
        assert dataset.describe(index) == f'{UPSTREAM}/{split}.zip@/{name}'
        pixels = np.asarray(dataset.load(index), 'int64')
        assert np.abs(pixels - reference[f'out/{split}_{index}_rgb']).max() <= 2  # JPEG decoders may differ by that
        expected = reference[f'out/{split}_{index}_eval_bicubic_crop']
        mean, std = (np.array(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        np.testing.assert_allclose((batch.images[index].transpose(2, 0, 1) / 255 - mean) / std, expected, atol=0.06)


def make_eval(config):
    config = config.clone()
    config.defrost()
    config.DATA.BATCH_SIZE_EVAL = 8
    return config


@pytest.fixture
def zip_data(tmp_path, make_config):
    """`zip_data(map text, {member: bytes}, compression, **keys)` builds the training part of such files."""

    def make(text: str, members: dict, compression: int = zipfile.ZIP_STORED, **keys):
        with zipfile.ZipFile(tmp_path / 'train.zip', 'w', compression) as file:
            for name, content in members.items():
                file.writestr(name, content)
        (tmp_path / 'train_map.txt').write_bytes(text.encode())
        return build_dataset(make_config(tmp_path, DATA__DATASET='zip', **keys), 'train')

    return make


def test_map_lines(zip_data):
    """One TAB parts name and label; further fields, blanks about the label, blank lines and CRLF are no harm."""
    text = 'a b/c  d.png\t 3 \textra\tfields\r\n\r\n   \n/x.JPEG\t0\nümläut.png\t2'
    dataset = zip_data(text, {'x.JPEG': b'1', 'a b/c  d.png': b'22', 'ümläut.png': b'', 'not listed': b'4'})
    assert dataset.labels.tolist() == [3, 0, 2]
    assert [dataset.storage.read(index) for index in range(3)] == [b'22', b'1', b'']
    assert dataset.num_classes == 4


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('x.png 1', "expected 'name<TAB>label' with a label of 0 or more, not 'x.png 1'"),
        ('x.png\t', 'expected'),
        ('x.png\tcat', 'expected'),
        ('x.png\t-1', 'expected'),
        ('x.png\t1.0', 'expected'),
        ('gone.png\t1', "'gone.png' is not in '.*train.zip'"),
        ('x.txt\t1', "'x.txt' is not an image by its name"),
        ('x.png\t7', 'label 7 is out of range, MODEL.NUM_CLASSES is 7'),
    ],
)
def test_bad_map_lines(zip_data, line, message):
    with pytest.raises(UserError, match=rf'train_map\.txt:3: {message}'):
        zip_data(f'x.png\t0\n\n{line}\n', {'x.png': b'1', 'x.txt': b'2'}, MODEL__NUM_CLASSES=7)


def test_missing_files(zip_data, tmp_path, make_config):
    zip_data('x.png\t0\n', {'x.png': b'1'})
    config = make_config(tmp_path, DATA__DATASET='zip')
    with pytest.raises(UserError, match=r"val\.zip' does not exist; .*make_zip"):
        build_dataset(config, 'val')
    (tmp_path / 'train_map.txt').unlink()
    with pytest.raises(UserError, match=r"train_map\.txt' is missing; .*make_zip"):
        build_dataset(config, 'train')


def test_compressed_members(zip_data):
    files = {'x.png': b'pixels' * 1000, 'empty.png': b''}
    dataset = zip_data('x.png\t0\nempty.png\t0\n', files, zipfile.ZIP_DEFLATED)
    assert dataset.storage.read(0) == files['x.png']
    assert dataset.storage.read(1) == b''
    dataset = zip_data('x.png\t0\n', files, zipfile.ZIP_BZIP2)
    with pytest.raises(UserError, match=r'train\.zip@/x\.png.*another method than deflate'):
        dataset.load(0)


# ---------------------------------------------------------------------------------------------------- damage
def packed(list_data, count: int = 6):
    """A folder of the same pictures as list files name, in zip files."""
    path = list_data(count)
    make_zip.main(['-data_path', str(path), '-output', str(path / 'zip'), '-dataset', 'list'])
    return path


@pytest.mark.parametrize('kept', [0, 100, 5000, -1, -100])
def test_cut_off_archive(list_data, make_config, kept):
    path = packed(list_data) / 'zip' / 'train.zip'
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    with pytest.raises(UserError, match=r"train\.zip' is (damaged or no zip file|cut off)"):
        build_dataset(make_config(path.parent, DATA__DATASET='zip'), 'train')


def test_directory_that_points_outside(list_data, make_config):
    """The middle is lost, the directory at the end is there."""
    path = packed(list_data) / 'zip' / 'train.zip'
    data = path.read_bytes()
    directory = data.index(b'PK\1\2')
    path.write_bytes(data[: directory // 2] + data[directory:])
    with pytest.raises(UserError, match=r"train\.zip' is (damaged or no zip file|cut off)"):
        build_dataset(make_config(path.parent, DATA__DATASET='zip'), 'train')


@pytest.mark.parametrize('damage', ['header', 'content'])
def test_damaged_member(list_data, make_config, damage):
    """Reported by its name, or skipped, like any unreadable image."""
    path = packed(list_data) / 'zip' / 'val.zip'
    with zipfile.ZipFile(path) as file:
        place = file.infolist()[2].header_offset + (1 if damage == 'header' else 200)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    config = make_config(path.parent, DATA__DATASET='zip', DATA__BAD_IMAGE='skip')
    dataset = build_dataset(config, 'val')
    with pytest.raises(UserError, match=r'val\.zip@/images/picture 2\.png.*the archive is damaged here'):
        dataset.load(2)
    indices = [batch.indices.tolist() for batch in build_dataloader(config, dataset, training=False).epoch(0)]
    assert indices == [[0, 1, 3], [4, 5]]


@pytest.mark.parametrize('seed', range(40))
def test_altered_archives(list_data, make_config, seed):
    """Any bytes altered: an error of ours, or the pictures as they were."""
    path = packed(list_data, 3) / 'zip' / 'train.zip'
    expected = [build_dataset(make_config(path.parent.parent), 'train').storage.read(index) for index in range(3)]
    rng = np.random.default_rng(seed)
    data = bytearray(path.read_bytes())
    start = 0 if seed % 2 else data.index(b'PK\1\2')
    for place in rng.integers(start, len(data), 3):
        data[place] = rng.integers(256)
    path.write_bytes(data)
    try:
        dataset = build_dataset(make_config(path.parent, DATA__DATASET='zip'), 'train')
        for index in range(3):
            with dataset.naming(index):
                assert dataset.storage.read(index) == expected[index]
    except UserError as error:
        assert 'train' in str(error)


# ---------------------------------------------------------------------------------------------------- same batches
def batches_of(config, split: str, world_size: int) -> list:
    """(images, labels, indices) of each batch of two epochs, process by process."""
    found = []
    for rank in range(world_size):
        dataset = build_dataset(config, split)
        with build_dataloader(config, dataset, split == 'train', rank, world_size) as loader:
            found += [(b.images, b.targets['label'], b.indices) for epoch in (0, 1) for b in loader.epoch(epoch)]
    return found


@pytest.mark.parametrize('cache', ['no', 'part', 'full'])
def test_same_batches_as_the_files(list_data, make_config, cache):
    """Bit by bit, for both parts, one and two processes, with and without workers; the files then may even be gone."""
    path = packed(list_data, 21)
    for world_size in (1, 2):
        for split in ('train', 'val'):
            plain = 'no' if world_size == 1 or cache == 'full' or split == 'val' else cache
            expected = batches_of(make_config(path, DATA__CACHE=plain), split, world_size)
            for workers in (0, 2):
                keys = {'DATA__DATASET': 'zip', 'DATA__CACHE': cache, 'DATA__NUM_WORKERS': workers}
                found = batches_of(make_config(path / 'zip', **keys), split, world_size)
                assert len(found) == len(expected) > 5
                for one, other in zip(found, expected):
                    assert all(np.array_equal(a, b) for a, b in zip(one, other))


def test_archive_opened_before_workers_fork(list_data, make_config):
    """Many workers read through the one handle they inherit, while this process reads too."""
    path = packed(list_data, 60)
    config = make_config(path / 'zip', DATA__DATASET='zip', DATA__NUM_WORKERS=6, DATA__BATCH_SIZE=2)
    dataset = build_dataset(config, 'train')
    files = [dataset.storage.read(index) for index in range(60)]
    with build_dataloader(config, dataset, training=True) as loader:
        for number, batch in enumerate(loader.epoch(0)):
            assert dataset.storage.read(number) == files[number]
            assert len(batch.indices) == 2


def test_number_of_classes(make_config):
    """A map does not name its classes: more may be meant than occur."""
    dataset = build_dataset(make_config(UPSTREAM, DATA__DATASET='zip'), 'train')
    assert (dataset.num_classes, dataset.class_names) == (5, None)
    assert resolve_num_classes(make_config(UPSTREAM, MODEL__NUM_CLASSES=1000), dataset) == 1000


def test_files_are_closed(tmp_path, make_config):
    shutil.copytree(UPSTREAM, tmp_path / 'copy')
    before = os.listdir('/proc/self/fd')
    dataset = build_dataset(make_config(tmp_path / 'copy', DATA__DATASET='zip'), 'train')
    assert len(os.listdir('/proc/self/fd')) == len(before) + 1
    del dataset
    assert os.listdir('/proc/self/fd') == before
