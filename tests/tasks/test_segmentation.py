# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation: metric, loss, inference at several scales, training with resume, predictions."""

import os
import shutil

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn
from PIL import Image

from config import get_config
from datasets.batch import Batch
from datasets.classes import numbered_classes
from datasets.sample import IMAGE_SIZE
from datasets.segmentation import LABELS
from deploy.inference import predict_files
from engine.checkpoint import read_checkpoint
from models import build_model
from tasks import PredictionOptions, build_task
from tasks.segmentation import SegmentationTask, class_picture, pixel_accuracy
from tasks.segmentation_metrics import SegmentationEvaluator, count_pixels, segmentation_metrics
from tests.conftest import assert_close, golden
from tests.tasks.helpers import ALONE, build_trainer, read_csv, rows
from utils.errors import UserError

TINY = {
    'TRAIN.TASK': 'segmentation', 'MODEL.TYPE': 'segmenter', 'DATA.IMAGE_SIZE': 16, 'DATA.IMAGE_SCALE': (64, 16),
    'DATA.BATCH_SIZE': 4, 'DATA.NUM_WORKERS': 0, 'MODEL.TRANS.PATCH_SIZE': 8, 'MODEL.TRANS.EMBED_DIM': 16,
    'MODEL.TRANS.DEPTH': 1, 'MODEL.TRANS.NUM_HEADS': 2, 'MODEL.SEGMENTER.DECODER': 'linear', 'TRAIN.RANDOM_ERASE_PROB': 0.0,
    'TRAIN.NUM_ITERS': 7, 'TRAIN.WARMUP_ITERS': 2, 'VALIDATE_ITERS': 3, 'TRAIN.LR_SCHEDULER.NAME': 'poly',
    'TRAIN.LR_SCHEDULER.UPDATE': 'step',
}  # fmt: skip


def config_of(**changes):
    options = {**TINY, **{name.replace('__', '.'): value for name, value in changes.items()}}
    return get_config(opts=[item for pair in options.items() for item in pair])


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """Ten training and five validation images of different sizes, of two classes by brightness."""
    root, rng = tmp_path_factory.mktemp('pairs'), np.random.default_rng(0)
    (root / 'classes.txt').write_text('dark\nbright\n')
    for split, count in (('train', 10), ('val', 5)):
        for kind in ('images', 'annotations'):
            os.makedirs(root / kind / split)
        for number in range(count):
            labels = np.kron(rng.integers(0, 2, (4, 4 + number % 3)), np.ones((8, 8))).astype('uint8')
            image = labels[..., None] * 120 + rng.integers(0, 100, (*labels.shape, 3))
            labels[:2] = 255
            Image.fromarray(image.astype('uint8')).save(root / 'images' / split / f'{number}.png')
            Image.fromarray(labels).save(root / 'annotations' / split / f'{number}.png')
    return str(root)


# ---------------------------------------------------------------------------------------------------- metric
def test_metric():
    g = golden('segmentation-metric')
    total = 0
    for index, (hits, union, predicted, labeled) in enumerate(g['out/areas_per_image']):
        images = (paddle.to_tensor(g[f'in/{kind}{index}'].astype('int32')) for kind in ('pred', 'labels'))
        counts = count_pixels(*images, 8, 255).numpy()
        np.testing.assert_array_equal(counts, [hits, predicted, labeled])
        np.testing.assert_array_equal(counts[1] + counts[2] - counts[0], union)
        total = total + counts
    metrics = segmentation_metrics(total)
    for name in ('aAcc', 'mAcc', 'mIoU'):
        np.testing.assert_allclose(metrics[name.lower()], g[f'out/{name}'], rtol=1e-12)
    np.testing.assert_allclose(metrics['iou'], g['out/IoU'], rtol=1e-12)
    np.testing.assert_allclose(metrics['acc'], g['out/Acc'], rtol=1e-12)


def test_evaluator_over_two_processes():
    """Counts are added before any division, for any distribution of the images."""
    g = golden('segmentation-metric')
    outputs = [(paddle.to_tensor(g[f'in/pred{index}'].astype('int64')), paddle.zeros([3, 4, 4])) for index in range(5)]
    labels = [g[f'in/labels{index}'] for index in range(5)]

    class Pair:
        """The other process has evaluated the other images."""

        def sum(self, counts):
            return counts + other._counts

    data = get_config().DATA
    one, other = (SegmentationEvaluator(numbered_classes(8), 255, data) for _ in range(2))
    for evaluator, mine in ((one, [0, 3]), (other, [1, 2, 4])):
        evaluator.reset(None, ALONE, lambda: False)
        evaluator.process(
            Batch([None] * len(mine), {LABELS: [labels[k] for k in mine]}, np.array(mine)), [outputs[k] for k in mine]
        )
    one.reduce(Pair())
    assert one.result()['miou'] == pytest.approx(float(g['out/mIoU']), rel=1e-12)
    assert one.best == ('miou', 'max')
    assert [line.split()[:3] for line in one.details()][2] == ['2', 'IoU', '-']
    classes = one.class_results(())
    assert np.nanmean([row['iou'] for row in classes]) == pytest.approx(one.result()['miou'])
    assert classes[2]['name'] == '2' and (classes[2]['correct'], classes[2]['labeled']) == (0, 0)
    assert one.pictures(None)['segmentation'].mode == 'RGB'


