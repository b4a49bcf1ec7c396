# SPDX-License-Identifier: Apache-2.0
"""Sections about the classes: results by class, confusion matrix, calibration, most confident mistakes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from analysis.report.charts import dot_plot, legend, matrix_chart, reliability_diagram
from analysis.report.html import Element, details, el, figure, picture, table
from analysis.report.runs import EVALUATION, Run
from analysis.report.statistics import calibrate, confident_mistakes, confusion_matrix, most_confused
from analysis.report.tables import Predictions, Table
from datasets import build_dataset
from utils.errors import UserError

MISTAKES = 24  # pictures
_PAIRS = 10  # rows of the table of confusions
_PLOTTED, _LISTED = 40, 5000  # classes in a chart, in a table
_CELLS, _PIXELS = 40, 1000  # classes of a confusion matrix of cells, of pixels
_TILE = 104  # pixels of a picture

Content = list[Element]


def class_names(run: Run, count: int) -> list[str]:
    """Return `count` names of classes; numbers where classes.csv has none."""
    names = run.classes.names() if run.classes else []
    return [names[k] if k < len(names) else str(k) for k in range(count)]


def _titled(runs: Sequence[Run], run: Run, content: Content) -> Content:
    """Put the name of a run above its part of a section, if there are several runs."""
    return [el('h3', run.name), *content] if len(runs) > 1 and content else content


def _origin(run: Run, table_or_predictions: Table | Predictions) -> Element:
    """Return a sentence about the file that a section was computed from."""
    found = table_or_predictions
    later = os.path.basename(os.path.dirname(found.path)) == EVALUATION
    what = 'an evaluation of the best weights' if later else 'the last evaluation of the run'
    return el('p', 'From ', el('code', found.path), f': {what}, {found.when}.', class_='muted')


# ---------------------------------------------------------------------------------------------------- by class
def class_results(runs: Sequence[Run]) -> Content:
    """Return a chart of the first result of each class, and a table of all results."""
    found = [run for run in runs if run.classes and run.classes.rows and run.classes.fractions()]
    if not found:
        return []
    if len({tuple(run.classes.names()) for run in found}) > 1:  # runs on other data are not drawn in one chart
        return [part for run in found for part in _titled(runs, run, _class_chart([run], [run]))]
    return _class_chart(runs, found)


def _class_chart(runs: Sequence[Run], found: Sequence[Run]) -> Content:
    names = found[0].classes.names()
    metric = next(iter(found[0].classes.fractions()))
    columns = [
        (run.name if len(found) > 1 else metric, list(runs).index(run), run.classes.fractions().get(metric) or [])
        for run in found
    ]
    columns = [column for column in columns if len(column[2]) == len(names)]
    order, title = _shown_classes(columns[0][2])
    chart = dot_plot(
        f'{metric} by class',
        [names[k] for k in order],
        [(name, color, [v[k] for k in order]) for name, color, v in columns],
    )
    entries = [legend([(name, color, 0) for name, color, _ in columns])] if len(found) > 1 else []
    parts = (
        [_origin(run, run.classes) for run in found] + entries + [figure(chart, f'{metric}{title}', class_='matrix')]
    )
    return parts + [details(f'All results of {run.name}', _class_table(run.classes)) for run in found]


def _shown_classes(values: Sequence[float]) -> tuple[list[int], str]:
    """Return all classes, or of many classes the worst and the best ones, and what to add to the title."""
    if len(values) <= _PLOTTED:
        return list(range(len(values))), ''
    known = [k for k in range(len(values)) if not math.isnan(values[k])]
    order = sorted(known, key=lambda k: values[k])
    worst, best = order[: 3 * _PLOTTED // 4], order[3 * _PLOTTED // 4 :][-_PLOTTED // 4 :]
    return worst + best, f': the {len(worst)} worst and the {len(best)} best of {len(values)} classes'


def _class_table(classes: Table) -> Element:
    rows = [[_rounded(cell) for cell in row] for row in classes.rows[:_LISTED]]
    return table(classes.columns, rows)


def _rounded(cell: str) -> str:
    try:
        return f'{float(cell):.4f}' if '.' in cell else cell
    except ValueError:
        return cell


# ---------------------------------------------------------------------------------------------------- confusion
def confusions(runs: Sequence[Run]) -> Content:
    """Return the confusion matrix of each run with predictions, and its most frequent confusions."""
    return [part for run in runs if run.predictions for part in _titled(runs, run, _confusion(run, run.predictions))]


def _confusion(run: Run, found: Predictions) -> Content:
    size = max(found.num_classes, len(run.classes.rows) if run.classes else 0)
    names = class_names(run, size)
    parts: Content = [_origin(run, found)]
    if size <= _PIXELS:
        counts = confusion_matrix(found.labels, found.predicted, size)
        parts.append(_matrix(counts, names))
    pairs = [
        [names[pair.label], names[pair.predicted], str(pair.count), f'{100 * pair.count / pair.images:.1f} %']
        for pair in most_confused(found.labels, found.predicted, _PAIRS)
    ]
    if pairs:
        parts.append(
            el(
                'div',
                el('h3', 'Most frequent confusions'),
                table(['class', 'predicted', 'images', 'of the class'], pairs),
            )
        )
    return [parts[0], el('div', parts[1:], class_='pair')]


def _matrix(counts: np.ndarray, names: Sequence[str]) -> Element:
    caption = (
        'Rows: classes; columns: predictions. The stronger a cell, the larger its share of the images of the class.'
    )
    if len(counts) <= _CELLS:
        return figure(matrix_chart('confusion matrix', counts, names), caption, class_='matrix')
    return figure(picture(_matrix_image(counts), 'confusion matrix', 'small'), caption, class_='wide')


def _matrix_image(counts: np.ndarray) -> Image.Image:
    """Draw a confusion matrix [K, K] with a pixel or more per cell: blue on the diagonal, orange beside it."""
    shares = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))[..., np.newaxis]
    colors = np.where(np.eye(len(counts), dtype=bool)[..., np.newaxis], (0, 114, 178), (213, 94, 0))
    pixels = np.rint(255 - shares * (255 - colors)).astype('uint8')
    return Image.fromarray(pixels.repeat(max(1, 600 // len(counts)), 0).repeat(max(1, 600 // len(counts)), 1))


# ---------------------------------------------------------------------------------------------------- calibration
def calibrations(runs: Sequence[Run]) -> Content:
    """Return the reliability diagram of each run with predictions."""
    diagrams = [_calibration(run, run.predictions, len(runs) > 1) for run in runs if run.predictions]
    return [el('div', diagrams, class_='pair')] if diagrams else []


def _calibration(run: Run, found: Predictions, named: bool) -> Element:
    correct = found.labels == found.predicted
    calibration = calibrate(found.confidences, correct)
    error = f'ECE {calibration.error:.4f}'
    numbers = f'mean confidence {found.confidences.mean():.4f}, accuracy {correct.mean():.4f}, {len(correct)} images'
    caption = el('span', f'{run.name}: {error}' if named else error, class_='big'), f'; {numbers}.'
    marks = ' Bars: accuracy; orange marks: mean confidence; dashed: perfect calibration.'
    return figure(reliability_diagram(f'reliability diagram, {error}', calibration), *caption, marks, class_='narrow')


# ---------------------------------------------------------------------------------------------------- mistakes
def mistakes(runs: Sequence[Run]) -> Content:
    """Return pictures of the mistakes with the largest confidences of each run with predictions."""
    return [part for run in runs if run.predictions for part in _titled(runs, run, _mistakes(run, run.predictions))]


def _mistakes(run: Run, found: Predictions) -> Content:
    places = confident_mistakes(found.labels, found.predicted, found.confidences, MISTAKES)
    if not len(places) or run.config is None:
        return []
    names, tiles, failed = class_names(run, found.num_classes), [], ''
    try:
        dataset = build_dataset(run.config, 'val')
    except UserError as error:
        return [el('p', f'The pictures are left out: {error}')]
    for place in places:
        index, path = int(found.indices[place]), found.images[place]
        words = (
            f'{names[found.labels[place]]}, predicted {names[found.predicted[place]]} ({found.confidences[place]:.3f})'
        )
        try:
            if index >= len(dataset) or dataset.describe(index) != path:
                failed = f"image {index} of the data is not '{path}' any more"
                continue
            tiles.append(figure(_tile(dataset.load(index), path), words))
        except UserError as error:
            failed = str(error).rstrip('.')
    wrong = int((found.labels != found.predicted).sum())
    text = f'{len(tiles)} of {wrong} mistakes: the class, the predicted class, and its probability.'
    sentences = [el('p', f'Pictures are left out: {failed}.')] if failed else []
    return [el('p', text, class_='muted'), *sentences, el('div', tiles, class_='tiles')]


def _tile(image: Image.Image, path: str) -> Element:
    image = image.convert('RGB')
    small = max(image.size) < _TILE
    image.thumbnail((2 * _TILE, 2 * _TILE))
    tile = picture(image, path, 'small' if small else None)
    tile.set('title', tile.get('alt'))
    return tile
