# SPDX-License-Identifier: Apache-2.0
"""A training step on a GPU does not let the host wait for the device: every way to read or to write a tensor is counted."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import paddle
import pytest

import utils.device
from config import get_config
from datasets.batch import on_device, to_device
from datasets.loader import Batch
from engine.evaluate import evaluate
from engine.waits import count_waits
from models import paddle_private
from tasks import segmentation_metrics
from tests.engine import curves
from tests.engine.gpu import GPU, Float32Passes, Stream, gpu  # noqa: F401
from tests.engine.test_curves import GMLP, RECIPES
from tests.tasks.helpers import build_trainer
from tests.tasks.test_detection import TINY, squares  # noqa: F401
from tests.tasks.test_segmentation import TINY as SEGMENTATION
from tests.tasks.test_segmentation import pairs  # noqa: F401
from utils.device import Copies, Download, upload

QUIET = {'REPORT_FREQ': 10**6, 'TRAIN.NUM_EPOCHS': 1, 'TRAIN.WARMUP_EPOCHS': 0, 'MODEL.LAMBDA.DECAY_EPOCHS': None}


@pytest.fixture
def waits(gpu, monkeypatch):  # noqa: F811
    """The list of waits of a test; all tensors count as those of a GPU, but for those in pinned memory."""
    pinned = []

    def pin(tensor, blocking):
        assert not blocking
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(paddle.Tensor, 'pin_memory', pin)
    with count_waits(lambda tensor: not any(tensor is other for other in pinned)) as found:
        yield found


def waits_of_steps(run, waits) -> list[list[str]]:
    """The waits of each step of the first epoch but the first and the last, which are reported."""
    step, begins = run._step, []

    def counted(*args):
        begins.append(len(waits))
        return step(*args)

    run._step = counted
    run.fit()
    begins = begins[1 : run.steps_per_epoch]
    return [waits[begin:end] for begin, end in zip(begins, begins[1:])]


def waits_of_batches(run, waits) -> list[list[str]]:
    """The waits of each batch of an evaluation but the first two, with a report, and the last."""
    begins, process = [], run.evaluator.process
    run.evaluator.process = lambda *args: (process(*args), begins.append(len(waits)))
    with run.val_loader:
        evaluate(run.config, run.model, run.val_loader, run.context, run.log, run.task, run.evaluator)
    return [waits[begin:end] for begin, end in zip(begins[1:], begins[2:-1])]


def trainer_of(recipe: dict, images: str, folder: str, **options):
    """A trainer of a recipe of tests/engine/test_curves.py with the context of a GPU."""
    recipe = {**curves.COMMON, **recipe, **QUIET, 'DATA.DATA_PATH': images, 'DATA.BATCH_SIZE': 6, **options}
    if 'teacher' in recipe:
        names = ('TRAIN.TEACHER_CFG', 'TRAIN.TEACHER_MODEL')
        recipe.update(zip(names, curves._random_model(recipe.pop('teacher'), os.path.join(folder, 'teacher'))))
    recipe.pop('encoder', None)
    if not recipe.get('MODEL.LAMBDA.PRUNE_LAYERS') or recipe.get('MODEL.LAMBDA.REMOVED'):
        del recipe['MODEL.LAMBDA.DECAY_EPOCHS']
    else:
        recipe['TRAIN.NUM_EPOCHS'] = 2
    return build_trainer(curves._config(recipe), os.path.join(folder, 'run'), context=GPU)


@pytest.mark.parametrize('name', ['gmlp', *RECIPES])
def test_no_step_waits(waits, images, tmp_path, name):
    run = trainer_of({'gmlp': GMLP, **RECIPES}[name], images, str(tmp_path))
    found = waits_of_steps(run, waits)
    assert len(found) >= 2 and not any(found), found


@pytest.mark.parametrize('optimizer', ['SGD', 'LARS', 'Lamb'])
def test_no_step_of_another_optimizer_waits(waits, images, tmp_path, optimizer):
    options = {'TRAIN.OPTIMIZER.NAME': optimizer, 'TRAIN.GRAD_CLIP': 1.0, 'TRAIN.MODEL_EMA': True}
    found = waits_of_steps(trainer_of(RECIPES['augmented'], images, str(tmp_path), **options), waits)
    assert len(found) >= 2 and not any(found), found


def test_a_step_in_float16_waits_once(waits, images, tmp_path):
    """GradScaler reads whether gradients have overflowed."""
    found = waits_of_steps(trainer_of(RECIPES['augmented'], images, str(tmp_path), AMP=True), waits)
    assert len(found) >= 2 and all(step == ['__bool__'] for step in found), found


@pytest.mark.parametrize('level', ['O1', 'O2'])
def test_clipped_sums_in_float16_read_nothing_more(waits, images, tmp_path, level):
    """TRAIN.ACCUM_MODE ms_mlp clips after each of three micro-batches, whose gradients contain the loss scaling."""
    options = {'AMP': True, 'AMP_LEVEL': level, 'TRAIN.ACCUM_MODE': 'ms_mlp', 'TRAIN.GRAD_CLIP': 1e-3}
    run = trainer_of(RECIPES['augmented'], images, str(tmp_path), **options)
    run.task = Float32Passes(run.config)
    sums, clip = [], run.updater.clip_sum
    run.updater.clip_sum = lambda *args: sums.append(clip(*args))
    found = waits_of_steps(run, waits)
    assert len(sums) >= 2 * len(found) >= 4 and all(step == ['__bool__'] for step in found), found


def test_a_step_with_half_weights_does_not_wait(waits, images, tmp_path):
    """AMP_LEVEL O2: gradients are added to those of the float32 copies, over two micro-batches."""
    options = {'AMP': True, 'AMP_LEVEL': 'O2', 'AMP_DTYPE': 'bfloat16', 'TRAIN.ACCUM_ITER': 2}
    run = trainer_of(RECIPES['augmented'], images, str(tmp_path), **options)
    run.task = Float32Passes(run.config)
    found = waits_of_steps(run, waits)
    assert run.weights.has_copies and len(found) >= 2 and not any(found), found


UPERNET = {'MODEL.TYPE': 'upernet', 'MODEL.UPERNET.OUT_INDICES': (0, 1, 2, 3), 'MODEL.UPERNET.CHANNELS': 8}


@pytest.mark.parametrize(
    'model',
    [{}, {'MODEL.SEGMENTER.DECODER': 'mask'}, {**UPERNET, 'MODEL.TRANS.DEPTH': 4}],
    ids=['linear', 'mask', 'upernet'],
)
def test_no_step_of_a_segmentation_waits(waits, pairs, tmp_path, model):  # noqa: F811
    options = {
        **SEGMENTATION, 'DATA.DATA_PATH': pairs, 'DATA.DATASET': 'segmentation', 'MODEL.NUM_CLASSES': 2,
        'DATA.BATCH_SIZE': 2, 'REPORT_FREQ': 10**6, 'TRAIN.NUM_ITERS': 6, 'VALIDATE_ITERS': 6, **model,
    }  # fmt: skip
    if options['MODEL.TYPE'] != 'segmenter':
        del options['MODEL.SEGMENTER.DECODER']
    config = get_config(opts=[part for pair in options.items() for part in pair])
    found = waits_of_steps(build_trainer(config, str(tmp_path / 'run'), context=GPU), waits)
    assert len(found) >= 3 and not any(found), found


@pytest.mark.parametrize('slide', [False, True])
def test_no_batch_of_an_evaluation_of_segmentation_waits(waits, pairs, tmp_path, monkeypatch, slide):  # noqa: F811
    """But for the first images, which are kept for the picture; with windows, scales and flips."""
    monkeypatch.setattr(segmentation_metrics, 'SHOWN', 0)
    options = {
        **SEGMENTATION, 'DATA.DATA_PATH': pairs, 'DATA.DATASET': 'segmentation', 'MODEL.NUM_CLASSES': 2,
        'DATA.BATCH_SIZE_EVAL': 1, 'REPORT_FREQ': 10**6, 'VAL.IS_SLIDE': slide, 'VAL.STRIDE_SIZE': (8, 8),
        'VAL.SCALE_RATIOS': (1.0, 1.5), 'VAL.FLIP': True,
    }  # fmt: skip
    config = get_config(opts=[part for pair in options.items() for part in pair])
    found = waits_of_batches(build_trainer(config, str(tmp_path / 'run'), context=GPU), waits)
    assert len(found) >= 2 and not any(found), found


@pytest.mark.parametrize('name', ['gmlp', 'tome', 'stacked', 'rpe_finetuning', 'mae', 'mocov3'])
def test_no_batch_of_another_evaluation_waits(waits, images, tmp_path, name):
    """Of classifiers, of reconstructions, and of the kNN probe of MoCo v3."""
    run = trainer_of({'gmlp': GMLP, **RECIPES}[name], images, str(tmp_path), **{'DATA.BATCH_SIZE_EVAL': 2})
    found = waits_of_batches(run, waits)
    assert len(found) >= 3 and not any(found), found


@pytest.mark.parametrize(('size', 'steps'), [(1, 4), (2, 1)])
def test_a_step_of_a_detector_waits_once(waits, squares, tmp_path, size, steps):  # noqa: F811
    """It reads the sampled regions of all images."""
    options = {
        **TINY, 'DATA.DATA_PATH': squares, 'MODEL.NUM_CLASSES': 2, 'DATA.BATCH_SIZE': size, 'REPORT_FREQ': 10**6,
        'TRAIN.NUM_ITERS': 8, 'VALIDATE_ITERS': 8,
    }  # fmt: skip
    config = get_config(opts=[part for pair in options.items() for part in pair])
    found = waits_of_steps(build_trainer(config, str(tmp_path / 'run'), context=GPU), waits)
    assert len(found) == steps and all(step == ['numpy'] for step in found), found


@pytest.mark.parametrize('size', [1, 2])
def test_a_batch_of_an_evaluation_of_a_detector_waits_for_its_choices(waits, squares, tmp_path, size):  # noqa: F811
    """For two suppressions and the candidates of each image, the chosen ones, and the levels of two ROIAligns."""
    options = {
        **TINY, 'DATA.DATA_PATH': squares, 'MODEL.NUM_CLASSES': 2, 'DATA.BATCH_SIZE_EVAL': size, 'REPORT_FREQ': 10**6,
        'MODEL.DET.MIN_SCORE': 0.0, 'MODEL.DET.NMS': 0.9,
    }  # fmt: skip
    config = get_config(opts=[part for pair in options.items() for part in pair])
    run = build_trainer(config, str(tmp_path / 'run'), context=GPU)
    found, infer = [], run.task.infer

    def counted(*args):
        begin, outputs = len(waits), infer(*args)
        found.append(Counter(waits[begin:]))
        return outputs

    run.task.infer = counted
    with run.val_loader:
        evaluate(run.config, run.model, run.val_loader, run.context, run.log, run.task, run.evaluator)
    assert found[1] == {'nms': 2 * size, 'nonzero': 1 + size, 'numpy': 2}


def test_waits_are_counted(waits):
    tensor, maps, boxes = paddle.ones([2]), paddle.ones([1, 1, 4, 4]), paddle.ones([1, 4])
    for read in (
        tensor.numpy,
        tensor.tolist,
        tensor.sum().item,
        lambda: bool(tensor.sum()),
        lambda: np.asarray(tensor),
        lambda: paddle.nonzero(tensor),
        lambda: tensor[tensor > 0],
        lambda: paddle.vision.ops.roi_align(maps, boxes, paddle.ones([1], 'int32'), 2),
        lambda: paddle_private.roi_align(maps, boxes, [1], (2, 2), 1.0),  # does not wait
        lambda: paddle.to_tensor([1.0]),
        lambda: tensor.set_value(np.zeros(2, 'float32')),
    ):
        read()
    tensor.grad = tensor
    assert tensor.grad[:1].shape == [1]
    assert waits == [
        'numpy', 'tolist', 'item', '__bool__', '__array__', 'nonzero', '__getitem__', 'roi_align', 'to_tensor', 'set_value', 'grad',
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- copies
def test_arrays_and_tensors_may_change_after_their_copy_was_queued(gpu):  # noqa: F811
    array = np.arange(3.0)
    tensor = upload(array)
    array[:] = 7
    assert tensor.tolist() == [0, 1, 2]
    download = Download(tensor)
    tensor.add_(paddle.ones([3], 'float64'))
    assert download.numpy().tolist() == [0, 1, 2]


def test_pinned_memory_is_kept_until_the_device_has_read_it(gpu):  # noqa: F811
    for number in range(5):
        upload(np.full(2, number))
        kept = [pinned.tolist()[0] for _, (pinned,) in utils.device._pinned._in_flight]
        assert kept == list(range(max(0, number - 2), number + 1))


def test_copies_run_beside_the_computation(gpu):  # noqa: F811
    """A batch is copied once memory for it was allocated and before the step of the batch before it; no step waits for more."""
    batches = [Batch(np.full((2, 3, 3, 1), number, 'uint8'), {}, np.arange(2)) for number in range(3)]
    statistics = [0.0], [1 / 255]
    to_device(batches[0], *statistics)  # uploads the constants of the normalization
    Stream.log.clear()
    ahead = on_device(iter(batches), *statistics)
    copied, used = ['record in computation', 'copies wait', 'copy', 'record in copies'], ['computation waits']
    for number, expected in enumerate((copied + copied + used, copied + used, used)):
        batch = next(ahead)
        assert Stream.log == expected
        assert (batch.images.numpy() == number).all()
        Stream.log.clear()
    assert next(ahead, None) is None


def test_memory_of_a_dropped_batch_is_kept_until_it_was_copied(gpu):  # noqa: F811
    copies = [Copies({'images': np.full(3, number)}) for number in range(3)]
    del copies[1]
    assert copies[1].tensors()['images'].tolist() == [2, 2, 2]  # runs the copy of the dropped one
    assert copies[0].tensors()['images'].tolist() == [0, 0, 0]
    upload(np.zeros(1))
    assert len(utils.device._pinned._in_flight) == 1


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_ahead_are_equal(images, tmp_path, workers, request):
    """Borrowed memory is read before a worker writes it again, and batches keep their order."""
    run = build_trainer(
        curves._config({
            **curves.COMMON, **GMLP, 'DATA.DATA_PATH': images, 'TRAIN.RANDOM_ERASE_PROB': 0.5, 'DATA.NUM_WORKERS': workers,
            'DATA.PREFETCH': 1,
        }),
        str(tmp_path),
    )  # fmt: skip
    statistics = run.config.DATA.IMAGENET_MEAN, run.config.DATA.IMAGENET_STD
    with run.train_loader as loader:
        expected = [to_device(batch, *statistics) for batch in loader.epoch(1)]
        borrowed = list(on_device(loader.epoch(1, borrow=True), *statistics))
        request.getfixturevalue('gpu')
        ahead = list(on_device(loader.epoch(1, borrow=True), *statistics))
    assert len(expected) == len(borrowed) == len(ahead) > 3
    for other in (borrowed, ahead):
        for one, two in zip(expected, other):
            np.testing.assert_array_equal(one.images.numpy(), two.images.numpy())
            np.testing.assert_array_equal(one.targets['label'].numpy(), two.targets['label'].numpy())
            np.testing.assert_array_equal(one.indices, two.indices)


@pytest.mark.parametrize('erased', [False, True])
def test_batches_of_both_devices_are_equal(images, tmp_path, monkeypatch, request, erased):
    run = build_trainer(
        curves._config({**curves.COMMON, **GMLP, 'DATA.DATA_PATH': images, 'TRAIN.RANDOM_ERASE_PROB': float(erased)}),
        str(tmp_path),
    )
    batch = next(run.train_loader.epoch(1))
    statistics = run.config.DATA.IMAGENET_MEAN, run.config.DATA.IMAGENET_STD
    here = to_device(batch, *statistics)
    request.getfixturevalue('gpu')
    there = to_device(batch, *statistics)
    np.testing.assert_array_equal(here.images.numpy(), there.images.numpy())
    np.testing.assert_array_equal(here.targets['label'].numpy(), there.targets['label'].numpy())
