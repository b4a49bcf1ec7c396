# SPDX-License-Identifier: Apache-2.0
"""Label maps in zip and LMDB files: the same images, maps, order and classes as in the folders, and what is damaged."""

import os
import zipfile

import lmdb
import numpy as np
import pytest
from PIL import Image

from config import get_config
from datasets import build_dataset
from datasets.cache import cache_images
from datasets.classes import default_palette
from datasets.dataset import BadImageError
from datasets.known_classes import known_classes
from datasets.loader import build_dataloader
from datasets.segmentation import LABELS
from datasets.zip import MAPS
from tasks import build_task
from tools import make_lmdb, make_zip, verify_data
from utils.errors import UserError

TOOLS = {'zip': make_zip, 'lmdb': make_lmdb}
KINDS = pytest.mark.parametrize('kind', TOOLS)
LAYOUTS = ('ade20k', 'voc2012', 'cityscapes', 'segmentation')
SHAPE = (20, 24)


def save(path, array, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette(default_palette(256).tobytes())
    image.save(path)


def write_layout(root, name, count=3):
    """Images and maps of both parts as their publishers store them: gray, with palette, of 16 bits."""
    rng = np.random.default_rng(0)
    stored, kinds = {
        'ade20k': ((0, 1, 150), ['uint8']),
        'voc2012': ((0, 20, 255), ['palette']),
        'cityscapes': ((0, 7, 33, 9), ['uint8']),
        'segmentation': ((0, 1, 2, 255), ['uint8', 'palette', 'uint16']),
    }[name]
    for split in ('train', 'val'):
        part = {'train': 'training', 'val': 'validation'}[split]
        places = {
            'ade20k': (f'images/{part}/ADE_{split}_%d.jpg', f'annotations/{part}/ADE_{split}_%d.png'),
            'voc2012': (f'JPEGImages/{split}_%d.jpg', f'SegmentationClass/{split}_%d.png'),
            'cityscapes': (f'leftImg8bit/{split}/b/%d_leftImg8bit.png', f'gtFine/{split}/b/%d_gtFine_labelIds.png'),
            'segmentation': (f'images/{split}/f/%d.png', f'annotations/{split}/f/%d.png'),
        }[name]
        for number in range(count):
            image, labels = (root / (place % number) for place in places)
            save(image, rng.integers(0, 256, (*SHAPE, 3)).astype('uint8'))
            kind = kinds[number % len(kinds)]
            values = rng.choice(stored, SHAPE).astype('uint16' if kind == 'uint16' else 'uint8')
            save(labels, values, palette=kind == 'palette')
    if name == 'voc2012':
        for split in ('train', 'val'):
            path = root / 'ImageSets' / 'Segmentation' / f'{split}.txt'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(''.join(f'{split}_{number}\n' for number in reversed(range(count))))
    if name == 'segmentation':
        (root / 'classes.txt').write_text('ground\ncat\t#ff0080\ndog\n')


def config_of(root, name, **changes):
    options = {
        'DATA.DATASET': name, 'DATA.DATA_PATH': str(root), 'TRAIN.TASK': 'segmentation', 'MODEL.TYPE': 'segmenter',
        'DATA.IMAGE_SIZE': 16, 'DATA.IMAGE_SCALE': (64, 16), 'DATA.BATCH_SIZE': 2, 'DATA.NUM_WORKERS': 0,
        'TRAIN.RANDOM_ERASE_PROB': 0.0, **{key.replace('__', '.'): value for key, value in changes.items()},
    }  # fmt: skip
    config = get_config(opts=[item for pair in options.items() for item in pair])
    config.defrost()
    return config


def build(root, name, split='train', **changes):
    return build_dataset(config_of(root, name, **changes), split)


def pack(kind, root, name, output, *flags):
    TOOLS[kind].main(['-dataset', name, '-data_path', str(root), '-output', str(output), *flags])


@pytest.fixture
def packed(tmp_path):
    """`packed(kind)`: a folder of the generic layout, and one of its packed files."""

    def make(kind):
        write_layout(tmp_path / 'files', 'segmentation')
        pack(kind, tmp_path / 'files', 'segmentation', tmp_path / 'packed')
        return tmp_path / 'files', tmp_path / 'packed'

    return make


@KINDS
@pytest.mark.parametrize('name', LAYOUTS)
def test_packed_equals_files(tmp_path, name, kind, capsys):
    """Bytes, pixels, labels, order and classes, in both parts; the packed files need none of the folders."""
    write_layout(tmp_path / 'files', name)
    pack(kind, tmp_path / 'files', name, tmp_path / 'packed')
    assert f'train.{kind}: 3 images with label maps, ' in capsys.readouterr().out
    for split in ('train', 'val'):
        files, found = build(tmp_path / 'files', name, split), build(tmp_path / 'packed', kind, split)
        assert (len(found), found.class_names, found.ignored) == (3, files.class_names, files.ignored)
        np.testing.assert_array_equal(found.classes.palette, files.classes.palette)
        for index in range(3):
            for one, other in zip(found.storages, files.storages):
                assert one.read(index) == other.read(index)
            left, right = found.sample(index), files.sample(index)
            np.testing.assert_array_equal(np.asarray(left.image.convert('RGB')), np.asarray(right.image.convert('RGB')))
            np.testing.assert_array_equal(left.targets[LABELS].pixels, right.targets[LABELS].pixels)
    classes = known_classes(config_of(tmp_path / 'packed', kind))
    assert classes.names == files.class_names
    np.testing.assert_array_equal(classes.palette, files.classes.palette)


@KINDS
@pytest.mark.parametrize('workers', [0, 2])
def test_same_batches(packed, kind, workers):
    """What the task trains on and evaluates, read here and in workers."""
    batches = []
    for root, name in zip(packed(kind), ('segmentation', kind)):
        config = config_of(root, name, DATA__NUM_WORKERS=workers)
        task = build_task(config)
        for split, training in (('train', True), ('val', False)):
            loader = build_dataloader(config, task.dataset(split), training, transform=task.transform(training))
            with loader:
                batches.append([(batch.images, batch.targets[LABELS]) for batch in loader.epoch(0)])
    for split in (0, 1):
        assert len(batches[split]) == len(batches[split + 2]) > 0
        for one, other in zip(batches[split], batches[split + 2]):
            for left, right in zip((*one[0], *one[1]), (*other[0], *other[1])):
                np.testing.assert_array_equal(left, right)


@KINDS
def test_settings_apply_to_packed_maps(tmp_path, kind):
    """Maps are packed whatever their values mean: DATA.REDUCE_ZERO_LABEL and DATA.IGNORE_INDEX say it when they are read."""
    write_layout(tmp_path / 'files', 'segmentation')
    (tmp_path / 'files' / 'classes.txt').write_text('cat\ndog\n')
    pack(kind, tmp_path / 'files', 'segmentation', tmp_path / 'packed')
    labels = build(tmp_path / 'packed', kind, DATA__REDUCE_ZERO_LABEL=True).label_map(0).pixels
    expected = build(tmp_path / 'files', 'segmentation', DATA__REDUCE_ZERO_LABEL=True).label_map(0).pixels
    np.testing.assert_array_equal(labels, expected)
    with pytest.raises(UserError, match='has the value 2, which is none of the 2 classes'):
        build_task(config_of(tmp_path / 'packed', kind)).dataset('train')


@KINDS
def test_packed_maps_in_memory(packed, kind):
    dataset = build(packed(kind)[1], kind)
    kept = cache_images(dataset, np.arange(3), show_progress=False)
    for index in range(3):
        np.testing.assert_array_equal(kept.label_map(index).pixels, dataset.label_map(index).pixels)


@KINDS
def test_a_missing_map_is_not_packed(tmp_path, kind):
    write_layout(tmp_path / 'files', 'segmentation')
    os.remove(tmp_path / 'files' / 'annotations' / 'train' / 'f' / '1.png')
    with pytest.raises(UserError, match=r"cannot read '.*annotations/train/f/1.png': No such file"):
        pack(kind, tmp_path / 'files', 'segmentation', tmp_path / 'packed')
    assert not (tmp_path / 'packed' / f'train.{kind}').exists()


@KINDS
def test_damaged_maps_are_named(tmp_path, kind, capsys):
    """A map that is damaged before it is packed: named where it is used, and by `verify_data`."""
    write_layout(tmp_path / 'files', 'segmentation')
    (tmp_path / 'files' / 'annotations' / 'train' / 'f' / '1.png').write_bytes(b'no image')
    pack(kind, tmp_path / 'files', 'segmentation', tmp_path / 'packed')
    place = {'zip': 'train.zip@/annotations/train/f/1.png', 'lmdb': 'train.lmdb, key map/1'}[kind]
    with pytest.raises(
        BadImageError, match=f"cannot read the label map '.*{place}': not an image that Pillow knows as PNG"
    ):
        build(tmp_path / 'packed', kind).sample(1)
    flags = ['-dataset', kind, '-data_path', str(tmp_path / 'packed'), '-report', str(tmp_path / 'report.json')]
    assert verify_data.main([*flags, '-num_workers', '0']) == 1
    assert place in capsys.readouterr().out


def test_damaged_zip_files(packed, tmp_path):
    _, folder = packed('zip')
    listing, archive = folder / 'train_map.txt', folder / 'train.zip'
    lines = listing.read_text()
    assert lines.splitlines()[0] == 'images/train/f/0.png\tannotations/train/f/0.png'
    listing.write_text(lines + 'images/train/f/0.png\n')
    with pytest.raises(UserError, match=r"train_map.txt:4: expected 'image<TAB>label map', not 'images/train/f/0.png'"):
        build(folder, 'zip')
    listing.write_text(lines + 'images/train/f/0.png\tannotations/train/f/9.png\n')
    with pytest.raises(UserError, match=r"train_map.txt:4: 'annotations/train/f/9.png' is not in '.*train.zip'"):
        build(folder, 'zip')
    listing.write_text(lines)
    with zipfile.ZipFile(archive) as file:
        begin = file.getinfo('annotations/train/f/1.png').header_offset + 80
    content = bytearray(archive.read_bytes())
    content[begin] ^= 255
    archive.write_bytes(bytes(content))
    with pytest.raises(BadImageError, match='annotations/train/f/1.png.*the archive is damaged here'):
        build(folder, 'zip').label_map(1)
    with zipfile.ZipFile(archive, 'w') as file:
        file.writestr(MAPS, b'{"classes": []}')
    listing.write_text('')
    with pytest.raises(UserError, match='train.zip. is damaged: the description of its label maps'):
        build(folder, 'zip')


def test_damaged_lmdb_files(packed):
    _, folder = packed('lmdb')
    with lmdb.open(str(folder / 'train.lmdb'), subdir=False) as file, file.begin(write=True) as transaction:
        transaction.delete(b'map/1')
        transaction.put(b'map/2', b'\0' * 20)
    dataset = build(folder, 'lmdb')
    with pytest.raises(BadImageError, match="train.lmdb, key map/1': there is no record map/1"):
        dataset.label_map(1)
    with pytest.raises(BadImageError, match="train.lmdb, key map/2': record map/2: .* checksum"):
        dataset.label_map(2)
    with lmdb.open(str(folder / 'val.lmdb'), subdir=False) as file, file.begin(write=True) as transaction:
        transaction.put(b'__label_maps__', b'nothing')
    with pytest.raises(UserError, match='val.lmdb. is damaged: the description of its label maps'):
        build(folder, 'lmdb', 'val')


def test_an_interrupted_lmdb_file_continues(tmp_path, monkeypatch, capsys):
    """Maps of the images that are stored are stored too; a changed class starts the file again."""
    monkeypatch.setattr(make_lmdb, '_CHUNK', 1)
    write_layout(tmp_path / 'files', 'segmentation')
    original = make_lmdb.records_of

    def interrupted(dataset, index):
        if index == 2:
            raise KeyboardInterrupt
        return original(dataset, index)

    flags = ('-split', 'train')
    monkeypatch.setattr(make_lmdb, 'records_of', interrupted)
    pack('lmdb', tmp_path / 'files', 'segmentation', tmp_path / 'packed', *flags)
    monkeypatch.setattr(make_lmdb, 'records_of', original)
    pack('lmdb', tmp_path / 'files', 'segmentation', tmp_path / 'packed', *flags)
    assert 'continues after 2 images' in capsys.readouterr().out
    files, found = build(tmp_path / 'files', 'segmentation'), build(tmp_path / 'packed', 'lmdb')
    assert [found.maps.read(index) for index in range(3)] == [files.maps.read(index) for index in range(3)]


def test_the_wrong_task(packed):
    _, folder = packed('zip')
    config = get_config(opts=['DATA.DATASET', 'zip', 'DATA.DATA_PATH', str(folder)])
    with pytest.raises(UserError, match='DATA.DATASET zip does not have the targets of TRAIN.TASK supervised'):
        build_task(config).dataset('train')
