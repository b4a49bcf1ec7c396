# SPDX-License-Identifier: Apache-2.0
"""Small data sets on disk, laid out as their authors publish them."""

from __future__ import annotations

import json

import numpy as np
from scipy.io import savemat

CAR_FIELDS = ('relative_im_path', 'bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2', 'class', 'test')


def write_text(root, files: dict) -> None:
    """Files by name: text as it is, anything else as JSON."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_flowers(root, labels: list, train: list, valid: list, test: list) -> None:
    """imagelabels.mat and setid.mat, of bytes and 16-bit numbers in one row."""
    row = lambda numbers, kind: np.array([numbers], kind)  # noqa: E731
    savemat(root / 'imagelabels.mat', {'labels': row(labels, np.uint8)})
    parts = {'trnid': row(train, np.uint16), 'valid': row(valid, np.uint16), 'tstid': row(test, np.uint16)}
    savemat(root / 'setid.mat', parts)


def write_cars(root, rows: list[dict], class_names: list[str] | None = None) -> None:
    """cars_annos.mat: a row of structs, and a row of cells with the names."""
    annotations = np.empty((1, len(rows)), [(field, object) for field in CAR_FIELDS])
    for place, row in enumerate(rows):
        annotations[0, place] = tuple(row.get(field, 1) for field in CAR_FIELDS)
    content = {'annotations': annotations}
    if class_names is not None:
        content['class_names'] = np.array([class_names], object)
    savemat(root / 'cars_annos.mat', content)


def write_case(root, case: dict) -> None:
    """What an entry of the reference file describes."""
    write_text(root, case.get('files', {}))
    if 'rows' in case:
        write_cars(root, case['rows'])
    elif 'mat' in case:
        mat = case['mat']
        write_flowers(
            root, mat['imagelabels.mat:labels'], *(mat[f'setid.mat:{part}'] for part in ('trnid', 'valid', 'tstid'))
        )
