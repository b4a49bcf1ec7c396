# SPDX-License-Identifier: Apache-2.0
"""Object detection: loss, coordinates, evaluation, training with resume, predictions, exported programs."""

import json
import os

import numpy as np
import paddle
import pytest
from paddle import nn
from PIL import Image

from config import get_config
from datasets.batch import to_device
from datasets.detection import BOXES, CLASSES, MASKS, DetectionDataset
from datasets.loader import build_dataloader
from datasets.polygons import decoded_rle
from deploy.inference import predict_files
from engine.checkpoint import read_checkpoint
from engine.evaluate import evaluate
from engine.run import build_loader
from models import build_model
from models.detection import ImageDetections
from models.exported import Predictor, save_program
from tasks import PredictionOptions, build_task, detection
from tasks.detection import in_stored_image
from tests.conftest import assert_close
from tests.tasks.helpers import ALONE, attached, build_trainer, read_csv, rows
from tools import export
from utils.errors import UserError
from utils.runlog import RunLog

TINY = {
    'TRAIN.TASK': 'detection', 'MODEL.TYPE': 'mask_rcnn', 'DATA.DATASET': 'detection', 'DATA.IMAGE_SIZE': 32,
    'DATA.BATCH_SIZE': 2, 'DATA.NUM_WORKERS': 0, 'MODEL.TRANS.PATCH_SIZE': 8, 'MODEL.TRANS.EMBED_DIM': 16,
    'MODEL.TRANS.DEPTH': 2, 'MODEL.TRANS.NUM_HEADS': 2, 'MODEL.TRANS.MIXER': ('windowed', 'attention'),
    'MODEL.WINDOWED.SIZE': 3, 'MODEL.DROPPATH': 0.0, 'MODEL.DET.POSITION_SIZE': 32, 'MODEL.DET.CHANNELS': 8, 'MODEL.DET.CANONICAL_SIZE': 32.0,
    'MODEL.DET.ANCHOR_SIZES': (4.0, 8.0, 12.0, 16.0, 24.0), 'MODEL.DET.BOX_CONVS': 1, 'MODEL.DET.BOX_FEATURES': 16,
    'MODEL.DET.MASK_CONVS': 1, 'MODEL.DET.RPN_PROPOSALS': (20, 10), 'MODEL.DET.ROI_SAMPLES': 16, 'MODEL.DET.MIN_SCORE': 0.0,
    'MODEL.DET.MAX_DETECTIONS': 5, 'TRAIN.RANDOM_ERASE_PROB': 0.0, 'TRAIN.NUM_ITERS': 5, 'TRAIN.WARMUP_ITERS': 1,
    'VALIDATE_ITERS': 3, 'TRAIN.LR_SCHEDULER.NAME': 'multistep', 'TRAIN.LR_SCHEDULER.MILESTONES': (4,),
    'TRAIN.LR_SCHEDULER.UPDATE': 'step', 'TRAIN.SCALE_RANGE': (0.5, 1.5),
}  # fmt: skip


def config_of(**changes):
    options = {**TINY, **{name.replace('__', '.'): value for name, value in changes.items()}}
    return get_config(opts=[item for pair in options.items() for item in pair])


@pytest.fixture(scope='module')
def squares(tmp_path_factory) -> str:
    """Six training and five validation images of different sizes, with bright rectangles of two classes."""
    root, rng = tmp_path_factory.mktemp('squares'), np.random.default_rng(0)
    os.makedirs(root / 'annotations')
    for split, count in (('train', 6), ('val', 5)):
        os.makedirs(root / 'images' / split)
        images, annotations = [], []
        for number in range(count):
            height, width = 24 + 8 * (number % 3), 40 - 6 * (number % 2)
            pixels = rng.integers(0, 60, (height, width, 3))
            for label in range(1 + number % 2):
                side = 8 + 4 * label
                left, top = int(rng.integers(width - side)), 1 + 11 * label
                pixels[top : top + side, left : left + side, label] = 255
                box = [left, top, side, side]
                corners = [left, top, left + side, top, left + side, top + side, left, top + side]
                annotations.append(
                    {
                        'id': len(annotations),
                        'image_id': number,
                        'category_id': 5 + 3 * label,
                        'bbox': box,
                        'segmentation': [corners],
                    }
                )
            images.append({'id': number, 'file_name': f'{number}.png', 'height': height, 'width': width})
            Image.fromarray(pixels.astype('uint8')).save(root / 'images' / split / f'{number}.png')
        categories = [{'id': 5, 'name': 'red'}, {'id': 8, 'name': 'green'}]
        content = {'images': images, 'annotations': annotations, 'categories': categories}
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return str(root)


