# SPDX-License-Identifier: Apache-2.0
"""Annotations in COCO's format: layouts, what COCO's tools accept, and what is wrong with them."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from config import get_config
from datasets import build_dataset, resolve_num_classes
from datasets.classes import builtin_classes
from datasets.coco import coco_categories, read_annotations
from datasets.dataset import BadImageError
from datasets.detection import BOXES, CLASSES, MASKS, OBJECTS, known_categories
from datasets.detection_transforms import detection_transform
from datasets.loader import build_dataloader
from datasets.polygons import coco_masks
from datasets.sample import IMAGE_SIZE, VALID
from tools import make_lmdb, make_zip, verify_data
from utils.errors import UserError

HEIGHT, WIDTH = 20, 30
SQUARE = [2.0, 3.0, 12.0, 3.0, 12.0, 13.0, 2.0, 13.0]
RLE_MASK = np.zeros((HEIGHT, WIDTH), 'uint8')
RLE_MASK[5:9, 10:20] = 1
RLE = coco_masks().encode(np.asfortranarray(RLE_MASK))
RLE = {'size': [HEIGHT, WIDTH], 'counts': RLE['counts'].decode()}


def annotation(number: int, image: int, **changes) -> dict:
    entry = {'id': number, 'image_id': image, 'category_id': 7, 'bbox': [2, 3, 10, 10], 'segmentation': [SQUARE]}
    return {**entry, 'area': 100, 'iscrowd': 0, **changes}


def content() -> dict:
    """Three images: with two objects and a crowd; with an RLE; with nothing. Ids have gaps and no order."""
    return {
        'images': [
            {'id': number, 'file_name': f'{number}.png', 'height': HEIGHT, 'width': WIDTH} for number in (31, 4, 15)
        ],
        'annotations': [
            annotation(10, 31),
            annotation(3, 4, category_id=2, segmentation=RLE, bbox=[10, 5, 10, 4], area=40),
            annotation(12, 31, category_id=90),
            annotation(20, 31, iscrowd=1, segmentation=RLE),
        ],
        'categories': [{'id': 90, 'name': 'cow'}, {'id': 2, 'name': 'dog'}, {'id': 7, 'name': 'cat'}],
    }


def write(root, found: dict, split: str = 'train') -> None:
    """Annotations and their images in the layout of -dataset detection."""
    os.makedirs(root / 'annotations', exist_ok=True)
    os.makedirs(root / 'images' / split, exist_ok=True)
    (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(found))
    for image in found.get('images', ()):
        pixels = np.random.default_rng(image['id']).integers(0, 256, (HEIGHT, WIDTH, 3)).astype('uint8')
        Image.fromarray(pixels).save(root / 'images' / split / f'{image["id"]}.png')


@pytest.fixture
def own(tmp_path):
    for split in ('train', 'val'):
        write(tmp_path, content(), split)
    return tmp_path


def settings(root, name='detection', **data):
    options = [item for key, value in data.items() for item in (f'DATA.{key}', value)]
    fixed = ['TRAIN.TASK', 'detection', 'DATA.NUM_WORKERS', 0, 'TRAIN.RANDOM_ERASE_PROB', 0.0]
    return get_config(opts=['DATA.DATASET', name, 'DATA.DATA_PATH', str(root), *fixed, *options])


def build(root, split='train', **data):
    return build_dataset(settings(root, **data), split)


# ---------------------------------------------------------------------------------------------------- what is read
def test_own_images(own):
    dataset = build(own)
    assert (dataset.num_classes, dataset.class_names) == (3, ['dog', 'cat', 'cow'])  # by id
    assert dataset.image_ids.tolist() == [31, 4]  # one has nothing to learn
    assert dataset.notes == [
        f"'{own}/annotations/instances_train.json': 1 of 3 images have no object to learn, and are left out."
    ]
    sample = dataset.sample(0)
    assert sample.image.size == (WIDTH, HEIGHT)
    objects = sample.targets[OBJECTS]
    assert objects.classes.tolist() == [1, 2]  # the crowd is none of them
    np.testing.assert_array_equal(objects.boxes(), [[2, 3, 12, 13]] * 2)
    np.testing.assert_array_equal(objects.polygons[0][0], np.reshape(SQUARE, (4, 2)))
    other = dataset.objects(1)
    assert other.classes.tolist() == [0]
    np.testing.assert_array_equal(other.boxes(), [[10, 5, 20, 9]])  # of the mask
    with pytest.raises(UserError, match='MODEL.NUM_CLASSES is 4, but .* has 3 classes'):
        resolve_num_classes(get_config(opts=['MODEL.NUM_CLASSES', 4]), dataset)


def test_validation_has_all_images(own):
    dataset = build(own, 'val')
    assert dataset.image_ids.tolist() == [31, 4, 15]
    assert dataset.objects(2).boxes().shape == (0, 4)
    truth = dataset.truth([0, 1, 2])
    assert [image['id'] for image in truth['images']] == [31, 4, 15]
    assert [entry['id'] for entry in truth['annotations']] == [1, 2, 3, 4]
    assert [entry['iscrowd'] for entry in truth['annotations']] == [0, 0, 1, 0]
    assert [category['id'] for category in truth['categories']] == [2, 7, 90]


def test_other_places(own):
    os.rename(own / 'annotations' / 'instances_train.json', own / 'mine.json')
    os.rename(own / 'images' / 'train', own / 'photos')
    with pytest.raises(
        UserError, match="instances_train.json' are missing; set -data_path .* or DATA.ANNOTATION_FILES"
    ):
        build(own)
    assert len(build(own, ANNOTATION_FILES=('mine.json', 'none'), IMAGE_FOLDERS=('photos', 'none'))) == 2


def test_coco(own):
    os.rename(own / 'images' / 'val', own / 'val2017')
    os.rename(own / 'annotations' / 'instances_val.json', own / 'annotations' / 'instances_val2017.json')
    assert len(build(own, 'val', name='coco')) == 3
    categories = coco_categories(builtin_classes('coco').names)
    assert len(categories) == 80 and categories[0] == (1, 'person') and categories[-1] == (90, 'toothbrush')
    assert (11 + 2, 'stop sign') in categories and (44, 'bottle') in categories and (85, 'clock') in categories
    assert known_categories(settings(own, 'coco')) == categories


def test_what_coco_accepts_is_counted(tmp_path):
    found = content()
    found['annotations'] += [
        annotation(30, 999),  # of an image that is not listed
        annotation(31, 15, segmentation=[[1, 1, 5, 5], SQUARE, [1, 2, 3, 4, 5, 6, 7]], bbox=[-5, 3, 10, 10]),
        annotation(32, 15, segmentation=[], bbox=[25, 3, 10, 10]),
        annotation(33, 15, bbox=[4, 4, 0, 5], segmentation=[[4, 4, 4, 6, 4, 9]]),
        {key: value for key, value in annotation(34, 15).items() if key not in ('area', 'iscrowd', 'segmentation')},
    ]
    write(tmp_path, found)
    dataset = build(tmp_path)
    place = f"'{tmp_path}/annotations/instances_train.json': "
    assert [note.removeprefix(place) for note in dataset.notes] == [
        '1 objects have no area; training leaves them out, evaluation takes them as they are.',
        '2 objects have no mask; training leaves them out, and evaluation counts them as missed masks.',
        '2 boxes stick out of their images; training clips them, evaluation takes them as they are.',
        '2 polygons have fewer than three points, and are dropped.',
        '1 objects belong to images that the file does not list, and are ignored.',
    ]
    index = dataset.image_ids.tolist().index(15)
    assert len(dataset.objects(index).polygons[0]) == 1 and len(dataset.objects(index).classes) == 2
    kept = dataset.objects(index).clipped((WIDTH, HEIGHT))
    assert kept.classes.tolist() == [1]  # without the one of zero area
    truth = dataset.truth([index])['annotations']
    assert len(truth) == 4 and truth[1]['segmentation']['counts'] == [HEIGHT * WIDTH]
    assert [entry['area'] for entry in truth] == [100, 100, 100, 0]


def test_areas_of_masks_where_the_file_has_none(tmp_path):
    found = content()
    for entry in found['annotations']:
        del entry['area']
    found['annotations'][3]['segmentation'] = {'size': [HEIGHT, WIDTH], 'counts': [40, 60, HEIGHT * WIDTH - 100]}
    write(tmp_path, found)
    assert [entry['area'] for entry in build(tmp_path).truth([0, 1])['annotations']] == [100, 100, 60, 40]


# ---------------------------------------------------------------------------------------------------- mistakes
def changed(kind: str, index: int, **changes):
    def change(found):
        found[kind][index].update(changes)

    return change


def removed(kind: str, index: int, key: str):
    return lambda found: found[kind][index].pop(key)


def appended(kind: str, value):
    return lambda found: found[kind].append(value)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda found: found.pop('images'), "the list 'images' is missing"),
        (lambda found: found.update(annotations={}), "the list 'annotations' is {}"),
        (lambda found: found.update(categories=[]), 'has no categories'),
        (appended('annotations', 5), 'number 4 of annotations: 5 is no object'),
        (removed('annotations', 1, 'id'), 'annotation number 1: its id is null'),
        (changed('annotations', 1, id=10), 'annotation 10: two entries have this id'),
        (changed('annotations', 1, image_id='4'), 'annotation 3: its image_id is "4"'),
        (changed('annotations', 1, category_id=1), 'annotation 3: its category_id is 1, which no category'),
        (changed('annotations', 1, category_id=[2]), 'annotation 3: its category_id is [2], which'),
        (removed('annotations', 1, 'bbox'), 'annotation 3: its bbox is null'),
        (changed('annotations', 1, bbox=[1, 2, 3]), 'annotation 3: its bbox is [1, 2, 3], but must be [left, top'),
        (changed('annotations', 1, bbox=[1, 2, -3, 4]), 'annotation 3: its bbox is [1, 2, -3, 4]'),
        (changed('annotations', 1, bbox=[1, 2, 1e999, 4]), 'annotation 3: its bbox is [1, 2, Infinity, 4]'),
        (changed('annotations', 1, iscrowd=2), 'annotation 3: its iscrowd is 2'),
        (changed('annotations', 1, area='big'), 'annotation 3: its area is "big"'),
        (changed('annotations', 1, segmentation=[1, 2, 3]), 'annotation 3: its segmentation is [1, 2, 3]'),
        (changed('annotations', 1, segmentation=[[1, 2, None]]), 'annotation 3: its segmentation is [[1, 2, null]]'),
        (
            changed('annotations', 1, segmentation={'size': [3, 4], 'counts': 'x'}),
            'its RLE has the size [3, 4], but its',
        ),
        (changed('annotations', 1, segmentation={'size': [20, 30], 'counts': 'é'}), 'its RLE has no counts that can'),
        (
            changed('annotations', 1, segmentation={'size': [20, 30], 'counts': [5, 6]}),
            'cover 11 pixels, but its image',
        ),
        (
            changed('annotations', 1, segmentation={'size': [20, 30], 'counts': [700, -100]}),
            'no counts that can be read',
        ),
        (changed('images', 1, id=31), 'image 31: two entries have this id'),
        (changed('images', 1, id=True), 'image number 1: its id is true'),
        (removed('images', 1, 'file_name'), 'image 4: its file_name is null'),
        (changed('images', 1, height=0), 'image 4: its height is 0, but must be a number of pixels'),
        (changed('images', 1, width='30'), 'image 4: its width is "30"'),
        (changed('categories', 1, name=5), 'category 2: its name is 5'),
        (changed('categories', 1, id=90), 'category 90: two entries have this id'),
    ],
)
def test_what_is_wrong_with_annotations(tmp_path, change, words):
    """Each message names the file, and the entry."""
    found = content()
    change(found)
    path = tmp_path / 'objects.json'
    path.write_text(json.dumps(found))
    with pytest.raises(UserError) as caught:
        read_annotations(str(path))
    message = str(caught.value)
    assert message.startswith(f"'{path}'") and words in message and message.endswith('.') and '\n' not in message


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        (b'{"images": [', 'is no JSON file (Expecting value'),
        (b'[1]', 'holds [1], but'),
        (b'\xff\xfe', 'is no JSON file'),
    ],
)
def test_files_that_are_no_annotations(tmp_path, text, words):
    path = tmp_path / 'objects.json'
    path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        read_annotations(str(path))
    assert str(path) in str(caught.value) and words in str(caught.value)
    with pytest.raises(UserError, match='cannot read the annotations'):
        read_annotations(str(tmp_path))


def test_missing_and_other_images(own):
    os.remove(own / 'images' / 'train' / '4.png')
    with pytest.raises(
        UserError, match="1 of 3 images of .* are missing in .*images/train', such as '4.png'; add them"
    ):
        build(own).check()
    dataset = build(own, BAD_IMAGE='skip')
    assert dataset.image_ids.tolist() == [31] and "such as '4.png'; they are left out." in dataset.notes[-1]
    Image.new('RGB', (5, 6)).save(own / 'images' / 'train' / '31.png')
    with pytest.raises(UserError, match=r"31.png' has 5 x 6 pixels, but '.*train.json' says 30 x 20 \(image 31\)"):
        dataset.sample(0)
    (own / 'images' / 'train' / '31.png').write_bytes(b'no image')
    with pytest.raises(BadImageError, match="cannot read image '.*31.png'"), dataset.naming(0):
        dataset.sample(0)
    os.remove(own / 'images' / 'train' / '31.png')
    with pytest.raises(UserError, match='2 of 3 images of .* are missing'):
        build(own, BAD_IMAGE='skip').check()


def test_nothing_to_learn(tmp_path):
    found = content()
    found['annotations'] = [annotation(1, 31, iscrowd=1, segmentation=RLE)]
    write(tmp_path, found)
    with pytest.raises(UserError, match='instances_train.json. holds no image'):
        build(tmp_path)


# ---------------------------------------------------------------------------------------------------- batches
def test_batches(own):
    config = settings(own, IMAGE_SIZE=32, BATCH_SIZE=2)
    dataset = build_dataset(config, 'train')
    loader = build_dataloader(config, dataset, True, transform=detection_transform(config, True))
    batch, same, other = (next(iter(loader.epoch(epoch))) for epoch in (1, 1, 2))
    assert batch.images.shape == (2, 32, 32, 3) and batch.targets[VALID].shape == (2, 2)
    for boxes, classes, masks in zip(*(batch.targets[name] for name in (BOXES, CLASSES, MASKS))):
        assert len(boxes) == len(classes) == len(masks)
    np.testing.assert_array_equal(batch.images, same.images)
    assert not np.array_equal(batch.images, other.images)
    val = build_dataset(config, 'val')
    batch = next(iter(build_dataloader(config, val, False, transform=detection_transform(config, False)).epoch(0)))
    assert batch.images.shape == (2, 32, 32, 3)
    assert batch.targets[VALID].tolist() == [[21, 32]] * 2 and batch.targets[IMAGE_SIZE].tolist() == [[20, 30]] * 2


def test_workers_give_the_same_batches(own):
    found = []
    for workers in (0, 2):
        config = settings(own, IMAGE_SIZE=32, BATCH_SIZE=2, NUM_WORKERS=workers)
        dataset = build_dataset(config, 'train')
        with build_dataloader(config, dataset, True, transform=detection_transform(config, True)) as loader:
            found.append(next(iter(loader.epoch(3))))
    np.testing.assert_array_equal(found[0].images, found[1].images)
    for one, other in zip(found[0].targets[BOXES], found[1].targets[BOXES]):
        np.testing.assert_array_equal(one, other)


def test_scenes(tmp_path, monkeypatch):
    """Embedded scenes: the objects are those of the label maps, and as user data on disk."""
    monkeypatch.setenv('LEANVIT_CACHE', str(tmp_path))
    monkeypatch.setattr('datasets.scenes.SCENES', {'train': 5, 'val': 3})
    dataset = build('unused', 'val', name='digit_objects')
    assert (len(dataset), dataset.class_names) == (3, [str(digit) for digit in range(10)]) and not dataset.notes
    labels = build_dataset(
        get_config(opts=['DATA.DATASET', 'digit_scenes', 'TRAIN.TASK', 'segmentation', 'MODEL.TYPE', 'segmenter']),
        'val',
    )
    for index in range(3):
        pixels, objects = labels.label_map(index).pixels, dataset.objects(index)
        assert len(objects.classes)
        for polygons, label in zip(objects.polygons, objects.classes + 1):
            mask = coco_masks().frPyObjects([p.reshape(-1).tolist() for p in polygons], *pixels.shape)
            mask = coco_masks().decode(coco_masks().merge(mask)).astype(bool)
            assert mask.any() and (pixels[mask] == label).all()
    folder = os.path.join(tmp_path, 'digit_scenes-3')
    same = build(folder, 'val')
    np.testing.assert_array_equal(same.objects(1).boxes(), dataset.objects(1).boxes())
    images = build_dataset(get_config(opts=['DATA.DATASET', 'scene_images']), 'val')
    assert (len(images), images.class_names, images.labels.tolist()) == (3, ['scene'], [0, 0, 0])
    np.testing.assert_array_equal(images.load(2), dataset.load(2))
    assert known_categories(settings('unused', 'digit_objects')) == dataset.categories
    assert known_categories(settings(folder)) == dataset.categories and known_categories(settings('none')) is None


# ---------------------------------------------------------------------------------------------------- tools
def test_verify_data(own, tmp_path, capsys):
    """Images are read, and compared with what the annotations say of them."""
    Image.new('RGB', (5, 6)).save(own / 'images' / 'val' / '4.png')
    os.remove(own / 'images' / 'val' / '15.png')
    report = str(tmp_path / 'report.json')
    flags = ['-dataset', 'detection', '-data_path', str(own), '-report', report, '-num_workers', '0']
    assert verify_data.main(flags) == 1
    with open(report, encoding='utf-8') as file:
        found = json.load(file)
    assert found['parts']['train'] == {'images': 2, 'classes': 3, 'unreadable': 0}
    assert [problem['kind'] for problem in found['problems']] == ['unreadable', 'unreadable', 'leak']
    assert 'has 5 x 6 pixels' in found['problems'][0]['reason'] and 'No such file' in found['problems'][1]['reason']
    assert 'have no object to learn' in found['notes'][0]
    (own / 'annotations' / 'instances_val.json').write_text('{}')
    assert verify_data.main(flags) == 1
    assert "list: '" in capsys.readouterr().out


@pytest.mark.parametrize('tool', [make_zip, make_lmdb])
def test_objects_are_not_packed(own, tool):
    with pytest.raises(UserError, match='-dataset detection cannot be packed; only images with one class'):
        tool.main(['-dataset', 'detection', '-data_path', str(own), '-split', 'train'])
