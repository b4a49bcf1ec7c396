# SPDX-License-Identifier: Apache-2.0
"""Data sets of label maps: layouts, stored values, and what is wrong with them."""

import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from config import get_config
from datasets import build_dataset, resolve_num_classes
from datasets.cache import cache_images
from datasets.classes import builtin_classes, default_palette, read_classes
from datasets.dataset import BadImageError
from datasets.dense import dense_transform
from datasets.images import UnreadableImage
from datasets.loader import build_dataloader
from datasets.sample import Plane
from datasets.scenes import NAMES, make_scene, scenes_folder
from datasets.segmentation import LABELS, label_table, read_values
from tests.conftest import golden
from tools import verify_data
from utils.errors import UserError

SHAPE = (12, 10)


def save(path, array, **options):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image = Image.fromarray(array)
    if options.pop('palette', False):
        image.putpalette(default_palette(256).tobytes())
    image.save(path, **options)


def picture(path):
    save(path, np.random.default_rng(0).integers(0, 256, (*SHAPE, 3)).astype('uint8'))


def values(*numbers, dtype='uint8'):
    return np.resize(np.array(numbers, dtype), SHAPE)


def build(root, name='segmentation', split='train', **data):
    options = [item for key, value in data.items() for item in (f'DATA.{key}', value)]
    config = get_config(
        opts=[
            'DATA.DATASET',
            name,
            'DATA.DATA_PATH',
            str(root),
            'TRAIN.TASK',
            'segmentation',
            'MODEL.TYPE',
            'segmenter',
            *options,
        ]
    )
    return build_dataset(config, split)


@pytest.fixture
def generic(tmp_path):
    """Three pairs of three classes, one in a folder of its own, each stored in another way."""
    for number, (name, options) in enumerate({'a': {}, 'b/c': {'palette': True}, 'd': {}}.items()):
        picture(str(tmp_path / 'images' / 'train' / f'{name}.png'))
        save(str(tmp_path / 'annotations' / 'train' / f'{name}.png'), values(number, 0, 255), **options)
    (tmp_path / 'classes.txt').write_text('ground\ncat\t#ff0080\ndog\n')
    return tmp_path


def test_a_folder_of_images_and_maps(generic):
    dataset = build(generic)
    assert (len(dataset), dataset.num_classes, dataset.class_names) == (3, 3, ['ground', 'cat', 'dog'])
    assert dataset.classes.palette.tolist() == [[0, 0, 0], [255, 0, 128], [0, 128, 0]]
    found = {dataset.describe(index)[-7:]: dataset.label_map(index).pixels for index in range(3)}
    for number, name in enumerate(['n/a.png', 'b/c.png', 'n/d.png']):
        np.testing.assert_array_equal(found[name], values(number, 0, 255))
    config = get_config(opts=['MODEL.NUM_CLASSES', 4, 'TRAIN.TASK', 'segmentation', 'MODEL.TYPE', 'segmenter'])
    with pytest.raises(UserError, match='MODEL.NUM_CLASSES is 4, but .* has 3 classes'):
        resolve_num_classes(config, dataset)


def test_reduced_zero_and_another_ignored_value(generic):
    (generic / 'classes.txt').write_text('cat\ndog\n')
    dataset = build(generic, REDUCE_ZERO_LABEL=True)
    labels = np.concatenate([dataset.label_map(index).pixels.reshape(-1) for index in range(3)])
    assert sorted(set(labels.tolist())) == [0, 1, 255]
    table = label_table(3, 7)
    assert (table[:3].tolist(), table[7], table[255]) == ([0, 1, 2], 7, -1)


def test_sixteen_bits_and_more_than_255_classes(generic):
    (generic / 'classes.txt').write_text(''.join(f'c{number}\n' for number in range(300)))
    for name in ('a', 'b/c', 'd'):
        save(str(generic / 'annotations' / 'train' / f'{name}.png'), values(299, 0, 65535, dtype='uint16'))
    labels = build(generic, IGNORE_INDEX=65535).label_map(0)
    assert (labels.pixels.dtype, labels.ignored) == (np.dtype('int32'), 65535)
    np.testing.assert_array_equal(labels.pixels, values(299, 0, 65535, dtype='int32'))


