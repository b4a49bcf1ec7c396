# SPDX-License-Identifier: Apache-2.0
"""The loop itself, in this process: what a step is, what stops it, what it leaves."""

import errno
import itertools
import json
import os

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

import engine.train
from config import get_config
from datasets.batch import to_device
from engine.checkpoint import to_arrays
from engine.evaluate import evaluate
from engine.optim import clip_gradients
from models import build_model
from tasks.classification import ClassificationTask
from tests.conftest import assert_close
from tests.tasks.helpers import ALONE, build_trainer, rows
from utils.errors import UserError
from utils.files import writing
from utils.formats import read_file

# Nothing random but the order of the images: steps can be compared between recipes.
PLAIN = {
    'DATA.DATASET': 'folder', 'DATA.IMAGE_SIZE': 16, 'DATA.BATCH_SIZE': 8, 'DATA.NUM_WORKERS': 0, 'DATA.CROP_PCT': 1.0,
    'MODEL.TYPE': 'gmlp', 'MODEL.NUM_CLASSES': 3, 'MODEL.DROPPATH': 0.0, 'MODEL.MIXER.PATCH_SIZE': 4,
    'MODEL.MIXER.EMBED_DIM': 16, 'MODEL.MIXER.DEPTH': 2, 'MODEL.MIXER.MLP_RATIO': 2, 'TRAIN.NUM_EPOCHS': 1,
    'TRAIN.WARMUP_EPOCHS': 0, 'TRAIN.LR_SCHEDULER.NAME': 'constant', 'TRAIN.BASE_LR': 0.01, 'TRAIN.LINEAR_SCALED_LR': None, 'TRAIN.CROP_SCALE': (1.0, 1.0),
    'TRAIN.CROP_RATIO': (1.0, 1.0), 'TRAIN.HFLIP': 0.0, 'TRAIN.RAND_AUGMENT': False, 'TRAIN.COLOR_JITTER': 0.0,
    'TRAIN.RANDOM_ERASE_PROB': 0.0, 'TRAIN.MIXUP_ALPHA': 0.0, 'TRAIN.CUTMIX_ALPHA': 0.0,
}  # fmt: skip


def make_trainer(folder, images, task=None, context=ALONE, **changes):
    """A trainer on the plain recipe with changes."""
    changed = {name.replace('__', '.'): value for name, value in changes.items()}
    options = {**PLAIN, 'DATA.DATA_PATH': images, **changed}
    config = get_config(opts=[item for pair in options.items() for item in pair])
    paddle.seed(0)
    model = build_model(config)
    rng = np.random.default_rng(0)
    for parameter in model.parameters():  # away from the zero head, where every gradient below it is zero
        parameter.set_value(parameter + paddle.to_tensor(rng.normal(0, 0.05, parameter.shape).astype('float32')))
    os.makedirs(folder, exist_ok=True)
    return build_trainer(config, folder, task and task(config), model, context)


@pytest.fixture
def trainer(tmp_path, images):
    """Makes trainers, each in a folder of its own unless one is named."""
    numbers = itertools.count()
    return lambda task=None, folder=None, **changes: make_trainer(
        folder or str(tmp_path / f'run{next(numbers)}'), images, task, **changes
    )


