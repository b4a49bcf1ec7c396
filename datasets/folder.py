# SPDX-License-Identifier: Apache-2.0
"""Data sets of image files: a folder per class, or list files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np

from datasets.dataset import Dataset, FileStorage
from datasets.images import EXTENSIONS
from datasets.registry import register_dataset
from utils.errors import UserError


# ---------------------------------------------------------------------------------------------------- folders
@register_dataset('folder')
def build_folder(config, split: str) -> Dataset:
    """`DATA_PATH/train/<class>/**` and `DATA_PATH/val/<class>/**`; classes are numbered in sorted order."""
    root = data_path(config)
    folder = os.path.join(root, split)
    # Validation may lack classes; they are numbered as in training. Only folder names of the training part are read.
    train = os.path.join(root, 'train')
    names = class_folders(train if os.path.isdir(train) else folder)
    return image_folder(folder, names)


def image_folder(folder: str, names: list[str]) -> Dataset:
    """Images below `folder/<name>` for each class name."""
    paths, labels = listed_images(folder, names)
    return Dataset(FileStorage(folder, paths), labels, source=f"'{folder}'", class_names=names)


def listed_images(folder: str, names: list[str]) -> tuple[list[str], np.ndarray]:
    """Image paths relative to `folder`, in the order of torchvision's ImageFolder, and labels, places in `names`.

    Raises:
        UserError: a class folder that `names` lacks, or one without an image. A name without a folder has no images.
    """
    present = class_folders(folder)
    unknown = sorted(set(present) - set(names))
    if unknown:
        raise UserError(f"class folder '{os.path.join(folder, unknown[0])}' has no counterpart in the training part.")
    paths, labels = [], []
    for name in present:
        found = images_below(folder, name)
        if not found:
            raise UserError(
                f"class folder '{os.path.join(folder, name)}' holds no image ({' '.join(EXTENSIONS)}); "
                'remove it or fill it.'
            )
        paths += found
        labels += [names.index(name)] * len(found)
    return paths, np.array(labels, dtype=np.int64)


def class_folders(folder: str) -> list[str]:
    """Sorted names of the sub-folders of `folder`; hidden ones do not count."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
    except OSError as error:
        raise UserError(f"cannot read the folder '{folder}' ({error.strerror}); check DATA.DATA_PATH.") from None
    if not names:
        raise UserError(f"'{folder}' has no class folders; images are expected in {folder}/<class>/.")
    return names


def images_below(folder: str, name: str) -> list[str]:
    """Paths, relative to `folder`, of the image files anywhere below `folder/name`, sorted as ImageFolder does."""
    paths = []
    for directory, _, files in sorted(os.walk(os.path.join(folder, name), followlinks=True)):
        relative = os.path.relpath(directory, folder)
        paths += [
            os.path.join(relative, file)
            for file in sorted(files)
            if file.lower().endswith(EXTENSIONS) and not file.startswith('.')
        ]
    return paths


# ---------------------------------------------------------------------------------------------------- lists
@register_dataset('list')
def build_list(config, split: str) -> Dataset:
    """`DATA_PATH/train_list.txt` and `DATA_PATH/val_list.txt`, a line per image: relative path, white space, label."""
    root = data_path(config)
    path = list_path(root, split)
    paths, labels = read_list(path, config.MODEL.NUM_CLASSES)
    dataset = Dataset(FileStorage(root, paths), labels, source=f"'{path}'")
    _check_any_exists(dataset, path)
    return dataset


@register_dataset('imagenet2012', 'imagenet')
def build_imagenet(config, split: str) -> Dataset:
    """List files as PaddleViT writes them; where there are none, `train/` and `val/` with a folder per class."""
    root = data_path(config)
    if not os.path.exists(list_path(root, split)) and os.path.isdir(os.path.join(root, split)):
        return build_folder(config, split)
    return build_list(config, split)


def list_path(root: str, split: str) -> str:
    return os.path.join(root, f'{split}_list.txt')


def read_list(path: str, num_classes: int | None = None) -> tuple[list[str], np.ndarray]:
    """Reads a list file; blank lines do not count.

    Returns:
        Relative paths, which may contain blanks, and labels [N] int64.

    Raises:
        UserError: naming file and line, for a line that is not 'path label' or a label outside `num_classes`.
    """
    hint = f'`python tools/make_lists.py -data_path {os.path.dirname(path)}` writes it from a folder tree'
    entries = list(read_entries(path, _path_and_label, "'relative/path label'", hint, num_classes))
    return [name for _, name, _ in entries], np.array([label for _, _, label in entries], dtype=np.int64)


def _path_and_label(line: str) -> list[str]:
    return [field.strip() for field in line.rsplit(None, 1)]


def read_entries(
    path: str, fields: Callable[[str], list[str]], form: str, hint: str, num_classes: int | None
) -> Iterator[tuple[str, str, int]]:
    """Yields ('file:line', name, label) of each line of a list file that is not blank.

    Args:
        fields: takes a line apart, into name and label.
        form: what a line should look like, for messages.
        hint: how to get the file where it is missing.

    Raises:
        UserError: naming file and line, for a line of another form or a label outside `num_classes`.
    """
    for where, line in read_lines(path, hint):
        found = fields(line)
        if len(found) != 2 or not (found[1].isascii() and found[1].isdecimal()):
            raise UserError(f'{where}: expected {form} with a label of 0 or more, not {line.strip()!r}.')
        name, label = found[0], int(found[1])
        if num_classes is not None and label >= num_classes:
            raise UserError(
                f'{where}: label {label} is out of range, MODEL.NUM_CLASSES is {num_classes} '
                f'(labels 0 to {num_classes - 1}).'
            )
        yield where, name, label


def read_lines(path: str, hint: str) -> Iterator[tuple[str, str]]:
    """Yields ('file:line', line) of each line of a list file that is not blank.

    Args:
        hint: how to get the file where it is missing.
    """
    try:
        with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f'{path}:{number}', line
    except FileNotFoundError:
        raise UserError(f"list file '{path}' is missing; {hint}, or give another -data_path.") from None
    except OSError as error:
        raise UserError(f"cannot read the list file '{path}': {error.strerror}.") from None


def _check_any_exists(dataset: Dataset, path: str, probes: int = 16) -> None:
    """A wrong DATA_PATH should show at once: of a few entries all over the list at least one must be there."""
    places = np.unique(np.linspace(0, len(dataset) - 1, probes).astype(int))
    if not any(os.path.exists(dataset.describe(index)) for index in places):
        raise UserError(
            f"'{path}' names '{dataset.describe(0)}', which does not exist, nor do others that were tried; "
            'paths are relative to the folder of the list (DATA.DATA_PATH).'
        )


def data_path(config) -> str:
    """DATA.DATA_PATH, an existing folder."""
    path = os.path.expanduser(config.DATA.DATA_PATH)
    if not os.path.isdir(path):
        raise UserError(f"the data folder '{path}' does not exist; set -data_path (DATA.DATA_PATH).")
    return path