def test_metric_of_nothing():
    metrics = segmentation_metrics(np.zeros((3, 4), 'int64'))
    assert np.isnan([metrics['miou'], metrics['macc'], metrics['aacc']]).all()


# ---------------------------------------------------------------------------------------------------- loss
class Fixed(nn.Layer):
    """A model that returns given logits."""

    num_classes, patch_size, fixed_size = 5, 1, False

    def __init__(self, outputs, auxiliary_head=None):
        super().__init__()
        self.outputs, self.decode_head, self.auxiliary_head = outputs, nn.Identity(), auxiliary_head

    def forward(self, x):
        return self.outputs


def test_loss_and_accuracy():
    g = golden('segmentation-loss')
    logits, labels = paddle.to_tensor(g['in/logits']), paddle.to_tensor(g['in/labels'])
    batch = Batch(paddle.zeros([2, 3, 24, 27]), {LABELS: labels}, np.arange(2))
    for divide, expected in ((False, g['out/loss_weighted'] / 0.4), (True, g['out/loss_valid_mean'])):
        task = SegmentationTask(config_of(MODEL__NUM_CLASSES=5, TRAIN__AVG_NON_IGNORE=divide))
        losses = task.loss(Fixed(logits), batch, None)
        assert_close(losses.total.numpy(), expected)
        assert losses.counts['acc'].item() / 2 == pytest.approx(float(g['out/acc_valid_pixels']) / 100, rel=1e-5)
    assert pixel_accuracy(logits, paddle.full([2, 6, 7], 255, 'uint8'), 255).item() == 0


