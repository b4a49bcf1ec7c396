# SPDX-License-Identifier: Apache-2.0
"""Evaluation that saves its predictions (SAVE_PREDICTIONS): predictions.csv and classes.csv."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from paddle import nn
from PIL import Image

from datasets import Images
from datasets.batch import Batch
from tasks.base import Evaluator, Group, PredictionOptions, Task
from utils.errors import UserError

PREDICTIONS, CLASSES = 'predictions.csv', 'classes.csv'
_UNREADABLE = 'the image could not be read'


def build_evaluator(task: Task, dataset: Images) -> Evaluator:
    """Return the evaluator of a task, which records the predictions if SAVE_PREDICTIONS is set.

    Args:
        task: attached to the model.
        dataset: validation images.
    """
    evaluator = task.evaluator()
    return RecordingEvaluator(evaluator, task, dataset) if task.config.SAVE_PREDICTIONS else evaluator


class RecordingEvaluator(Evaluator):
    """Evaluator that also keeps the predictions of `Task.predictions`.

    `process` waits for the device. `reduce` gathers the rows of all processes, each of which evaluated other images, and
    sorts them by the index of the image.

    Args:
        evaluator: computes the metrics.
        task, dataset: see `build_evaluator`.
    """

    def __init__(self, evaluator: Evaluator, task: Task, dataset: Images):
        self.titles, self.best = evaluator.titles, evaluator.best
        self._evaluator, self._task, self._dataset = evaluator, task, dataset
        names = getattr(dataset, 'class_names', None)
        self._names = names if names and len(names) == task.config.MODEL.NUM_CLASSES else None
        self._options = PredictionOptions(class_names=self._names, pictures=False)

    def reset(self, model: nn.Layer, group: Group, should_stop: Callable[[], bool]) -> None:
        """See `Evaluator`."""
        self._rows: dict[int, list] = {}  # index of the image -> targets, predictions, error
        self._evaluator.reset(model, group, should_stop)

    def process(self, batch: Batch, outputs: Any) -> None:
        """See `Evaluator`."""
        self._evaluator.process(batch, outputs)
        targets, error = self._task.targets(batch), ''
        try:
            cells = [prediction.cells for prediction in self._task.predictions(outputs, self._options)]
        except UserError as problem:  # such as logits that are not finite, which do not end an evaluation
            cells, error = [('',) * len(self._task.prediction_columns(self._options))] * len(batch), str(problem)
        for index, target, found in zip(batch.indices.tolist(), targets, cells):
            self._rows[index] = [*target, *found, error]

    def reduce(self, group: Group) -> None:
        """See `Evaluator`."""
        self._evaluator.reduce(group)
        texts = group.gather(json.dumps(list(self._rows.items())))
        self._rows = dict(sorted(pair for text in texts for pair in json.loads(text))) if group.is_main else {}

    def result(self) -> dict[str, float]:
        """See `Evaluator`."""
        return self._evaluator.result()

    def details(self) -> list[str]:
        """See `Evaluator`."""
        return self._evaluator.details()

    def progress(self) -> dict[str, float]:
        """See `Evaluator`."""
        return self._evaluator.progress()

    def pictures(self, model: nn.Layer) -> dict[str, Image.Image]:
        """See `Evaluator`."""
        return self._evaluator.pictures(model)

    def files(self) -> dict[str, str]:
        """Return the files of the evaluator, a row per image, and a row per class if there are results of classes."""
        texts = {**self._evaluator.files(), PREDICTIONS: csv_text(self._prediction_rows())}
        results = self.class_results([self._named(row) for row in self._rows.values() if not row[-1]])
        if results:
            texts[CLASSES] = csv_text([list(results[0]), *(list(row.values()) for row in results)])
        return texts

    def class_results(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """See `Evaluator`; each row has the index and the name of its class."""
        names = self._names or []
        return [
            {'class': number, 'name': names[number] if number < len(names) else '', **row}
            for number, row in enumerate(self._evaluator.class_results(rows))
        ]

    def _prediction_rows(self) -> Iterator[Sequence]:
        columns = self._columns()
        yield ['index', 'image', *columns, 'error']
        missing = [''] * len(columns) + [_UNREADABLE]
        for index in range(len(self._dataset)):
            yield [index, self._dataset.describe(index), *self._rows.get(index, missing)]

    def _columns(self) -> tuple[str, ...]:
        return (*self._task.target_columns, *self._task.prediction_columns(self._options))

    def _named(self, row: list) -> dict[str, Any]:
        return dict(zip(self._columns(), row))


def csv_text(rows: Iterable[Sequence]) -> str:
    """Return rows as CSV; None and NaN are empty cells."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return '' if value is None or (isinstance(value, float) and math.isnan(value)) else value
