# SPDX-License-Identifier: Apache-2.0
"""Read the folder of a run. A file that is missing or damaged gives a sentence in `Run.notes`, and the others are read."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from yacs.config import CfgNode

from analysis.report.tables import Predictions, Table, read_predictions, read_table
from config import SCHEMA, described, get_config
from datasets.images import UnreadableImage, decode_image
from utils.errors import UserError
from utils.files import open_regular, read_regular

EVALUATION = 'evaluation'  # folder in a run's folder for what is computed from its checkpoint later
_MAX_LINE, _MAX_LINES = 1 << 20, 10_000_000
_MAX_INFO, _MAX_PICTURE = 1 << 20, 64 << 20  # bytes
_LARGEST = 1e30  # magnitude of a number in a chart
_BOOKKEEPING = ('kind', 'epoch', 'step', 'images', 'skipped', 'seconds')
_PICTURE = re.compile(r'(?P<name>\w+?)(?:_(?P<step>step)?(?P<number>\d+))?\.png')
_STEP = re.compile(r'Epoch\[(\d+)/\d+\], Step\[(\d+)/(\d+)\], Lr: ([\d.]+), Loss: (.*)')
_VALUE = re.compile(r', (Grad Norm|[a-z]\w*): (-?[\d.]+(?:e[+-]?\d+)?)')  # other names start with a capital letter

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Setting:
    """A key of the configuration with the text of its value and the source of the value."""

    key: str
    value: str
    source: str
    default: bool


@dataclass(frozen=True)
class StoredPicture:
    """A picture of the run's folder, such as reconstruction_0010.png: `name` is reconstruction, `when` is 'epoch 10'."""

    name: str
    when: str
    image: Image.Image