def weights(trainer):
    return {name: value.numpy() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize('clip', [None, 0.1])
def test_accumulation_equals_the_large_batch(trainer, clip):
    """75 images: three steps of 24 and a leftover of 3, which 8-image micro-batches reach in 1 + 0 + 0."""
    large = trainer(DATA__BATCH_SIZE=24, TRAIN__GRAD_CLIP=clip, TRAIN__OPTIMIZER__NAME='SGD')
    large.fit()
    small = trainer(DATA__BATCH_SIZE=8, TRAIN__ACCUM_ITER=3, TRAIN__GRAD_CLIP=clip, TRAIN__OPTIMIZER__NAME='SGD')
    small.fit()
    assert small.state.step == large.state.step == 4
    for name, value in weights(large).items():
        assert_close(weights(small)[name], value, 1e-6)
    assert rows(small, 'train')[0]['images'] == 75
    assert rows(small, 'train')[0]['loss'] == pytest.approx(rows(large, 'train')[0]['loss'], rel=1e-5)


def test_accumulation_of_ms_mlp(trainer):
    """Its loop by hand: the sum of gradients is clipped after each micro-batch; the tenth one fills no step."""
    changes = {'TRAIN__ACCUM_ITER': 3, 'TRAIN__GRAD_CLIP': 0.1, 'TRAIN__OPTIMIZER__NAME': 'SGD'}
    run, hand, exact = trainer(TRAIN__ACCUM_MODE='ms_mlp', **changes), trainer(**changes), trainer(**changes)
    run.fit()
    exact.fit()
    hand.model.train()
    hand.optimizer.set_lr(0.01)
    for index, batch in enumerate(hand.train_loader.epoch(1), 1):
        (hand.task.loss(hand.model, to_device(batch, [0.5] * 3, [0.5] * 3), None).total / 3).backward()
        clip_gradients(hand.model.parameters(), 0.1)
        if index % 3 == 0:
            hand.optimizer.step()
            hand.optimizer.clear_grad()
    assert (index, run.state.step, rows(run, 'train')[0]['images']) == (10, 3, 72)
    for name, value in weights(hand).items():
        assert_close(weights(run)[name], value, 1e-6)
    assert max(np.abs(weights(exact)[name] - value).max() for name, value in weights(hand).items()) > 1e-4
    with pytest.raises(UserError, match='ACCUM_ITER is 11, but an epoch has 10 micro-batches'):
        trainer(TRAIN__ACCUM_MODE='ms_mlp', TRAIN__ACCUM_ITER=11)


def test_the_epochs_loss_is_the_mean_over_images(trainer):
    """With a learning rate of zero every image is judged by the same weights."""
    still = trainer(TRAIN__BASE_LR=0.0, TRAIN__WARMUP_START_LR=0.0, TRAIN__END_LR=0.0, TRAIN__SMOOTHING=0.0)
    losses, hits = [], 0
    still.model.eval()
    for batch in still.train_loader.epoch(1):
        batch = to_device(batch, still.config.DATA.IMAGENET_MEAN, still.config.DATA.IMAGENET_STD)
        logits, labels = still.model(batch.images), batch.targets['label']
        losses += F.cross_entropy(logits, labels, reduction='none').numpy().tolist()
        hits += (logits.argmax(-1) == labels).sum().item()
    still.fit()
    row = rows(still, 'train')[0]
    assert len(losses) == row['images'] == 75
    assert row['loss'] == pytest.approx(np.mean(losses), rel=1e-5)
    assert row['acc1'] == pytest.approx(hits / 75)


class Poisoned(ClassificationTask):
    """Classification whose loss or gradient goes wrong at one micro-batch."""

    def __init__(self, config, kind, at):
        super().__init__(config)
        self.kind = kind
        self.left = at

    def loss(self, model, batch, rng):
        losses = super().loss(model, batch, rng)
        self.left -= 1
        if self.left:
            return losses
        if self.kind == 'gradient':  # finite value, infinite slope
            parameter = next(iter(model.parameters()))
            return losses._replace(total=losses.total + paddle.sqrt((parameter * 0.0).square().sum()))
        return losses._replace(total=losses.total * float(self.kind))


@pytest.mark.parametrize('kind', ['nan', 'inf', 'gradient'])
def test_not_finite_ends_the_run_before_the_update(trainer, kind):
    run = trainer(SAVE_STEPS=1, REPORT_FREQ=1000)
    run.task = Poisoned(run.config, kind, at=4)
    with pytest.raises(UserError, match=r'not finite at step 4 \(epoch 1, lr 0\.01\).*NONFINITE'):
        run.fit()
    saved = read_file(os.path.join(run.folder, 'last.pdparams'))
    assert saved['step'] == 3
    for name, value in weights(run).items():  # untouched since the last good step, in memory and on disk
        np.testing.assert_array_equal(value, saved['model'][name])


@pytest.mark.parametrize('kind', ['nan', 'gradient'])
def test_not_finite_steps_can_be_skipped(trainer, kind):
    run = trainer(TRAIN__NONFINITE='skip')
    run.task = Poisoned(run.config, kind, at=4)
    run.fit()
    assert all(np.isfinite(value).all() for value in weights(run).values())
    row = rows(run, 'train')[0]
    assert (row['skipped'], row['images']) == (8, 67)
    assert np.isfinite(row['loss'])


def test_the_average_is_validated_and_best_is_the_best_of_both(trainer):
    run = trainer(TRAIN__MODEL_EMA=True, TRAIN__MODEL_EMA_DECAY=1 - 1e-12, TRAIN__NUM_EPOCHS=2, TRAIN__BASE_LR=0.05)
    start = weights(run)
    run.fit()
    assert [row['epoch'] for row in rows(run, 'val_ema')] == [1, 2]
    assert len({row['loss'] for row in rows(run, 'val_ema')}) == 1  # such a decay keeps the first weights
    for name, value in run.ema.state_dict().items():
        np.testing.assert_allclose(value.numpy(), start[name], atol=1e-9)
    best = max(row['acc1'] for kind in ('val', 'val_ema') for row in rows(run, kind))
    assert run.state.best == best
    assert os.path.exists(os.path.join(run.folder, 'best.pdparams'))


def test_best_weights_load_with_plain_paddle(trainer):
    run = trainer()
    run.fit()
    state = paddle.load(os.path.join(run.folder, 'best.pdparams'))
    for name, value in weights(run).items():
        np.testing.assert_array_equal(state[name].numpy(), value)


def test_paddlevit_checkpoints_are_resumed(trainer, tmp_path):
    """Its files: nested dict, whole epochs, moments under automatic names."""
    first = trainer(TRAIN__NUM_EPOCHS=2)
    train_epoch = first._train_epoch

    def first_epoch_only(epoch):
        train_epoch(epoch)
        first.state.epoch = 2

    first._train_epoch = first_epoch_only
    first.fit()
    theirs = {
        'model': first.model.state_dict(),
        'optimizer': {k: v for k, v in first.optimizer.state_dict().items() if k != 'LR_Scheduler'},
        'epoch': 1,
        'lr_scheduler': {},
    }
    path = str(tmp_path / 'Epoch-1-Loss-1.0986')
    paddle.save(theirs, path + '.pdparams')
    run = trainer(TRAIN__NUM_EPOCHS=2)
    run.snapshot.load_state_dict(read_file(path + '.pdparams'), path)
    assert (run.state.epoch, run.state.step) == (1, 10)
    run.fit()
    straight = trainer(TRAIN__NUM_EPOCHS=2)
    straight.fit()
    for name, value in weights(straight).items():
        np.testing.assert_array_equal(weights(run)[name], value)


def test_flat_weights_take_the_epoch_from_the_flag(trainer):
    run = trainer(TRAIN__LAST_EPOCH=1, TRAIN__NUM_EPOCHS=1)
    run.snapshot.load_state_dict(weights(run), 'flat.pdparams')
    assert run.state.epoch == 1


# ---------------------------------------------------------------------------------------------------- what is left
TWO_EPOCHS = {'TRAIN__NUM_EPOCHS': 2, 'TRAIN__MODEL_EMA': True, 'TRAIN__MODEL_EMA_DECAY': 0.9, 'SAVE_FREQ': 1}


def outcome(trainer):
    """Rows without times, position, and every saved weight and moment."""
    with open(os.path.join(trainer.folder, 'metrics.jsonl'), encoding='utf-8') as file:
        table = [json.loads(line) for line in file]
    for row in table:
        del row['seconds'], row['images_per_second']
    files = {name: read_file(os.path.join(trainer.folder, f'{name}.pdparams')) for name in ('last', 'best')}
    files['epochs'] = [read_file(os.path.join(trainer.folder, f'epoch_{n:04d}.pdparams')) for n in (1, 2)]
    return {'rows': table, 'state': trainer.state, **files}


def assert_equal(left, right):
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for pair in zip(left, right):
            assert_equal(*pair)
    else:
        np.testing.assert_array_equal(left, right)


def disk_full(path):
    with writing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope='module')
