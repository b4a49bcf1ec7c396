# SPDX-License-Identifier: Apache-2.0
"""Published accuracies and weights of the configurations: configs/zoo.csv."""

from __future__ import annotations

import csv
import os
from typing import NamedTuple

from models.registry import CONFIG_DIR
from utils.errors import UserError


class Published(NamedTuple):
    """A row of the table; fields are empty if nothing is published.

    Attributes:
        name: name of the configuration.
        acc1: top-1 accuracy on ImageNet-1k validation, percent.
        acc5: top-5 accuracy.
        source: paper or project that reports the accuracies.
        url: URL of the weights, or of the page that links them.
        sha256: checksum of the weights file.
        license: license of the weights.
    """

    name: str
    acc1: float | None = None
    acc5: float | None = None
    source: str = ''
    url: str = ''
    sha256: str = ''
    license: str = ''


def read_zoo(path: str) -> dict[str, Published]:
    """Read a table in the format of configs/zoo.csv: a header with the fields of `Published`, of which only `name` must exist.

    Raises:
        UserError: the file cannot be read, or a row is malformed.
    """
    try:
        with open(path, encoding='utf-8', newline='') as file:
            rows = [_row(row, f"'{path}', line {number}") for number, row in enumerate(csv.DictReader(file), 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the table '{path}': {getattr(error, 'strerror', None) or error}.") from None
    return {row.name: row for row in rows}


def _row(row: dict[str, str], where: str) -> Published:
    unknown = sorted(map(str, row.keys() - {*Published._fields}))
    if unknown or not row.get('name'):
        problem = f"an unknown column '{unknown[0]}'" if unknown else 'no name'
        raise UserError(f'{where}: {problem}; the columns are {", ".join(Published._fields)}.')
    try:
        numbers = {key: float(row[key]) if row.get(key) else None for key in ('acc1', 'acc5')}
    except ValueError:
        raise UserError(f'{where}: acc1 and acc5 must be numbers in percent, or empty.') from None
    return Published(**{**{key: value or '' for key, value in row.items()}, **numbers})


PUBLISHED = read_zoo(os.path.join(CONFIG_DIR, 'zoo.csv'))