def test_what_is_wrong_with_a_folder(generic):
    def message(change, *args, **data):
        change(*args)
        with pytest.raises(UserError) as raised:
            dataset = build(generic, **data)
            dataset.check()
            dataset.sample(0)
        return str(raised.value)

    maps, images = generic / 'annotations' / 'train', generic / 'images' / 'train'
    text = message(save, str(maps / 'a.png'), values(0, 3))
    assert "a.png' has the value 3, which is none of the 3 classes and not the ignored value 255" in text
    text = message(save, str(maps / 'a.png'), np.zeros((5, 4), 'uint8'))
    assert "a.png' has 10 x 12 pixels, but its label map" in text and "a.png' 4 x 5" in text
    text = message(save, str(maps / 'a.png'), np.zeros((*SHAPE, 3), 'uint8'))
    assert "cannot read the label map '" in text and 'this image is RGB' in text
    (maps / 'a.png').write_bytes(b'no image')
    assert 'knows as PNG' in message(lambda: None)
    (maps / 'a.png').write_bytes(b'')
    assert 'the file is empty' in message(lambda: None)
    text = message(os.remove, maps / 'a.png')
    assert re.search("images/train/a.png' has no label map '.*annotations/train/a.png'; 1 of 3 images", text)
    save(str(maps / 'a.png'), values(0))
    text = message(picture, str(images / 'a.bmp'))
    assert "have the name 'a' with different extensions" in text
    os.remove(images / 'a.bmp')
    save(str(maps / 'more.png'), values(0))
    assert build(generic).notes == [f"1 label maps in '{maps}' belong to no image."]
    (generic / 'classes.txt').write_text('cat\ncat\n')
    assert "classes.txt:2: the class 'cat'" in message(lambda: None)
    (generic / 'classes.txt').write_text('cat\tred\n')
    assert "classes.txt:1: 'red' is no color" in message(lambda: None)
    os.remove(generic / 'classes.txt')
    assert 'classes.txt' in message(lambda: None)


def test_damaged_maps_are_skipped_where_images_are(generic):
    (generic / 'annotations' / 'train' / 'a.png').write_bytes(b'damaged')
    dataset = build(generic)
    assert len(dataset) == 3
    with pytest.raises(BadImageError, match='cannot read the label map'):
        dataset.label_map(0)


def test_values_that_are_no_labels():
    def stored(array, kind='PNG'):
        file = io.BytesIO()
        Image.fromarray(array).save(file, kind)
        return file.getvalue()

    with pytest.raises(UnreadableImage, match='not an image that Pillow knows as PNG, BMP'):
        read_values(stored(np.zeros((4, 4), 'uint8'), 'JPEG'))
    with pytest.raises(UnreadableImage, match='more than 16 bits'):
        read_values(stored(np.full((4, 4), 1 << 20, 'int32'), 'TIFF'))
    np.testing.assert_array_equal(read_values(stored(np.full((4, 4), 40000, 'uint16'))), np.full((4, 4), 40000))


def test_public_classes():
    g = golden('segmentation-classes')
    for name, file in (('ade20k', 'ade20k'), ('voc', 'voc2012'), ('cityscapes', 'cityscapes')):
        table = builtin_classes(file)
        assert table.names == g.meta['names'][name]
        np.testing.assert_array_equal(table.palette, g[f'out/{name}/palette'])
    np.testing.assert_array_equal(default_palette(21), g['out/voc/palette'])


def test_ade20k(tmp_path):
    for part, split in (('training', 'train'), ('validation', 'val')):
        picture(str(tmp_path / 'images' / part / f'ADE_{split}_00000001.jpg'))
        save(str(tmp_path / 'annotations' / part / f'ADE_{split}_00000001.png'), values(0, 1, 150))
        dataset = build(tmp_path, 'ade20k', split)
        np.testing.assert_array_equal(dataset.label_map(0).pixels, values(255, 0, 149))
    assert dataset.num_classes == 150


def test_voc(tmp_path):
    lists = tmp_path / 'ImageSets' / 'Segmentation'
    os.makedirs(lists)
    (lists / 'train.txt').write_text('x_1\n')
    (lists / 'trainaug.txt').write_text('x_1\nx_2\n')
    for name in ('x_1', 'x_2'):
        picture(str(tmp_path / 'JPEGImages' / f'{name}.jpg'))
        save(str(tmp_path / 'SegmentationClassAug' / f'{name}.png'), values(0, 20, 255))
    save(str(tmp_path / 'SegmentationClass' / 'x_1.png'), values(0, 20, 255), palette=True)
    np.testing.assert_array_equal(build(tmp_path, 'voc2012').label_map(0).pixels, values(0, 20, 255))
    assert len(build(tmp_path, 'voc2012aug')) == 2
    os.remove(tmp_path / 'SegmentationClassAug' / 'x_2.png')
    with pytest.raises(UserError, match="x_2.jpg' has no label map '.*SegmentationClassAug/x_2.png'; 1 of 2 images"):
        build(tmp_path, 'voc2012aug').check()
    with pytest.raises(UserError, match='val.txt.* is missing'):
        build(tmp_path, 'voc2012', 'val')


def test_cityscapes(tmp_path):
    name = 'bonn/bonn_000000_000019'
    picture(str(tmp_path / 'leftImg8bit' / 'train' / f'{name}_leftImg8bit.png'))
    save(str(tmp_path / 'gtFine' / 'train' / f'{name}_gtFine_labelIds.png'), values(0, 7, 33, 9))
    dataset = build(tmp_path, 'cityscapes')
    np.testing.assert_array_equal(dataset.label_map(0).pixels, values(255, 0, 18, 255))
    save(str(tmp_path / 'gtFine' / 'train' / f'{name}_gtFine_labelTrainIds.png'), values(0, 18, 255))
    np.testing.assert_array_equal(build(tmp_path, 'cityscapes').label_map(0).pixels, values(0, 18, 255))


