# SPDX-License-Identifier: Apache-2.0
"""Read predictions.csv and classes.csv of an evaluation."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from utils.errors import UserError
from utils.files import open_regular

_MAX_BYTES = 4 << 30
_MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class Table:
    """Content of classes.csv, a row per class.

    Attributes:
        when: time of the evaluation.
    """

    path: str
    when: str
    columns: list[str]
    rows: list[list[str]]

    def names(self) -> list[str]:
        """Return the name of each class; its number if it has no name."""
        places = [self.columns.index(name) for name in ('name', 'class')]
        return [next(filter(None, (row[place] for place in places)), str(k)) for k, row in enumerate(self.rows)]

    def fractions(self) -> dict[str, list[float]]:
        """Return the columns that hold fractions of 1, such as accuracies; NaN: an empty cell."""
        found = {}
        for place, name in enumerate(self.columns):
            cells = [row[place] for row in self.rows]
            if name not in ('class', 'name') and any('.' in cell for cell in cells):
                found[name] = [_number(cell) for cell in cells]
        return {name: values for name, values in found.items() if all(not value > 1 for value in values)}


@dataclass(frozen=True)
class Predictions:
    """Predictions of a classifier for the images that could be read.

    Attributes:
        when: time of the evaluation.
        indices: indices of the images in the validation set, [N] int64.
        images: descriptions of the images, such as paths, [N].
        labels: [N] int64.
        predicted: most likely classes, [N] int64.
        confidences: their probabilities, [N] float64.
        unreadable: number of images without a prediction.
    """

    path: str
    when: str
    indices: np.ndarray
    images: list[str]
    labels: np.ndarray
    predicted: np.ndarray
    confidences: np.ndarray
    unreadable: int

    @property
    def num_classes(self) -> int:
        """Return the number of classes that occur, counted from 0."""
        return int(max(self.labels.max(initial=-1), self.predicted.max(initial=-1))) + 1


def read_table(path: str) -> Table | None:
    """Read classes.csv. Raises UserError for a damaged file."""
    columns, *rows = _rows(path)
    if columns[:2] != ['class', 'name']:
        raise damaged(path, 'its first columns are not class and name')
    return Table(path, _time(path), columns, rows)


def read_predictions(path: str) -> Predictions | None:
    """Read predictions.csv; None if it is not of a classifier.

    Raises:
        UserError: a damaged file.
    """
    rows = _rows(path)
    columns = next(rows)
    needed = ('index', 'image', 'label', 'class1', 'probability1', 'error')
    if not {'label', 'probability1'} & set(columns):  # of segmentation or detection
        return None
    if not set(needed) <= set(columns):
        raise damaged(path, f'it has no column {next(name for name in needed if name not in columns)}')
    places = [columns.index(name) for name in needed]
    numbers, images, unreadable = [], [], 0
    for row in rows:
        index, image, label, predicted, confidence, error = (row[place] for place in places)
        if error:
            unreadable += 1
            continue
        numbers.append((_whole(index), _whole(label), _whole(predicted), _number(confidence)))
        images.append(image)
        in_range = min(numbers[-1][:3]) >= 0 and max(numbers[-1][1:3]) < _MAX_CLASSES
        if not (in_range and 0 <= numbers[-1][3] <= 1.0001):  # probabilities are rounded
            raise damaged(path, f"the row of image '{image}' has values out of range")
    if not numbers:
        raise damaged(path, 'it has no prediction')
    indices, labels, predicted = (np.array(column, 'int64') for column in list(zip(*numbers))[:3])
    confidences = np.minimum([row[3] for row in numbers], 1.0)
    return Predictions(path, _time(path), indices, images, labels, predicted, confidences, unreadable)


def damaged(path: str, reason: str) -> UserError:
    """Return the error for a table that cannot be read."""
    return UserError(f"'{path}' is damaged: {reason}; delete it and evaluate again (-evaluate).")


def _rows(path: str) -> Iterator[list[str]]:
    """Yield the rows of a CSV file, of which the first has the names of the columns; all have equal lengths."""
    try:
        with open_regular(path, _MAX_BYTES, encoding='utf-8', errors='replace', newline='') as file:
            width = None
            for row in csv.reader(file):
                width = len(row) if width is None else width
                if len(row) != width:
                    raise damaged(path, f'a row has {len(row)} instead of {width} cells')
                yield row
            if width is None:
                raise damaged(path, 'it is empty')
    except csv.Error as error:
        raise damaged(path, str(error)) from None
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from None


def _whole(cell: str) -> int:
    """Return a whole number of at most 12 digits; -1: the cell holds none."""
    return int(cell) if cell.isascii() and cell.isdecimal() and len(cell) <= 12 else -1


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float('nan')


def _time(path: str) -> str:
    return time.strftime('%Y-%m-%d %H:%M', time.localtime(os.path.getmtime(path)))
