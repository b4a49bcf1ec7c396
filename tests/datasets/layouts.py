# SPDX-License-Identifier: Apache-2.0
"""Small data sets on disk, laid out as their authors publish them."""

from __future__ import annotations

import json

import numpy as np
from scipy.io import savemat

BOX_FIELDS = ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2')
CAR_FIELDS = ('relative_im_path', *BOX_FIELDS, 'class', 'test')


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
    content = {'annotations': _structs(rows, CAR_FIELDS)}
    if class_names is not None:
        content['class_names'] = np.array([class_names], object)
    savemat(root / 'cars_annos.mat', content)


def write_devkit_cars(root, train: list, test: list | None, class_names: list[str] | None = None, labels='') -> None:
    """Files of the devkit for (class, file name) of each car, and the file with the test labels in the folder `labels`."""
    (root / 'devkit').mkdir(parents=True, exist_ok=True)
    for name, cars in (('devkit/cars_train_annos', train), (f'{labels}/cars_test_annos_withlabels', test)):
        if cars is not None:
            rows = [{'class': number, 'fname': file} for number, file in cars]
            structs = _structs(rows, (*BOX_FIELDS, 'class', 'fname'))
            savemat(root / f'{name.lstrip("/")}.mat', {'annotations': structs})
    if class_names is not None:
        savemat(root / 'devkit' / 'cars_meta.mat', {'class_names': np.array([class_names], object)})


def _structs(rows: list[dict], fields: tuple[str, ...]) -> np.ndarray:
    structs = np.empty((1, len(rows)), [(field, object) for field in fields])
    for place, row in enumerate(rows):
        structs[0, place] = tuple(row.get(field, 1) for field in fields)
    return structs


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
