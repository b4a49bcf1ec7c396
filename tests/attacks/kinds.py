# SPDX-License-Identifier: Apache-2.0
"""All kinds of attacks, by name, with their usual number of damaged files."""

from __future__ import annotations

import functools
from types import SimpleNamespace

from tests.attacks import pictures, programs, records, weights
from tests.attacks.arena import Attacks

DOORS = (
    'read_file',
    '-pretrained',
    '-resume',
    'port_weights',
    'create_model',
    'teacher',
    'predict',
    'export',
    'extract_features',
)
NAMES = (*(f'weights: {door}' for door in DOORS), 'images', 'data files', 'configuration', 'exported programs')
TRIES = {'images': 1000, 'data files': 1000, 'configuration': 100, 'exported programs': 300, 'weights: read_file': 600}
DEFAULT_TRIES = 200


def attacks(lab: SimpleNamespace, kind: str, tries: int | None = None, made: bool = True) -> Attacks:
    """The attacks of a kind; `tries`: damaged files, None: the usual number; `made`: also the files made by hand."""
    tries = TRIES.get(kind, DEFAULT_TRIES) if tries is None else tries
    if kind == 'images':
        return functools.partial(pictures.attacks, tries, made)
    if kind == 'data files':
        return functools.partial(records.attacks, lab, tries)
    if kind == 'configuration':
        return functools.partial(records.attacks, lab, tries, records.settings, made)
    if kind == 'exported programs':
        return functools.partial(programs.attacks, lab, tries)
    return functools.partial(weights.attacks, lab, kind.partition(': ')[2], tries, made)