def straight(tmp_path_factory, images):
    """The outcome of a run without failures."""
    run = make_trainer(str(tmp_path_factory.mktemp('straight')), images, **TWO_EPOCHS)
    run.fit()
    return outcome(run)


@pytest.mark.parametrize('at', [1, 2], ids=['model', 'average'])
def test_a_validation_that_fails_loses_nothing(trainer, straight, monkeypatch, at):
    """It is done again after a resume, which then equals the run that did not fail."""
    calls = iter(range(1, 100))

    def damaged(*args, **options):
        if next(calls) == at:
            raise UserError('the image is damaged.')
        return evaluate(*args, **options)

    monkeypatch.setattr(engine.train, 'evaluate', damaged)
    cut = trainer(**TWO_EPOCHS)
    with pytest.raises(UserError, match='the image is damaged'):
        cut.fit()
    saved = read_file(os.path.join(cut.folder, 'last.pdparams'))
    assert (saved['epoch'], saved['progress']['validated']) == (1, False)
    resumed = trainer(folder=cut.folder, **TWO_EPOCHS)
    resumed.snapshot.load_state_dict(saved, 'last.pdparams')
    resumed.fit()
    assert_equal(outcome(resumed), straight)


@pytest.mark.parametrize('kind', ['log line', 'train', 'val', 'scalar'])
def test_a_full_disk_after_an_epoch_loses_nothing(trainer, straight, monkeypatch, kind):
    cut = trainer(**TWO_EPOCHS)
    with monkeypatch.context() as patch:
        append, master, scalars = cut.reporter.metrics.append, cut.log.master, cut.reporter._scalars
        patch.setattr(
            cut.reporter.metrics, 'append', lambda row: disk_full('m') if row['kind'] == kind else append(row)
        )
        if kind == 'scalar':
            patch.setattr(cut.reporter, '_scalars', lambda *a: disk_full('m') if a[0] == 'train_epoch' else scalars(*a))
        if kind == 'log line':
            patch.setattr(cut.log, 'master', lambda line: disk_full('m') if 'Train Loss' in line else master(line))
        with pytest.raises(UserError, match="cannot write 'm': No space left on device; free space"):
            cut.fit()
    resumed = trainer(folder=cut.folder, **TWO_EPOCHS)
    saved = read_file(os.path.join(cut.folder, 'last.pdparams'))
    assert (saved['epoch'], saved['progress']['validated']) == (1, False)
    resumed.snapshot.load_state_dict(saved, 'last.pdparams')
    resumed.fit()
    assert_equal(outcome(resumed), straight)


