# SPDX-License-Identifier: Apache-2.0
"""Data sets for transfer learning, in their published layouts.

Splits and class numbers are those of MAE-Lite. If a data set has a labeled test split, that is used for validation, and the
published validation split belongs to training.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from datasets.dataset import Dataset, FileStorage
from datasets.folder import data_path, read_lines
from datasets.registry import register_dataset
from utils.errors import UserError
from utils.files import open_regular, read_regular
from utils.processes import SECONDS, run_in_subprocess
from utils.text import NAME, printable

MAX_JSON = 1 << 28  # bytes; train2018.json has 120 MB
_PATH = 4096  # characters of a path: what file systems have
MAX_ENTRIES = 1 << 20  # of a MATLAB variable; the largest data set has 16185 images
MAX_MAT = 16 << 20  # bytes; cars_annos.mat has 500 kB


# ---------------------------------------------------------------------------------------------------- Flowers-102
@register_dataset('flowers102')
def build_flowers(config, split: str) -> Dataset:
    """Flowers-102: `DATA_PATH/{imagelabels.mat,setid.mat,jpg/image_00001.jpg,...}`; class names are their numbers."""
    root = _root(config, 'setid.mat', '', 'flowers-102')
    source = 'it is published, as are the images, at https://www.robots.ox.ac.uk/~vgg/data/flowers/102/'
    labels_path, parts_path = os.path.join(root, 'imagelabels.mat'), os.path.join(root, 'setid.mat')
    labels = _read_mat(labels_path, source, ['labels'])['labels']
    labels = _whole_numbers(labels, 1, 102, f"'{labels_path}', labels") - 1
    parts = ['trnid', 'valid'] if split == 'train' else ['tstid']
    content = _read_mat(parts_path, source, parts)
    images = [_whole_numbers(content[part], 1, len(labels), f"'{parts_path}', {part}") for part in parts]
    images = np.concatenate(images)
    paths = (os.path.join('jpg', f'image_{image:05d}.jpg') for image in images)
    return Dataset(FileStorage(root, paths), labels[images - 1], f"'{parts_path}'", _numbers(102))


# ---------------------------------------------------------------------------------------------------- Oxford-IIIT Pet
@register_dataset('pets')
def build_pets(config, split: str) -> Dataset:
    """Oxford-IIIT Pet: `DATA_PATH/{annotations/trainval.txt,annotations/test.txt,images/NAME.jpg}`, 37 classes."""
    root = _root(config, 'annotations', '', 'oxford-iiit-pet')
    source = 'it is in annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets/, images are in images.tar.gz'
    path = os.path.join(root, 'annotations', 'trainval.txt' if split == 'train' else 'test.txt')
    paths, labels, class_names, numbers = [], [], _numbers(37), _numbers(37)
    for number, line in read_lines(path, source):
        fields = line.split()
        if len(fields) != 4 or fields[1] not in numbers:
            raise UserError(
                f"{path}:{number}: expected 'NAME CLASS SPECIES BREED' with a class from 1 to 37, not {line.strip()!r}."
            )
        paths.append(os.path.join('images', f'{fields[0]}.jpg'))
        labels.append(int(fields[1]) - 1)
        class_names[labels[-1]] = fields[0].rsplit('_', 1)[0]  # the name of an image is its class and a number
    return Dataset(FileStorage(root, paths), labels, f"'{path}'", class_names)


# ---------------------------------------------------------------------------------------------------- FGVC-Aircraft
def _build_aircraft(level: str, config, split: str) -> Dataset:
    """FGVC-Aircraft: `fgvc-aircraft-2013b/data/{images_LEVEL_trainval.txt,images_LEVEL_test.txt,images/ID.jpg}`.

    Args:
        level: variant, family or manufacturer.
    """
    lists = {'train': f'images_{level}_trainval.txt', 'val': f'images_{level}_test.txt'}
    root = _root(config, lists[split], os.path.join('fgvc-aircraft-2013b', 'data'), 'data', '')
    entries = _read_aircraft(os.path.join(root, lists[split]))
    # A test list may lack classes, so class numbers always come from the training list.
    train_path = os.path.join(root, lists['train'])
    training = _read_aircraft(train_path) if split == 'val' and os.path.exists(train_path) else entries
    class_names = sorted({name for _, _, name in training})
    numbers = {name: number for number, name in enumerate(class_names)}
    for where, _, name in entries:
        if name not in numbers:
            raise UserError(f"{where}: '{train_path}' has no image of '{name}'; are the two lists of one release?")
    storage = FileStorage(root, (os.path.join('images', f'{image}.jpg') for _, image, _ in entries))
    labels = [numbers[name] for _, _, name in entries]
    return Dataset(storage, labels, f"'{os.path.join(root, lists[split])}'", class_names)


for _level, _name in (
    ('variant', 'aircraft'),
    ('family', 'aircraft_family'),
    ('manufacturer', 'aircraft_manufacturer'),
):
    register_dataset(_name)(functools.partial(_build_aircraft, _level))


def _read_aircraft(path: str) -> list[tuple[str, str, str]]:
    """Return ('file:line', image, class name) of each line of a list; class names may contain blanks."""
    source = 'it is in fgvc-aircraft-2013b.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/'
    entries = []
    for number, line in read_lines(path, source):
        image, _, name = line.strip().partition(' ')
        if not name.strip():
            raise UserError(f"{path}:{number}: expected 'IMAGE CLASS NAME', not {line.strip()!r}.")
        entries.append((f'{path}:{number}', image, name.strip()))
    return entries


# ---------------------------------------------------------------------------------------------------- Stanford Cars
_CARS_OFFLINE = 'which is offline: see https://web.archive.org and https://github.com/pytorch/vision/issues/7545'


@register_dataset('cars')
def build_cars(config, split: str) -> Dataset:
    """Stanford Cars, 196 classes, in either of the published layouts; where both are there, the first one is read.

    - `DATA_PATH/{cars_annos.mat,car_ims/000001.jpg,...}`
    - the devkit: `DATA_PATH/{devkit/cars_train_annos.mat,devkit/cars_meta.mat,cars_test_annos_withlabels.mat}`, beside
      `cars_train/00001.jpg,...` and `cars_test/00001.jpg,...`
    """
    root = data_path(config)
    path = os.path.join(root, 'cars_annos.mat')
    devkit = _root(config, 'devkit', '', 'stanford_cars')
    if not os.path.exists(path) and os.path.isdir(os.path.join(devkit, 'devkit')):
        return _build_devkit_cars(devkit, split)
    source = (
        'it was published, beside car_ims.tgz, at http://ai.stanford.edu/~jkrause/car196/cars_annos.mat, '
        f'{_CARS_OFFLINE}'
    )
    cars, content = _read_cars(path, source, ('relative_im_path', 'class', 'test'))
    class_names = _car_names(content)
    labels = _whole_numbers(cars['class'], 1, len(class_names), f"'{path}', class") - 1
    chosen = _whole_numbers(cars['test'], 0, 1, f"'{path}', test") == (split != 'train')
    paths = [str(name)[:_PATH] for name in cars['relative_im_path'][chosen]]
    return Dataset(FileStorage(root, paths), labels[chosen], f"'{path}'", class_names)


def _build_devkit_cars(root: str, split: str) -> Dataset:
    """Read the layout of the devkit. The test labels were published as a file of their own, beside the devkit."""
    page = f'http://ai.stanford.edu/~jkrause/cars/car_dataset.html, {_CARS_OFFLINE}'
    if split == 'train':
        path, folder, source = 'devkit/cars_train_annos.mat', 'cars_train', f'it is in car_devkit.tgz of {page}'
    else:
        path, folder, source = 'cars_test_annos_withlabels.mat', 'cars_test', f'it was published at {page}'
        path = next((name for name in (path, f'devkit/{path}') if os.path.exists(os.path.join(root, name))), path)
    path, meta = os.path.join(root, path), os.path.join(root, 'devkit', 'cars_meta.mat')
    cars, _ = _read_cars(path, source, ('fname', 'class'))
    class_names = _car_names(_read_mat(meta, source, ['class_names']) if os.path.exists(meta) else {})
    labels = _whole_numbers(cars['class'], 1, len(class_names), f"'{path}', class") - 1
    paths = [os.path.join(folder, str(name)[:_PATH]) for name in cars['fname']]
    return Dataset(FileStorage(root, paths), labels, f"'{path}'", class_names)


def _read_cars(path: str, source: str, fields: Iterable[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the structs of the variable `annotations`, which have all of `fields`, and all variables of the file."""
    content = _read_mat(path, source, ['annotations'])
    cars = np.atleast_1d(content['annotations']).ravel()
    missing = set(fields) - set(cars.dtype.names or ())
    if missing:
        raise UserError(f"'{path}', annotations have no '{sorted(missing)[0]}'; is it another file?")
    return cars, content


