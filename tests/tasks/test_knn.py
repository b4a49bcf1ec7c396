# SPDX-License-Identifier: Apache-2.0
"""Classification by nearest neighbors, against a plain computation, and on any number of processes."""

import shutil

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
from datasets.batch import to_device
from datasets.subset import evenly_spaced
from engine.distributed import Context
from engine.evaluate import evaluate
from models import build_model
from models.features import extract_features
from tasks import Interrupted, build_task, knn
from tasks.knn import vote
from tests.tasks.helpers import ALONE
from tests.tasks.test_mocov3 import recipe
from utils.runlog import RunLog


def unit(rng, *shape) -> np.ndarray:
    values = rng.standard_normal(shape).astype('float32')
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def plain_votes(features, bank, classes, num_classes) -> np.ndarray:
    """The same one image at a time."""
    votes = np.zeros([len(features), num_classes])
    for row, feature in zip(votes, features.astype('float64')):
        similarity = bank.astype('float64') @ feature
        for neighbor in np.argsort(-similarity)[:20]:
            row[classes[neighbor]] += np.exp(similarity[neighbor] / 0.07)
    return votes


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(1, 60), num_classes=st.integers(1, 7))
def test_votes(seed, size, num_classes):
    rng = np.random.default_rng(seed)
    features, bank, classes = unit(rng, 5, 8), unit(rng, size, 8), rng.integers(0, num_classes, size)
    votes = vote(paddle.to_tensor(features), paddle.to_tensor(bank), paddle.to_tensor(classes), num_classes)
    np.testing.assert_allclose(votes, plain_votes(features, bank, classes, num_classes), rtol=1e-4)


def setting(images, **changes):
    config = recipe(**{'DATA__DATA_PATH': images, 'DATA__CACHE': 'full', **changes})
    paddle.seed(0)
    model = build_model(config)
    model.train()
    return config, model, datasets.build_dataloader(config, datasets.build_dataset(config, 'val'), False)


def probed(config):
    task = build_task(config)
    return task, task.evaluator()


def everything(config, model, split) -> tuple[np.ndarray, np.ndarray]:
    """Features and classes of a split, as evaluations see its images."""
    (batch,) = datasets.build_dataloader(config, datasets.build_dataset(config, split), False).epoch(0)
    model.eval()
    batch = to_device(batch, config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    features = extract_features(model, batch.images).numpy()
    model.train()
    return features, batch.targets['label'].numpy()


def test_an_evaluation(images, tmp_path):
    config, model, loader = setting(images, DATA__BATCH_SIZE_EVAL=100)
    bank, classes = everything(config, model, 'train')
    features, labels = everything(config, model, 'val')
    assert len(bank) == 75
    right = plain_votes(features, bank, classes, 3).argmax(-1) == labels
    result = evaluate(config, model, loader, ALONE, RunLog(str(tmp_path), 0), *probed(config))
    assert result['knn_acc1'] == pytest.approx(right.mean())
    assert result['knn_acc1'] <= result['knn_acc5'] <= 1 and result['images'] == 13
    assert model.training


def test_a_class_without_neighbors_is_never_predicted(images, tmp_path, monkeypatch):
    """Three images have neighbors of only two classes."""
    monkeypatch.setattr(knn, 'MAX_IMAGES', 2)
    config, model, loader = setting(images)
    task, probe = probed(config)
    result = evaluate(config, model, loader, ALONE, RunLog(str(tmp_path), 0), task, probe)
    voters = set(probe._dataset.labels.tolist())
    assert len(voters) == 2
    assert result['knn_acc5'] == pytest.approx(np.mean([label in voters for label in loader.dataset.labels]))


def test_images_are_evenly_spaced(images):
    config = recipe(DATA__DATA_PATH=images)
    dataset = datasets.build_dataset(config, 'train')
    some = evenly_spaced(dataset, 3)
    assert [some.describe(i) for i in range(3)] == [dataset.describe(i) for i in (0, 25, 50)]
    assert evenly_spaced(dataset, 80) is dataset
    assert len({evenly_spaced(dataset, 70).describe(i) for i in range(70)}) == 70


def test_unreadable_images_do_not_vote(images, tmp_path):
    shutil.copytree(images, tmp_path / 'data')
    damaged = tmp_path / 'data' / 'train' / 'class1' / '0.png'
    damaged.write_bytes(b'no image')
    config, model, _ = setting(str(tmp_path / 'data'), DATA__CACHE='no', DATA__BAD_IMAGE='skip')
    task, probe = probed(config)
    probe._dataset = datasets.build_dataset(config, 'train')
    model.eval()
    with paddle.no_grad():
        bank, classes = probe._encode_training_images(model, ALONE, lambda: False)
    assert bank.shape[0] == 74 and np.bincount(classes.numpy()).tolist() == [25, 24, 25]
    np.testing.assert_allclose(np.linalg.norm(bank.numpy(), axis=-1), 1, rtol=1e-5)


def test_a_signal_ends_it(images, tmp_path):
    config, model, loader = setting(images)
    asked = []
    stop = lambda: asked.append(1) or len(asked) > 2  # noqa: E731
    with pytest.raises(Interrupted):
        evaluate(config, model, loader, ALONE, RunLog(str(tmp_path), 0), *probed(config), stop)
    assert len(asked) == 3 and model.training


def test_a_signal_to_another_process_ends_it(images, monkeypatch):
    config, model, _ = setting(images)
    task, probe = probed(config)
    probe._dataset = datasets.build_dataset(config, 'train')
    monkeypatch.setattr(Context, 'sum', lambda self, values: values + 1)
    with paddle.no_grad(), pytest.raises(Interrupted):
        probe._encode_training_images(model, Context(0, 2, False), lambda: False)


def test_classes_are_those_of_the_training_images(images, tmp_path):
    """Whatever the validation part made of MODEL.NUM_CLASSES."""
    config, model, loader = setting(images, MODEL__NUM_CLASSES=2)
    task, probe = probed(config)
    result = evaluate(config, model, loader, ALONE, RunLog(str(tmp_path), 0), task, probe)
    assert probe._dataset.num_classes == 3 and result['images'] == 13


def test_shares_of_processes_make_the_same_bank(images, monkeypatch):
    """The all-reduced bank of three processes equals the bank of one process."""
    config, model, _ = setting(images)
    task, probe = probed(config)
    probe._dataset = datasets.build_dataset(config, 'train')
    model.eval()
    banks = []
    monkeypatch.setattr(Context, 'sum', lambda self, values: banks.append(values) or values)
    with paddle.no_grad():
        whole = probe._encode_training_images(model, ALONE, lambda: False)[0].numpy()
        banks.clear()
        for rank in range(3):
            probe._encode_training_images(model, Context(rank, 3, False), lambda: False)
    np.testing.assert_allclose(sum(bank.numpy() for bank in banks if bank.shape == [75, 24]), whole, atol=1e-6)