def test_parts_of_the_loss():
    task, logits = SegmentationTask(config_of(MODEL__NUM_CLASSES=5)), paddle.randn([2, 5, 4, 4])
    model = Fixed((logits, paddle.zeros([2, 5, 4, 4])), nn.Identity())
    task.attach(model, print, True)
    losses = task.loss(model, task.example(2), np.random.default_rng(0))
    assert losses.total.item() == pytest.approx(losses.parts['decode'].item() + 0.4 * losses.parts['aux'].item())
    assert losses.parts['aux'].item() == pytest.approx(np.log(5), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- inference
class Convolution(nn.Layer):
    """The network of the golden `slide`."""

    patch_size, fixed_size = 1, False

    def __init__(self, weights):
        super().__init__()
        self.weight, self.bias = (paddle.to_tensor(weights[f'conv.{name}']) for name in ('weight', 'bias'))

    def forward(self, x):
        logits = F.conv2d(x, self.weight, self.bias, stride=4, padding=2)
        return F.interpolate(logits, x.shape[2:], mode='bilinear')


@pytest.mark.parametrize('slide', [True, False])
def test_probabilities_over_scales_and_flips(slide):
    g = golden('segmentation-slide')
    task = SegmentationTask(
        config_of(VAL__IS_SLIDE=slide, VAL__STRIDE_SIZE=(21, 21), DATA__CROP_SIZE=(32, 32), VAL__FLIP=True)
    )
    scales = [paddle.to_tensor(g[f'in/tta_{ratio}']) for ratio in (0.75, 1.0, 1.5)]
    found = task.probabilities(Convolution(g.group('sd')), scales, tuple(g['in/ori0'].tolist()))[0].numpy()
    expected = g[f'out/tta_{"slide" if slide else "whole"}_probability']
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_images_of_one_size_pass_together():
    """The class map of an image does not depend on its batch, and has the size of the stored image."""
    g = golden('segmentation-slide')
    task, model = SegmentationTask(config_of()), Convolution(g.group('sd'))
    images = [paddle.randn([3, 20, 24]), paddle.randn([3, 24, 20]), paddle.randn([3, 20, 24])]
    sizes = [np.array(size) for size in ((30, 36), (48, 40), (30, 36))]
    maps = [output.classes.numpy() for output in task.infer(model, Batch(images, {IMAGE_SIZE: sizes}, np.arange(3)))]
    assert [found.shape for found in maps] == [(30, 36), (48, 40), (30, 36)]
    for image, size, found in zip(images, sizes, maps):
        alone = task.infer(model, Batch([image], {IMAGE_SIZE: [size]}, np.arange(1)))[0].classes.numpy()
        np.testing.assert_array_equal(found, alone)


# ---------------------------------------------------------------------------------------------------- runs
def trainer_of(pairs, folder, **changes):
    return build_trainer(
        config_of(DATA__DATASET='segmentation', DATA__DATA_PATH=pairs, MODEL__NUM_CLASSES=2, **changes), str(folder)
    )


def test_training_and_resume(tmp_path, pairs):
    straight = trainer_of(pairs, tmp_path / 'straight', SAVE_PREDICTIONS=True)
    straight.fit()
    found = rows(straight, 'val')
    assert [row['step'] for row in found] == [3, 6, 7] and all(0 <= row['miou'] <= row['aacc'] <= 1 for row in found)
    assert found[0]['images'] == 5
    with open(os.path.join(straight.folder, 'log.txt'), encoding='utf-8') as file:
        assert 'bright  IoU' in file.read()
    tables = {name: read_csv(straight.folder, f'{name}.csv') for name in ('predictions', 'classes')}
    assert [(row['index'], float(row['share1']) >= 0.5) for row in tables['predictions']] == [
        (k, True) for k in '01234'
    ]
    assert [row['name'] for row in tables['classes']] == ['dark', 'bright']
    assert np.mean([float(row['iou']) for row in tables['classes']]) == pytest.approx(found[-1]['miou'])
    assert os.path.exists(os.path.join(straight.folder, 'segmentation_0001.png'))
    assert os.path.exists(os.path.join(straight.folder, 'segmentation_step0000007.png'))
    cut = trainer_of(pairs, tmp_path / 'cut', SAVE_STEPS=1)
    cut.length = cut.length.__class__(cut.steps_per_epoch, 4, 3)
    cut.fit()
    again = trainer_of(pairs, tmp_path / 'cut')
    path, content = read_checkpoint(again.folder, print)
    again.snapshot.load_state_dict(content, path)
    again.fit()
    for name, value in straight.model.state_dict().items():
        np.testing.assert_array_equal(again.model.state_dict()[name].numpy(), value.numpy())


def test_predictions(tmp_path, pairs):
    config = config_of(
        DATA__DATASET='segmentation', DATA__DATA_PATH=pairs, MODEL__NUM_CLASSES=2, VAL__SCALE_RATIOS=(1.0, 1.5)
    )
    task, model = build_task(config), build_model(config)
    model.eval()
    (tmp_path / 'broken.png').write_bytes(b'')
    paths = [os.path.join(pairs, 'images', 'val', '1.png'), str(tmp_path / 'broken.png')]
    options = PredictionOptions(topk=5)
    assert task.prediction_columns(options) == ('class1', 'name1', 'share1', 'class2', 'name2', 'share2')
    first, broken = predict_files(config, task, model, paths, options)
    assert broken.error == 'the file is empty'
    classes = first.prediction.row['classes']
    assert sum(entry['share'] for entry in classes) == pytest.approx(1)
    assert {entry['name'] for entry in classes} <= {'dark', 'bright'} and len(first.prediction.cells) == 6
    pictures = first.prediction.pictures
    assert {name: (picture.mode, picture.size) for name, picture in pictures.items()} == {
        'classes': ('P', (40, 32)), 'overlay': ('RGB', (40, 32)),
    }  # fmt: skip
    assert np.bincount(np.asarray(pictures['classes']).reshape(-1))[classes[0]['class']] == classes[0]['share'] * 1280


def test_class_maps_of_many_classes():
    many = class_picture(np.full((2, 2), 299), np.zeros((300, 3), 'uint8'))
    assert np.asarray(many).tolist() == [[299, 299], [299, 299]]


# ---------------------------------------------------------------------------------------------------- mistakes
def test_missing_maps_end_a_run_at_its_start(tmp_path, pairs):
    shutil.copytree(pairs, tmp_path / 'data')
    for number in (1, 3):
        os.remove(tmp_path / 'data' / 'annotations' / 'train' / f'{number}.png')
    with pytest.raises(UserError, match=r"images/train/1.png' has no label map '.*/1.png'; 2 of 10 images have none"):
        trainer_of(str(tmp_path / 'data'), tmp_path / 'run')


def test_wrong_settings(pairs):
    with pytest.raises(UserError, match='VAL.SCALE_RATIOS is empty'):
        build_task(config_of(VAL__SCALE_RATIOS=()))
    with pytest.raises(UserError, match='does not support repeated augmentation and random erasing'):
        build_task(config_of(TRAIN__RANDOM_ERASE_PROB=0.5))
    with pytest.raises(UserError, match='DATA.DATASET digits does not have the targets of TRAIN.TASK segmentation'):
        build_task(config_of(DATA__DATASET='digits').clone()).dataset('train')
    with pytest.raises(UserError, match='DATA.DATASET segmentation does not have the targets of TRAIN.TASK supervised'):
        build_task(get_config(opts=['DATA.DATASET', 'segmentation', 'DATA.DATA_PATH', pairs])).dataset('train')
    with pytest.raises(UserError, match='needs a model with a decoder'):
        build_task(config_of()).attach(nn.Linear(1, 1), print, True)
    model = Fixed(None)
    model.fixed_size, model.image_size = True, 16
    with pytest.raises(UserError, match='set VAL.IS_SLIDE to True'):
        build_task(config_of()).attach(model, print, True)
    with pytest.raises(UserError, match='need crops of 16 x 16 pixels'):
        build_task(config_of(DATA__CROP_SIZE=(16, 32), VAL__IS_SLIDE=True)).attach(model, print, True)