def _car_names(content: dict[str, Any]) -> list[str]:
    """Return the names of the classes, or their numbers where the file has no names."""
    return [str(name) for name in np.atleast_1d(content.get('class_names', _numbers(196))).ravel()]


# ---------------------------------------------------------------------------------------------------- iNaturalist 2018
@register_dataset('inaturalist2018')
def build_inaturalist(config, split: str) -> Dataset:
    """iNaturalist 2018: `{categories.json,train2018.json,val2018.json,train_val2018/SUPER/CATEGORY/*.jpg}`, 8142 classes.

    A class is the name of a category. Classes of both splits are numbered in the order of their first occurrence in the
    training annotations. The category of an image is the third part of its path.
    """
    root = data_path(config)
    categories_path, train_path, path = (
        os.path.join(root, name)
        for name in ('categories.json', 'train2018.json', 'train2018.json' if split == 'train' else 'val2018.json')
    )
    names = _fields(_read_json(categories_path), categories_path, None, 'name', str)
    train = _read_json(train_path)
    numbers: dict[str, int] = {}
    for position, category in enumerate(_fields(train, train_path, 'annotations', 'category_id', int)):
        if not 0 <= category < len(names):
            raise UserError(f"'{train_path}', annotations[{position}]: '{categories_path}' has no category {category}.")
        numbers.setdefault(names[category], len(numbers))
    paths = _fields(train if path == train_path else _read_json(path), path, 'images', 'file_name', str)
    labels = []
    for position, name in enumerate(paths):
        category = (name.split('/') + [''] * 3)[2]
        if not re.fullmatch('[0-9]{1,9}', category) or int(category) >= len(names):
            raise UserError(f"'{path}', images[{position}]: '{name}' is not below a folder named by a category.")
        if names[int(category)] not in numbers:
            raise UserError(
                f"'{path}', images[{position}]: no annotation of '{train_path}' has the category of '{name}'."
            )
        labels.append(numbers[names[int(category)]])
    return Dataset(FileStorage(root, paths), labels, f"'{path}'", list(numbers))