def settings(squares: str, **changes):
    return config_of(**{'DATA__DATA_PATH': squares, 'MODEL__NUM_CLASSES': 2, **changes})


# ---------------------------------------------------------------------------------------------------- loss
def test_parts_of_the_loss():
    """The total is their sum, and images without objects have one too."""
    config = config_of(MODEL__NUM_CLASSES=3)
    model = build_model(config)
    model.train()
    task = attached(config, model)
    batch = task.example(2)
    assert [len(boxes) for boxes in batch.targets[BOXES]] == [2, 2] and batch.images.shape == [2, 3, 32, 32]
    batch.targets[BOXES][1] = np.zeros((0, 4), 'float32')
    batch.targets[CLASSES][1], batch.targets[MASKS][1] = np.zeros(0, 'int64'), []
    losses = task.loss(model, batch, np.random.default_rng(0))
    assert losses.parts.keys() == task.parts.keys() == {'rpn_cls', 'rpn_loc', 'cls', 'box_reg', 'mask'}
    assert losses.total.item() == pytest.approx(sum(part.item() for part in losses.parts.values()))
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if not parameter.stop_gradient)
    again = task.loss(model, batch, np.random.default_rng(0))
    assert again.total.item() == losses.total.item()


# ---------------------------------------------------------------------------------------------------- coordinates
def squarely(boxes, scores=None, classes=None) -> ImageDetections:
    """Detections whose masks fill their boxes."""
    count = len(boxes)
    scores = np.linspace(0.9, 0.6, count).astype('float32') if scores is None else scores
    classes = np.zeros(count, 'int64') if classes is None else np.asarray(classes)
    return ImageDetections(
        np.array(boxes, 'float32').reshape(-1, 4), scores, classes, np.ones((count, 28, 28), 'float32')
    )


def test_detections_in_the_stored_image(monkeypatch):
    image = paddle.zeros([3, 32, 32])
    found = squarely([[4, 2, 12, 10], [20, 8, 40, 30], [0, 0, 8, 8]])
    whole = in_stored_image(found, image, (16, 32), (40, 80))
    np.testing.assert_allclose(whole.boxes, [[10, 5, 30, 25], [50, 20, 80, 40], [0, 0, 20, 20]])
    assert whole.size == (40, 80) and whole.image.shape == [3, 16, 32]
    mask = decoded_rle(whole.masks[0])
    assert mask.shape == (40, 80) and mask[6:24, 11:29].all() and mask.sum() <= 20 * 20
    monkeypatch.setattr(detection, '_PASTED', 3300)  # one at a time
    pieces = in_stored_image(found, image, (16, 32), (40, 80))
    assert pieces.masks == whole.masks
    np.testing.assert_array_equal(pieces.boxes, whole.boxes)
    nothing = in_stored_image(squarely([]), image, (16, 32), (40, 80))
    assert nothing.boxes.shape == (0, 4) and nothing.masks == []


class Perfect(nn.Layer):
    """Detects exactly the objects of a data set, in pixels of the input."""

    num_classes = 2

    def __init__(self, dataset: DetectionDataset):
        super().__init__()
        self.dataset = dataset
        self.seen = 0

    def detect(self, images, sizes):
        results = []
        for height, width in sizes.tolist():
            objects = self.dataset.objects(self.seen)
            stored = self.dataset.sample(self.seen).image.size
            scale = np.array([width / stored[0], height / stored[1]] * 2)
            results.append(squarely(objects.boxes() * scale, classes=objects.classes))
            self.seen += 1
        return results


def test_perfect_detections_have_ap_one(squares, tmp_path):
    """From files to metrics: all coordinates agree."""
    config = settings(squares).clone()
    config.defrost()
    task = build_task(config)
    task.dataset('train')
    data = task.dataset('val')
    model, evaluator = Perfect(data), task.evaluator()
    task.attach(model, print, training=False)
    with build_loader(config, task, data, 'val', ALONE) as loader:
        result = evaluate(config, model, loader, ALONE, RunLog(str(tmp_path), 0), task, evaluator)
    assert result['box_ap'] == pytest.approx(1, abs=1e-9) and result['images'] == 5
    assert result['mask_ap50'] == pytest.approx(1) and result['mask_ap'] > 0.9
    assert [line.split()[0] for line in evaluator.details()[2:]] == ['red', 'green']
    results = json.loads(evaluator.files()['detections.json'])
    assert {entry['category_id'] for entry in results} == {5, 8} and results[0]['segmentation']['size'] == [24, 40]


