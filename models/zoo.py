# SPDX-License-Identifier: Apache-2.0
"""Published accuracies and weights of the configurations: configs/zoo.csv."""

from __future__ import annotations

import csv
import os
from typing import NamedTuple

from models.registry import CONFIG_DIR


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


def _read(path: str) -> dict[str, Published]:
    with open(path, encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.update({key: float(row[key]) if row[key] else None for key in ('acc1', 'acc5')})
    return {row['name']: Published(**row) for row in rows}


PUBLISHED = _read(os.path.join(CONFIG_DIR, 'zoo.csv'))
