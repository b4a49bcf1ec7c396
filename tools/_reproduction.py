# SPDX-License-Identifier: Apache-2.0
"""Reproduce one row of the table of published accuracies: find its weights, convert, evaluate, measure."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from yacs.config import CfgNode

from engine import distributed
from engine.run import run_config
from engine.throughput import BenchmarkCase, measure
from models.profile import profile_config
from models.weights.published import cache_folder, convert, fetch
from models.zoo import PUBLISHED, Published
from utils.errors import UserError
from utils.files import open_regular
from utils.weights import OTHER_SUFFIXES, SUFFIX


@dataclass(frozen=True)
class Request:
    """What a row needs.

    Attributes:
        published: the row of the table.
        config: resolved configuration, not frozen.
        weights: folder of given weights; None: all are downloaded.
        folder: folder of the results, for run folders and converted weights.
        batch_size: images per batch of the measurement of speed.
        rounds: timed batches.
    """

    published: Published
    config: CfgNode
    weights: str | None
    folder: str
    batch_size: int
    rounds: int


def reproduce_row(request: Request) -> dict:
    """Return accuracies in percent, images, parameters, MACs and images per second of a configuration.

    The evaluation is that of `-eval`; its run folder is FOLDER/runs/NAME.

    Raises:
        UserError: no weights, weights that do not fit, or a model without top-1 accuracy.
    """
    config, name = request.config, request.published.name
    weights = find_weights(request)
    config.MODEL.PRETRAINED, config.MODEL.RESUME, config.EVAL = weights, None, True
    config.SAVE, config.TAG = os.path.join(request.folder, 'runs'), run_name(name)
    with contextlib.redirect_stdout(io.StringIO()):  # the log is in the run folder
        run_config(config)
    result = evaluation(os.path.join(config.SAVE, config.TAG))
    if 'acc1' not in result:
        raise UserError(f'{name} is evaluated by {", ".join(result)}: the table is of classifiers, by top-1 accuracy.')
    config.defrost()
    config.DATA.BATCH_SIZE = request.batch_size
    config.freeze()
    cost = profile_config(config, [1, *BenchmarkCase(name, config).image_shape()])
    speed = measure(config, distributed.start(config.PEER_TIMEOUT), request.rounds)
    return {
        'acc1': 100 * result['acc1'],
        'acc5': 100 * result['acc5'],
        'images': result['images'],
        'unreadable': result['skipped'],
        'params': cost.params,
        'macs': cost.macs,
        'images_per_second': speed.images_per_second,
        'weights': weights,
    }


def run_name(name: str) -> str:
    """Return the name of the run folder of a configuration: a name, or the path of a YAML file."""
    return os.path.splitext(os.path.basename(name))[0]


def evaluation(folder: str) -> dict:
    """Return the last evaluation in metrics.jsonl of a run folder."""
    with open_regular(os.path.join(folder, 'metrics.jsonl'), encoding='utf-8') as file:
        return [row for row in map(json.loads, file) if row['kind'] == 'eval'][-1]


def find_weights(request: Request) -> str:
    """Return a .pdparams file or a run folder: a given one, a given file of another format converted, else the published one.

    Raises:
        UserError: there are no weights, or they cannot be converted.
    """
    name, folder = request.published.name, request.weights
    given = None if folder is None else given_weights(folder, request.published)
    if given is None and not (PUBLISHED.get(name, request.published).url or os.path.isdir(cache_folder(name))):
        raise UserError(
            f'no weights are published: put them into the folder of -weights, as {run_name(name)}{SUFFIX}, as a file of PyTorch, '
            f'or as a run folder {run_name(name)}.'
        )
    if given is None:
        return fetch(name)
    if os.path.isdir(given) or given.endswith(SUFFIX):
        return given
    target = os.path.join(request.folder, 'weights', run_name(name) + SUFFIX)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    convert(name, given, target, print)
    return target


def given_weights(folder: str, published: Published) -> str | None:
    """Return the run folder NAME or the file of a configuration in a folder: NAME with a suffix, or the published file's name."""
    stem, url = run_name(published.name), os.path.basename(urlsplit(published.url).path)
    names = [stem, *(stem + suffix for suffix in OTHER_SUFFIXES), *([url] if url.endswith(OTHER_SUFFIXES) else [])]
    paths = (os.path.join(folder, name) for name in names)
    return next((path for path in paths if os.path.exists(path)), None)