def test_maps_in_memory(generic):
    dataset = build(generic)
    kept = cache_images(dataset, np.arange(3), show_progress=False)
    expected = [dataset.label_map(index).pixels for index in range(3)]
    os.rename(generic / 'annotations', generic / 'away')
    for index in range(3):
        np.testing.assert_array_equal(kept.label_map(index).pixels, expected[index])


def test_scenes(tmp_path, monkeypatch):
    digits, targets = np.full((4, 8, 8), 255, 'uint8'), np.arange(4)
    one, same, other = (make_scene(digits, targets, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.image, same.image)
    assert not np.array_equal(one.image, other.image)
    for label, mask in one.objects:
        assert mask.any() and (one.labels[mask] == label).all()
    monkeypatch.setenv('LEANVIT_CACHE', str(tmp_path))
    monkeypatch.setattr('datasets.scenes.SCENES', {'train': 6, 'val': 3})
    folder = scenes_folder()
    dataset = build('unused', 'digit_scenes', 'val')
    assert (len(dataset), tuple(dataset.class_names)) == (3, NAMES)
    assert read_classes(os.path.join(folder, 'classes.txt')).names == list(NAMES)
    with open(os.path.join(folder, 'annotations', 'instances_val.json'), encoding='utf-8') as file:
        boxes = json.load(file)
    assert [image['file_name'] for image in boxes['images']] == ['0000.png', '0001.png', '0002.png']
    for found in boxes['annotations']:
        labels = dataset.label_map(found['image_id']).pixels
        left, top, width, height = found['bbox']
        assert (labels[top : top + height, left : left + width] == found['category_id']).sum() >= found['area'] > 0


def test_batches(generic):
    """Training: planes of one shape; evaluation: images and maps as large as they are."""
    options = [
        *('TRAIN.TASK', 'segmentation', 'MODEL.TYPE', 'segmenter', 'DATA.IMAGE_SIZE', 16, 'DATA.IMAGE_SCALE', (64, 16)),
        *('DATA.DATASET', 'segmentation', 'DATA.DATA_PATH', str(generic), 'DATA.BATCH_SIZE', 3, 'DATA.NUM_WORKERS', 0),
        *('TRAIN.RANDOM_ERASE_PROB', 0.0),
    ]
    config, dataset = get_config(opts=options), build(generic)
    transform = dense_transform(config, True, [Plane(LABELS, (16, 16))])
    batch = next(iter(build_dataloader(config, dataset, True, transform=transform).epoch(0)))
    assert (batch.images.shape, batch.targets[LABELS].shape) == ((3, 16, 16, 3), (3, 16, 16))
    batch = next(iter(build_dataloader(config, dataset, False, transform=dense_transform(config, False)).epoch(0)))
    assert [image.shape for image in batch.images] == [(19, 16, 3)] * 3
    assert [labels.shape for labels in batch.targets[LABELS]] == [SHAPE] * 3


def test_all_maps_are_verified(generic, tmp_path, capsys):
    """Each map is read; the report names all of those that training could not use, and missing ones."""
    for kind in ('images', 'annotations'):
        shutil.copytree(generic / kind / 'train', generic / kind / 'val')
    maps = generic / 'annotations' / 'val'
    save(str(generic / 'images' / 'val' / 'a.png'), values(1, 2))
    save(str(maps / 'b' / 'c.png'), np.zeros((5, 4), 'uint8'))
    for name in ('a', 'd'):
        picture(str(generic / 'images' / 'train' / f'{name}2.png'))
    save(str(generic / 'annotations' / 'train' / 'a2.png'), values(0, 77))
    report = str(tmp_path / 'report.json')
    flags = ['-dataset', 'segmentation', '-data_path', str(generic), '-report', report, '-num_workers', '0']
    assert verify_data.main(flags) == 1
    with open(report, encoding='utf-8') as file:
        found = json.load(file)
    assert found['parts']['train'] == {'images': 5, 'classes': 3, 'unreadable': 2}
    problems = {os.path.basename(p['image']): p['reason'] for p in found['problems'] if p['kind'] == 'unreadable'}
    assert sorted(problems) == ['a2.png', 'c.png', 'd2.png']
    assert "a2.png' has the value 77, which is none of the 3 classes" in problems['a2.png']
    assert 'both must be equal' in problems['c.png']
    assert "d2.png': No such file" in problems['d2.png'] and 'label map' in problems['d2.png']
    assert [problem['kind'] for problem in found['problems']].count('leak') >= 1
    assert 'train: 5 images in 3 classes' in capsys.readouterr().out