def log_of(trainer):
    with open(os.path.join(trainer.folder, 'log.txt'), encoding='utf-8') as file:
        return file.read()


def test_a_finished_run_says_so(trainer):
    first = trainer()
    first.fit()
    state = read_file(os.path.join(first.folder, 'last.pdparams'))
    again = trainer(folder=first.folder)
    again.snapshot.load_state_dict(state, 'last.pdparams')
    files = sorted(os.listdir(os.path.join(first.folder, 'vdl')))
    again.fit()
    said = log_of(again).splitlines()[-1]
    assert 'Finished already: epoch 1 of 1 is done' in said
    assert 'set TRAIN.NUM_EPOCHS to more than 1' in said
    assert f'Acc@1: {first.state.best:.4f} after epoch 1, weights in {first.folder}/best.pdparams' in said
    assert sorted(os.listdir(os.path.join(first.folder, 'vdl'))) == files
    elsewhere = trainer()
    elsewhere.snapshot.load_state_dict(state, 'last.pdparams')
    elsewhere.fit()
    assert 'weights in the folder of the run that this one continues' in log_of(elsewhere)


def test_weights_of_the_last_epoch_leave_nothing_to_train(trainer):
    run = trainer(TRAIN__LAST_EPOCH=3, TRAIN__NUM_EPOCHS=2)
    run.snapshot.load_state_dict(weights(run), 'flat.pdparams')
    with pytest.raises(UserError, match=r'epoch 3 of 2 is done.*NUM_EPOCHS to more than 3, or -last_epoch to less'):
        run.fit()


def test_no_finite_validation_is_no_best(trainer, monkeypatch):
    run = trainer()
    monkeypatch.setattr(engine.train, 'evaluate', lambda *a, **o: {**evaluate(*a, **o), 'acc1': float('nan')})
    run.fit()
    assert log_of(run).endswith('Finished: no validation with a finite Acc@1, so there is no best.pdparams\n')
    assert not os.path.exists(os.path.join(run.folder, 'best.pdparams'))


def test_a_changed_global_batch_goes_on_before_the_position(trainer):
    run = trainer()
    state = run.snapshot.state_dict()
    state['sampler']['samples'] = 27
    other = trainer(DATA__BATCH_SIZE=5)
    other.snapshot.load_state_dict({**state, 'model': weights(run), 'config': ''}, 'x')
    assert other.state.samples == 25


def test_recompute_changes_nothing(trainer):
    plain, again = trainer(), trainer(TRAIN__RECOMPUTE=True)
    plain.fit()
    again.fit()
    for name, value in weights(plain).items():
        assert_close(weights(again)[name], value, 1e-6)


@pytest.mark.parametrize(
    ('part', 'words'),
    [
        ({'model_ema': {'norm.bias': np.zeros(3, 'float32')}}, 'model_ema does not fit GMLP'),
        ({'epoch': None}, 'epoch is None'),
        ({'optimizer': {'velocity': {'norm.bias': np.zeros(16)}}}, "optimizer holds 'velocity'"),
    ],
)
def test_a_broken_part_of_a_checkpoint_changes_nothing(trainer, part, words):
    run = trainer(TRAIN__MODEL_EMA=True)
    before = weights(run)
    state = to_arrays(run.snapshot.state_dict())
    state['model'] = {name: array + 1 for name, array in state['model'].items()}
    with pytest.raises(UserError, match=f"'x': {words}"):
        run.snapshot.load_state_dict({**state, **part}, 'x')
    assert all(np.array_equal(value, before[name]) for name, value in weights(run).items())
    run.snapshot.load_state_dict({**state, 'model_ema': {'module': state['model']}}, 'x')
    for name, value in state['model'].items():
        np.testing.assert_array_equal(weights(run)[name], value)
        np.testing.assert_array_equal(run.ema.average[name].numpy(), value)