# ---------------------------------------------------------------------------------------------------- runs
def test_training_and_resume(tmp_path, squares):
    """Bit for bit, with accumulation, EMA and recomputation."""
    options = {'TRAIN__ACCUM_ITER': 2, 'TRAIN__MODEL_EMA': True, 'TRAIN__RECOMPUTE': True}
    straight = build_trainer(settings(squares, SAVE_PREDICTIONS=True, **options), str(tmp_path / 'straight'))
    straight.fit()
    found = rows(straight, 'val')
    assert [row['step'] for row in found] == [3, 5] and all(0 <= row['box_ap'] <= 1 for row in found)
    assert {'box_ap50', 'mask_ap', 'mask_ar100', 'box_apl'} <= set(found[0]) and found[0]['images'] == 5
    train = rows(straight, 'train')[0]
    assert train['loss'] == pytest.approx(sum(train[name] for name in ('rpn_cls', 'rpn_loc', 'cls', 'box_reg', 'mask')))
    files = os.listdir(straight.folder)
    assert {'detections.json', 'ema_detections.json', 'detection_step0000003.png'} <= {
        *files
    } or 'detection_0002.png' in files
    classes = read_csv(straight.folder, 'classes.csv')
    assert [row['name'] for row in classes] == ['red', 'green'] and 'ema_classes.csv' in files
    assert np.mean([float(row['box_ap']) for row in classes]) == pytest.approx(found[-1]['box_ap'])
    assert [row['index'] for row in read_csv(straight.folder, 'predictions.csv')] == list('01234')
    with open(os.path.join(straight.folder, 'log.txt'), encoding='utf-8') as file:
        assert 'green  box AP' in file.read()
    cut = build_trainer(settings(squares, SAVE_STEPS=1, **options), str(tmp_path / 'cut'))
    cut.length = cut.length.__class__(cut.steps_per_epoch, 4, 3)
    cut.fit()
    again = build_trainer(settings(squares, **options), str(tmp_path / 'cut'))
    path, content = read_checkpoint(again.folder, print)
    again.snapshot.load_state_dict(content, path)
    again.fit()
    for name, value in straight.model.state_dict().items():
        np.testing.assert_array_equal(again.model.state_dict()[name].numpy(), value.numpy())


def test_predictions(tmp_path, squares):
    config = settings(squares, VAL__SHOW_SCORE=0.0)
    task, model = build_task(config), build_model(config)
    model.eval()
    (tmp_path / 'broken.png').write_bytes(b'')
    paths = [os.path.join(squares, 'images', 'val', '1.png'), str(tmp_path / 'broken.png')]
    options = PredictionOptions(topk=2)
    columns = task.prediction_columns(options)
    assert columns[:7] == ('class1', 'name1', 'score1', 'left1', 'top1', 'width1', 'height1') and len(columns) == 14
    first, broken = predict_files(config, task, model, paths, options)
    assert broken.error == 'the file is empty'
    row = json.loads(json.dumps(first.prediction.row))
    assert (row['height'], row['width']) == (32, 34) and 1 <= len(row['objects']) <= 5
    for found in row['objects']:
        assert found['name'] == ('red', 'green')[found['class']] and 0 <= found['score'] <= 1
        assert found['segmentation']['size'] == [32, 34] and min(found['bbox'][2:]) > 0
    assert len(first.prediction.cells) == 14 and first.prediction.text.startswith(row['objects'][0]['name'])
    picture = first.prediction.pictures['objects']
    assert (picture.mode, picture.size) == ('RGB', (34, 32))
    model.min_score = 0.999
    (none, _) = predict_files(config, task, model, paths, options)
    assert none.prediction.text == 'nothing' and none.prediction.cells == ('',) * 14
    named = PredictionOptions(1, ['a', 'b'])
    model.min_score = 0.0
    (renamed, _) = predict_files(config, task, model, paths, named)
    assert renamed.prediction.row['objects'][0]['name'] in ('a', 'b')


