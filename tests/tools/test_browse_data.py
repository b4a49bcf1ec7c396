# SPDX-License-Identifier: Apache-2.0
"""tools/browse_data.py draws what the model of a training gets: pixels, mixed targets, views, masks, label maps, objects."""

import re

import numpy as np
import pytest
from PIL import Image

from config import get_config
from datasets import Batch
from datasets.batch import to_device
from engine.distributed import Context
from engine.run import build_loader
from tasks import Task, build_task
from tasks.pictures import GAP, MASKED, Shown, contact_sheet, enlargement, pixels
from tests.engine.curves import COMMON, _config
from tests.engine.test_curves import RECIPES
from tests.tasks.helpers import build_trainer
from tests.tools.conftest import write_config
from tools.browse_data import main
from utils.errors import UserError

SHORT = {'TRAIN.NUM_EPOCHS': 2, 'TRAIN.WARMUP_EPOCHS': 0, 'TRAIN.MODEL_EMA': False, 'DATA.BATCH_SIZE': 16}
EPOCH, BATCH = 2, 1


@pytest.fixture
def seen(images, tmp_path, request):
    """Trains a recipe, and returns its YAML file and the inputs of its model in micro-batch BATCH of epoch EPOCH."""
    config = _config({**COMMON, **RECIPES[request.param], **SHORT, 'DATA.DATA_PATH': images, 'SAVE': str(tmp_path)})
    path, inputs = tmp_path / 'recipe.yaml', []
    write_config(config.clone(), path)
    trainer = build_trainer(config, str(tmp_path / 'run'))
    kept = trainer.model.register_forward_pre_hook(
        lambda model, given: inputs.append([one.numpy() for one in given]) if model.training else None
    )
    trainer.fit()
    kept.remove()
    return str(path), inputs[(EPOCH - 1) * trainer.train_loader.num_batches + BATCH], config.DATA


def browse(path, target, *flags) -> np.ndarray:
    main(['-cfg', path, '-output', str(target), '-epoch', str(EPOCH), '-batch', str(BATCH), *flags])
    return np.asarray(Image.open(target))


