# SPDX-License-Identifier: Apache-2.0
"""SAVE_PREDICTIONS: predictions of several processes in the order of the images, results by class, tasks without predictions."""

import csv
import io
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from config import get_config
from datasets.batch import Batch
from datasets.dataset import Dataset, FileStorage
from tasks import build_evaluator, build_task
from tasks.recording import RecordingEvaluator
from utils.errors import UserError

NAMES = ['cat', 'dog, large', 'fly']
MODEL = SimpleNamespace(num_classes=3)


class Rank:
    """A process group of which only `gather` does something: rank 0 gets the texts of the ranks before it."""

    world_size = 2

    def __init__(self, is_main: bool, texts: list):
        self.is_main, self.texts = is_main, texts

    def sum(self, values):
        return values

    def gather(self, text):
        self.texts.append(text)
        return self.texts


def recorder(save: bool = True):
    config = get_config(opts=['MODEL.NUM_CLASSES', 3, 'SAVE_PREDICTIONS', save])
    data = Dataset(FileStorage('data', [f'{k}.png' for k in range(6)]), [0, 1, 2, 0, 1, 2], 'data', NAMES)
    return build_evaluator(build_task(config), data)


def evaluated(evaluator, group, *batches):
    """Evaluate batches of (indices, labels, logits)."""
    evaluator.reset(MODEL, group, lambda: False)
    for indices, labels, logits in batches:
        batch = Batch(np.zeros(len(indices)), {'label': paddle.to_tensor(labels)}, np.array(indices))
        evaluator.process(batch, paddle.to_tensor(np.array(logits, 'float32')))
    evaluator.reduce(group)
    return evaluator


def table(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


def one_hot(*classes):
    return [[4.0 * (k == number) for k in range(3)] for number in classes]


def test_rows_of_two_processes_are_in_the_order_of_the_images():
    texts = []
    other = evaluated(recorder(), Rank(False, texts), ([5, 1], [2, 1], one_hot(2, 1)), ([3], [0], one_hot(2)))
    assert len(other.files()['predictions.csv'].splitlines()) == 7
    evaluator = evaluated(recorder(), Rank(True, texts), ([4, 0], [1, 0], one_hot(0, 0)))
    files = evaluator.files()
    rows = table(files['predictions.csv'])
    assert [row['index'] for row in rows] == list('012345')
    assert [row['image'] for row in rows] == [f'data/{k}.png' for k in range(6)]
    assert [row['label'] for row in rows] == ['0', '1', '', '0', '1', '2']
    assert [row['class1'] for row in rows] == ['0', '1', '', '2', '0', '2']
    assert rows[1]['name1'] == 'dog, large'
    assert rows[2]['error'] == 'the image could not be read' and not rows[0]['error']
    expected = np.exp(4) / (np.exp(4) + 2)
    assert float(rows[0]['probability1']) == pytest.approx(expected, rel=1e-6)
    assert list(rows[0])[:3] == ['index', 'image', 'label'] and list(rows[0])[-1] == 'error'
    classes = table(files['classes.csv'])
    assert [(row['class'], row['name'], row['acc1']) for row in classes] == [
        ('0', 'cat', '0.5'), ('1', 'dog, large', '0.5'), ('2', 'fly', '1.0'),
    ]  # fmt: skip
    assert [(row['images'], row['predicted'], row['correct']) for row in classes] == [
        ('2', '2', '1'), ('2', '1', '1'), ('1', '2', '1'),
    ]  # fmt: skip


def test_a_class_without_images_has_no_accuracy():
    evaluator = evaluated(recorder(), Rank(True, []), ([0], [0], one_hot(0)))
    assert [row['acc1'] for row in table(evaluator.files()['classes.csv'])] == ['1.0', '', '']


def test_logits_that_are_not_finite_do_not_end_the_evaluation():
    nan = [[float('nan')] * 3] * 2
    evaluator = evaluated(recorder(), Rank(True, []), ([0, 1], [0, 1], nan), ([2], [2], one_hot(2)))
    rows = table(evaluator.files()['predictions.csv'])
    assert [('NaN' in row['error'], row['class1']) for row in rows[:3]] == [(True, ''), (True, ''), (False, '2')]
    assert [row['images'] for row in table(evaluator.files()['classes.csv'])] == ['0', '0', '1']


def test_nothing_is_recorded_unless_asked():
    evaluator = recorder(save=False)
    assert not isinstance(evaluator, RecordingEvaluator)
    evaluated(evaluator, Rank(True, []), ([0], [0], one_hot(0)))
    assert evaluator.files() == {}


@pytest.mark.parametrize('task', ['mae', 'mocov3'])
def test_a_task_without_predictions_says_so(task):
    config = get_config(opts=['TRAIN.TASK', task, 'MODEL.TYPE', task, 'SAVE_PREDICTIONS', True])
    with pytest.raises(UserError, match=f'TRAIN.TASK {task} has no predictions: remove -save_predictions'):
        build_task(config)