@dataclass
class Run:
    """Content of a run's folder.

    Attributes:
        name: last parts of the path, distinct between the runs of a page.
        rows: rows of metrics.jsonl by their kind: train, val, val_ema, eval.
        steps: values in the log lines of steps, by name: (epoch, value); `lr`, `grad_norm`, scheduled values of the model.
        settings: configuration; empty if config.yaml cannot be read.
        config: None if config.yaml cannot be read.
        info: content of run.json.
        notes: sentences about missing or damaged files.
    """

    path: str
    name: str
    config: CfgNode | None = None
    settings: list[Setting] = field(default_factory=list)
    rows: dict[str, list[dict]] = field(default_factory=dict)
    steps: dict[str, Points] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    predictions: Predictions | None = None
    classes: Table | None = None
    pictures: list[StoredPicture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def metrics(self, x: str = 'epoch') -> dict[str, dict[str, Points]]:
        """Return the points (epoch or step, value) of each metric by kind of row, in the order of the files."""
        found: dict[str, dict[str, Points]] = defaultdict(lambda: defaultdict(list))
        for kind, rows in self.rows.items():
            for row in rows:
                for name, value in row.items():
                    if name not in _BOOKKEEPING and is_number(value):
                        found[name][kind].append((row[x], value))
        return found

    def evaluation_file(self, name: str) -> str | None:
        """Return the newer one of NAME and evaluation/NAME; None if there is neither."""
        paths = (os.path.join(self.path, name), os.path.join(self.path, EVALUATION, name))
        return max(filter(os.path.isfile, paths), key=os.path.getmtime, default=None)


def is_number(value: Any) -> bool:
    """Return whether a value of a JSON file can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Read the folders of several runs. Raises UserError if one is no folder of a run."""
    runs = [Run(path, name) for path, name in zip(paths, distinct_names(paths))]
    for run in runs:
        if not any(os.path.isfile(os.path.join(run.path, name)) for name in ('config.yaml', 'metrics.jsonl')):
            raise UserError(
                f"'{run.path}' is not the folder of a run: it has neither config.yaml nor metrics.jsonl; give a folder such as "
                'output/latest.'
            )
        _read(run)
    return runs


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return the last parts of each path, as many as make the names distinct; the whole paths where they are equal."""
    parts = [os.path.abspath(path).split(os.sep) for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ['/'.join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f'{path} ({number})' for number, path in enumerate(paths, 1)]


def _read(run: Run) -> None:
    run.info = _read_info(run)
    _read_config(run)
    run.rows = _read_metrics(run)
    run.steps = _read_log(run)
    run.predictions = _read_or_note(run, 'predictions.csv', read_predictions)
    run.classes = _read_or_note(run, 'classes.csv', read_table)
    run.pictures = _read_pictures(run)


def _read_or_note(run: Run, name: str, read):
    path = run.evaluation_file(name)
    try:
        return None if path is None else read(path)
    except UserError as error:
        run.notes.append(str(error))
        return None


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, 'strerror', None) or str(error)


# ---------------------------------------------------------------------------------------------------- configuration
def _read_info(run: Run) -> dict[str, Any]:
    path = os.path.join(run.path, 'run.json')
    if not os.path.lexists(path):
        return {}
    try:
        info = json.loads(read_regular(path, _MAX_INFO))
        kinds = {'commands': list, 'environment': dict, 'sources': dict}
        if isinstance(info, dict) and all(isinstance(info.get(name), kind) for name, kind in kinds.items()):
            return info
        reason = 'it has other content'
    except (OSError, ValueError, RecursionError) as error:
        reason = _reason(error) if isinstance(error, OSError) else 'it is no JSON'
    run.notes.append(f"'{path}' cannot be read: {reason}; environment and sources of the configuration are left out.")
    return {}


def _read_config(run: Run) -> None:
    path = os.path.join(run.path, 'config.yaml')
    try:
        run.config = get_config(path)
    except UserError as error:
        run.notes.append(f'The configuration is left out: {str(error).rstrip(".")}.')
        return
    defaults = SCHEMA.tree()
    sources = run.info.get('sources', {})
    for key, value, where in described(run.config):
        is_default = SCHEMA.get(run.config, key) == SCHEMA.get(defaults, key)
        if run.info:
            source = str(sources.get(key, 'default' if is_default else 'set at the start of the run'))
        else:  # runs of earlier versions have no run.json
            source = 'default' if is_default else where
        run.settings.append(Setting(key, value, source, is_default))


# ---------------------------------------------------------------------------------------------------- curves
def _lines(run: Run, name: str):
    """Yield the lines of a file of the run; a file that cannot be read gives a note."""
    path = os.path.join(run.path, name)
    try:
        with open_regular(path, encoding='utf-8', errors='replace') as file:
            for _ in range(_MAX_LINES):
                line = file.readline(_MAX_LINE)
                if not line:
                    return
                yield line
    except OSError as error:
        run.notes.append(f"'{path}' cannot be read: {_reason(error)}; its curves are left out.")


def _read_metrics(run: Run) -> dict[str, list[dict]]:
    rows, damaged = defaultdict(list), 0
    for line in _lines(run, 'metrics.jsonl'):
        row = _metrics_row(line)
        if row is None:
            damaged += 1
        else:
            rows[row['kind']].append(row)
    if damaged:
        path = os.path.join(run.path, 'metrics.jsonl')
        run.notes.append(f"'{path}' has {damaged} damaged lines, which are left out.")
    return dict(rows)


def _metrics_row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(row, dict) and isinstance(row.get('kind'), str)
    return row if valid and all(is_number(row.get(name)) for name in ('epoch', 'step')) else None


def _read_log(run: Run) -> dict[str, Points]:
    """Read the values in the log lines of steps. Lines of a resumed run replace those of the same steps before."""
    if not os.path.isfile(os.path.join(run.path, 'log.txt')):
        return {}  # as in a folder of which only the small files were copied
    found: dict[tuple[float, str], float] = {}
    for line in _lines(run, 'log.txt'):
        match = _STEP.search(line)
        if match is not None:
            epoch, index, batches, lr, rest = match.groups()
            x = int(epoch) - 1 + (int(index) + 1) / max(int(batches), 1)
            values = {'lr': lr, **dict(_VALUE.findall(rest))}
            found.update({(x, name.lower().replace(' ', '_')): _float(value) for name, value in values.items()})
    curves: dict[str, Points] = defaultdict(list)
    for (x, name), value in sorted(found.items()):
        if is_number(value):
            curves[name].append((x, value))
    return dict(curves)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# ---------------------------------------------------------------------------------------------------- pictures
def _read_pictures(run: Run) -> list[StoredPicture]:
    """Read the first and the last picture of each name in the run's folder and in its evaluation."""
    found: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for folder in (run.path, os.path.join(run.path, EVALUATION)):
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            match = _PICTURE.fullmatch(name)
            if match is not None:
                found[match['name']].append((int(match['number'] or 0), _when(match), os.path.join(folder, name)))
    pictures = []
    for name, entries in sorted(found.items()):
        first, *_, last = [*entries, max(entries)] if len(entries) == 1 else (min(entries), max(entries))
        for _, when, path in [first] if first == last else [first, last]:
            image = _read_picture(run, path)
            if image is not None:
                pictures.append(StoredPicture(name, when, image))
    return pictures


def _when(match: Mapping[str, str | None]) -> str:
    if match['number'] is None:
        return ''
    return f'{match["step"] or "epoch"} {int(match["number"])}'


def _read_picture(run: Run, path: str) -> Image.Image | None:
    try:
        return decode_image(read_regular(path, _MAX_PICTURE))
    except (OSError, UnreadableImage) as error:
        run.notes.append(f"the picture '{path}' cannot be read: {getattr(error, 'strerror', None) or error}.")
        return None