def denormalized(images, data) -> np.ndarray:
    """[B, C, H, W] -> [B, H, W, C] uint8."""
    mean, std = (np.array(values)[:, None, None] for values in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    return (
        np.clip(np.round(255 * (images.astype('float64') * std + mean)), 0, 255).astype('uint8').transpose(0, 2, 3, 1)
    )


def cut(sheet: np.ndarray, number: int, side: int, count: int = 1) -> list[np.ndarray]:
    """The pictures of the first example of row `number`, at their own size."""
    factor = enlargement((side, side))
    height = (sheet.shape[0] - GAP) // ROWS
    rows = slice(GAP + number * height, GAP + number * height + factor * side, factor)
    lefts = [GAP + position * (factor * side + GAP // 2) for position in range(count)]
    return [sheet[rows, left : left + factor * side : factor] for left in lefts]


ROWS = 3
FLAGS = ('-images', str(ROWS), '-columns', '1')


@pytest.mark.parametrize('seen', ['augmented'], indirect=True)
def test_mixed_and_erased_images(seen, tmp_path, capsys):
    path, (images,), data = seen
    sheet = browse(path, tmp_path / 'batch.png', *FLAGS)
    for number, expected in enumerate(denormalized(images[:ROWS], data)):
        np.testing.assert_allclose(cut(sheet, number, 16)[0], expected, atol=1)
    lines = capsys.readouterr().out.splitlines()[-ROWS - 1 :]
    assert lines[-1] == f'{tmp_path / "batch.png"}: 3 of 16 images of batch 1, epoch 2'
    for line in lines[:-1]:  # two classes, or one with all but the share of the others in label smoothing
        shares = [float(share) for share in re.findall(r'class\d (0\.\d\d)', line)]
        assert shares and sum(shares) == pytest.approx(0.93 if len(shares) == 1 else 0.97, abs=0.011), line


@pytest.mark.parametrize('seen', ['mae'], indirect=True)
def test_masks(seen, tmp_path):
    path, (images, noise), data = seen
    sheet = browse(path, tmp_path / 'masks.png', *FLAGS)
    for number, expected in enumerate(denormalized(images[:ROWS], data)):
        image, visible = cut(sheet, number, 16, 2)
        np.testing.assert_allclose(image, expected, atol=1)
        kept = np.isin(np.arange(16), np.argsort(noise[number])[:4]).reshape(4, 4).repeat(4, 0).repeat(4, 1)
        np.testing.assert_array_equal(visible[kept], image[kept])
        assert (visible[~kept] == MASKED).all()


@pytest.mark.parametrize('seen', ['mocov3'], indirect=True)
def test_views(seen, tmp_path):
    path, (images,), data = seen
    sheet = browse(path, tmp_path / 'views.png', *FLAGS)
    for number in range(ROWS):
        for found, expected in zip(cut(sheet, number, 16, 2), denormalized(images[number], data)):
            np.testing.assert_allclose(found, expected, atol=1)


def first_batch(config):
    """The task of a recipe, its training set, and the first batch as tensors."""
    task = build_task(config)
    dataset = task.dataset('train')
    with build_loader(config, task, dataset, 'train', Context(0, 1, False)) as loader:
        return task, dataset, to_device(next(loader.epoch(1)), config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)


def embedded(name: str):
    config = get_config(f'configs/{name}.yaml', ['DATA.NUM_WORKERS', 0])
    config.defrost()
    return config


def test_label_maps():
    config = embedded('segment_digits')
    task, dataset, batch = first_batch(config)
    shown = task.training_pictures(batch, np.random.default_rng(0), dataset, 2)
    expected = pixels(batch.images[:2], config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    for example, image, labels in zip(shown, expected, batch.targets['labels'].numpy()):
        np.testing.assert_array_equal(example.pictures[0], image)
        known = labels != 255
        np.testing.assert_array_equal(example.pictures[1][known], dataset.classes.palette[labels[known]])
        assert (example.pictures[1][~known] == 255).all()
        assert set(example.caption.split(', ')) == {dataset.class_names[label] for label in np.unique(labels[known])}


def test_objects():
    task, dataset, batch = first_batch(embedded('detect_digits'))
    shown = task.training_pictures(batch, np.random.default_rng(0), dataset, 8)
    for example, boxes, image in zip(shown, batch.targets['boxes'], task.pictures_of(batch.images)):
        assert example.caption == f'{len(boxes)} object{"s" * (len(boxes) > 1)}'
        (picture,), factor = example.pictures, enlargement(image[0].shape[:2])
        changed = (picture != image[0].repeat(factor, 0).repeat(factor, 1)).any(-1)
        left, top, right, bottom = (factor * np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])).astype(int)
        inside = np.zeros_like(changed)
        inside[max(top - 1, 0) : bottom + 14, max(left - 1, 0) : right + 14] = True  # labels stand out of small boxes
        assert changed.any() and not changed[~inside].any()


@pytest.mark.parametrize('channels, shown', [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_a_task_without_labels_shows_pixels_of_any_number_of_channels(images, channels, shown):
    task = build_task(get_config(opts=['DATA.DATASET', 'folder', 'DATA.DATA_PATH', images]))
    task.config.defrost()
    task.config.DATA.IMAGENET_MEAN = task.config.DATA.IMAGENET_STD = [0.5] * channels
    stored = np.arange(16 * channels, dtype='uint8').reshape(1, 4, 4, channels)
    batch = to_device(Batch(stored, {}, np.zeros(1, 'int64')), [0.5] * channels, [0.5] * channels)
    (example,) = Task.training_pictures(task, batch, np.random.default_rng(0), task.dataset('train'), 4)
    assert example.caption == ''
    np.testing.assert_array_equal(example.pictures, stored[..., shown])


def test_long_captions_are_cut():
    examples = [Shown([np.zeros((150, 150, 3), 'uint8')], 'a caption that is much longer than its picture is wide')] * 3
    assert contact_sheet(examples, 2).size == (2 * (150 + 2 * GAP) + 3 * GAP, 2 * (150 + 18) + 3 * GAP)


@pytest.mark.parametrize(
    'flags, message',
    [
        ((), '-cfg is missing: give the YAML file of a recipe'),
        (('-cfg', 'configs/gmlp_digits.yaml', '-epoch', '0'), '-epoch is 0, but must be at least 1'),
        (('-cfg', 'configs/gmlp_digits.yaml', '-seed', '-1'), 'SEED is -1, but must be'),
        (('-cfg', 'configs/gmlp_digits.yaml', '-images', '0'), '-images is 0, but must be at least 1'),
        (
            ('-cfg', 'configs/gmlp_digits.yaml', '-batch', '99'),
            'an epoch has 46 batches of 32 images: the last one is 45',
        ),
    ],
)
def test_mistakes(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        main([*flags, '-output', str(tmp_path / 'x.png')])
    assert not (tmp_path / 'x.png').exists()


def test_the_seed_decides(tmp_path):
    sheets = [
        browse('configs/deit_digits.yaml', tmp_path / f'{number}.png', '-seed', seed)
        for number, seed in enumerate(('3', '3', '4'))
    ]
    assert (sheets[0] == sheets[1]).all() and (sheets[0] != sheets[2]).any()