def test_validation_and_prediction_see_the_same(squares):
    """A file gets the objects that its evaluation has."""
    config = settings(squares).clone()
    config.defrost()
    task, model = build_task(config), build_model(config)
    data = task.dataset('val')
    model.eval()
    with build_dataloader(config, data, False, transform=task.transform(False)) as loader:
        batch = to_device(next(iter(loader.epoch(0))), config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    evaluated = task.infer(model, batch)
    paths = [data.describe(index) for index in range(2)]
    for found, file in zip(evaluated, predict_files(config, task, model, paths, PredictionOptions())):
        scores = [entry['score'] for entry in file.prediction.row['objects']]
        np.testing.assert_allclose(scores, found.scores, rtol=1e-4)
        assert [entry['segmentation'] for entry in file.prediction.row['objects']] == found.masks


# ---------------------------------------------------------------------------------------------------- programs
def test_exported_program(tmp_path):
    """Boxes, scores, classes and masks equal those of the model, for batches of 1 and 3."""
    config = config_of(MODEL__NUM_CLASSES=2)
    task, model = build_task(config), build_model(config)
    assert [model.min_score for _ in task.exports(model)] == [0.0, 0.0]
    model.eval()
    save_program(model, [3, 32, 32], str(tmp_path / 'net'), task.program_inputs(1))
    predictor = Predictor(str(tmp_path / 'net'))
    for size in (1, 3):
        images, more = (
            np.random.default_rng(size).standard_normal((size, 3, 32, 32), 'float32'),
            task.program_inputs(size),
        )
        found, expected = predictor(images, **more), export.outputs_of(model, images, more)
        assert [array.shape for array in found] == [(size, 5, 4), (size, 5), (size, 5), (size, 5, 28, 28), (size,)]
        for one, other in zip(found, expected):
            assert_close(one, other, 1e-5)
        assert task.program_difference(found, expected) < 1e-6


def test_differences_of_programs():
    """A wrong box, score, class, mask or count shows; order, and a tenth of the detections, do not count."""
    task, rng = build_task(config_of(MODEL__NUM_CLASSES=9)), np.random.default_rng(0)
    expected = (
        rng.uniform(0, 32, (2, 10, 4)).astype('float32'), rng.random((2, 10), 'float32'), rng.integers(9, size=(2, 10)),
        rng.random((2, 10, 28, 28), 'float32'), np.array([10, 8]),
    )  # fmt: skip
    assert task.program_difference(expected, expected) == 0
    order = rng.permutation(8)
    shuffled = tuple(output.copy() for output in expected)
    for output, original in zip(shuffled[:4], expected):
        output[1, :8] = original[1, order]
    assert task.program_difference(shuffled, expected) == 0
    for number, change in ((0, 0.32), (1, 0.01), (3, 0.01)):
        changed = tuple(output + change if place == number else output for place, output in enumerate(expected))
        assert task.program_difference(changed, expected) == pytest.approx(0.01, rel=1e-3)
    changed = tuple(output + 9 if place == 2 else output for place, output in enumerate(expected))
    assert task.program_difference(changed, expected) == 1
    assert task.program_difference((*expected[:4], np.array([10, 5])), expected) == 1
    one = tuple(output.copy() for output in expected)
    one[1][0, 3] = 0
    assert task.program_difference(one, expected) == 0
    nothing = (*expected[:4], np.zeros(2, 'int64'))
    assert task.program_difference(nothing, nothing) == 0


def test_scores_do_not_matter_when_programs_are_compared():
    config = config_of(MODEL__NUM_CLASSES=2, MODEL__DET__MIN_SCORE=0.3)
    task, model = build_task(config), build_model(config)
    assert [model.min_score for _ in task.exports(model)] == [0.0, 0.3]
    assert list(task.program_inputs(2)) == ['sizes'] and task.program_inputs(2)['sizes'].shape == (2, 2)
    spec = export.describe(config, 2, task)
    assert spec['outputs'] == ['boxes', 'scores', 'classes', 'masks', 'counts'] and spec['resize_long'] == 32
    assert spec['input_sizes'] == {'name': 'sizes', 'dtype': 'int32', 'shape': [None, 2]}


# ---------------------------------------------------------------------------------------------------- mistakes
def test_wrong_settings(squares, tmp_path):
    with pytest.raises(UserError, match='no random erasing'):
        build_task(config_of(TRAIN__RANDOM_ERASE_PROB=0.5))
    with pytest.raises(UserError, match='needs a detector, such as MODEL.TYPE mask_rcnn'):
        build_task(config_of()).attach(nn.Linear(1, 1), print, True)
    with pytest.raises(UserError, match='DATA.DATASET digits does not have the targets of TRAIN.TASK detection'):
        build_task(config_of(DATA__DATASET='digits').clone()).dataset('train')
    with pytest.raises(UserError, match='MODEL.NUM_CLASSES is 3, but .* has 2 classes'):
        build_task(settings(squares, MODEL__NUM_CLASSES=3)).dataset('train')
    with open(os.path.join(squares, 'annotations', 'instances_val.json'), encoding='utf-8') as file:
        content = json.load(file)
    content['categories'][0]['name'] = 'crimson'
    (tmp_path / 'val.json').write_text(json.dumps(content))
    files = ('annotations/instances_train.json', str(tmp_path / 'val.json'))
    task = build_task(settings(squares, DATA__ANNOTATION_FILES=files).clone())
    task.config.defrost()
    task.dataset('train')
    with pytest.raises(UserError, match='has other categories than the annotations of the other split'):
        task.dataset('val')