def _read_json(path: str) -> Any:
    """Read a JSON file of iNaturalist."""
    try:
        return json.loads(read_regular(path, MAX_JSON))
    except FileNotFoundError:
        raise UserError(
            f"'{path}' is missing; it is in {os.path.basename(path)}.tar.gz of "
            'https://github.com/visipedia/inat_comp/tree/master/2018, or give another -data_path.'
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f'{path}:{error.lineno}: damaged, {error.msg} (column {error.colno}); unpack it again.'
        ) from None
    except (
        ValueError,
        RecursionError,
        MemoryError,
    ) as error:  # bytes that are not UTF-8, numbers of thousands of digits
        raise UserError(f"'{path}' is damaged ({printable(error, NAME)}); unpack it again.") from None
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}.") from None


def _fields(content: Any, path: str, key: str | None, field: str, kind: type) -> list:
    """Return `field` of each entry of the list `content[key]`; None: `content` is the list."""
    what = key or 'entries'
    if key:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, list):
        raise UserError(f"'{path}' has no list of {what}; is it another file?")
    for position, entry in enumerate(content):
        if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
            raise UserError(f"'{path}', {what}[{position}] has no {field}; is it another file?")
    return [entry[field] for entry in content]


# ---------------------------------------------------------------------------------------------------- shared
def _root(config, landmark: str, *folders: str) -> str:
    """Return the first of `folders` below DATA_PATH that contains `landmark`, else the first folder."""
    roots = [os.path.join(data_path(config), folder) for folder in folders]
    return next((root for root in roots if os.path.exists(os.path.join(root, landmark))), roots[0])


def _numbers(count: int) -> list[str]:
    """Return the names '1' to `count` for classes without names."""
    return [str(number) for number in range(1, count + 1)]


def _read_mat(path: str, source: str, names: Iterable[str]) -> dict[str, Any]:
    """Read the variables of a MATLAB file, without dimensions of size 1.

    SciPy runs no code of the file, but a damaged file may crash it, so it runs in a subprocess.

    Args:
        source: where the file is published, for messages.
        names: required variables.
    """
    try:
        content = run_in_subprocess(_load_mat, path)
    except ImportError:
        raise UserError(f"reading '{path}' needs SciPy: pip install scipy.") from None
    except FileNotFoundError:
        raise UserError(f"'{path}' is missing; {source}, or give another -data_path.") from None
    except BrokenProcessPool:
        raise UserError(
            f"'{path}' is damaged: SciPy crashes on it, or does not read it in {SECONDS} seconds; {source}."
        ) from None
    except Exception as error:  # a damaged file can raise any exception
        reason = printable(getattr(error, 'strerror', None) or error, NAME) or type(error).__name__
        raise UserError(f"'{path}' cannot be read ({reason}); {source}.") from None
    for name in names:
        if name not in content:
            raise UserError(f"'{path}' has no variable '{name}'; {source}.")
    return content


def _load_mat(path: str) -> dict[str, Any]:
    from scipy.io import loadmat

    with open_regular(path, MAX_MAT) as file:
        content = loadmat(file, squeeze_me=True)
    for name, value in content.items():
        if np.size(value) > MAX_ENTRIES:
            raise ValueError(f"its variable '{name}' has {np.size(value)} entries, more than {MAX_ENTRIES}")
    return content


def _whole_numbers(values: Any, low: int, high: int, where: str) -> np.ndarray:
    """Convert a MATLAB array, or a field of structs, of bytes, doubles or objects to [N] int64.

    Raises:
        UserError: a value is not a whole number from `low` to `high`; the text names the first one.
    """
    numbers = np.atleast_1d(values).ravel().tolist()
    for position, value in enumerate(numbers, 1):
        if not isinstance(value, (int, float)) or not low <= value <= high or value % 1:
            shown = printable(repr(value), NAME)
            raise UserError(f'{where}: number {position} is {shown}, not a whole number from {low} to {high}.')
    return np.array(numbers, dtype=np.int64)
