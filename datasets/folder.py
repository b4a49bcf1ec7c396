# SPDX-License-Identifier: Apache-2.0
"""Data sets of image files: a folder per class, or list files."""

from __future__ import annotations

import dataclasses
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from datasets.bands import image_extensions
from datasets.dataset import Dataset, FileStorage, PackedStrings, Storage
from datasets.images import EXTENSIONS
from datasets.registry import register_dataset
from datasets.walk import describe_counts, describe_left_out, folders_in, images_below
from utils.environment import expand_user
from utils.errors import UserError
from utils.files import open_regular

_DIGITS = 9  # maximum of a label, since LMDB files store it in 32 bits
_QUOTED = 200  # characters of a line in a message
_LINE = 65536  # characters of a line that are read; paths have at most 4096


# ---------------------------------------------------------------------------------------------------- folders
@register_dataset('folder')
def build_folder(config, split: str) -> Dataset:
    """Class folders `DATA_PATH/{train,val}/<class>/**`; classes are numbered in sorted order."""
    root = data_path(config)
    folder = os.path.join(root, split)
    # `val` may lack classes, so class numbers always come from the folder names of `train`.
    train = os.path.join(root, 'train')
    names = class_folders(train if os.path.isdir(train) else folder)
    return image_folder(folder, names, image_extensions(config.DATA.IMAGE_CHANNELS))


def image_folder(folder: str, names: list[str], extensions: tuple[str, ...] = EXTENSIONS) -> Dataset:
    """Build a data set of the images below `folder/<name>` for each class name."""
    paths, labels, left_out = listed_images(folder, names, extensions)
    notes = [left_out] if left_out else []
    return Dataset(FileStorage(folder, paths), labels, source=f"'{folder}'", class_names=names, notes=notes)


def listed_images(
    folder: str, names: list[str], extensions: tuple[str, ...] = EXTENSIONS
) -> tuple[list[str], np.ndarray, str]:
    """List the images below the class folders of `folder`.

    Returns:
        Paths relative to `folder` in the order of torchvision's ImageFolder, labels (indices of `names`), and a sentence
        about skipped files, '' if there are none.

    Raises:
        UserError: a class folder is missing in `names`, or has no image. A name without a folder has no images.
    """
    present = class_folders(folder)
    unknown = sorted(set(present) - set(names))
    if unknown:
        raise UserError(f"class folder '{os.path.join(folder, unknown[0])}' has no counterpart in the training part.")
    paths, labels, left_out = [], [], Counter()
    for name in present:
        found, others = images_below(folder, name, extensions)
        if not found:
            only = f', only other files ({describe_counts(others)})' if others else ''
            raise UserError(
                f"class folder '{os.path.join(folder, name)}' holds no image ({' '.join(extensions)}){only}; "
                'remove it or fill it.'
            )
        paths += found
        labels += [names.index(name)] * len(found)
        left_out += others
    return paths, np.array(labels, dtype=np.int64), describe_left_out(left_out, folder)


def class_folders(folder: str) -> list[str]:
    """Return the sorted names of the subfolders of `folder`, without hidden ones."""
    names = folders_in(folder)
    if not names:
        raise UserError(f"'{folder}' has no class folders; images are expected in {folder}/<class>/.")
    return names


# ---------------------------------------------------------------------------------------------------- lists
@register_dataset('list')
def build_list(config, split: str) -> Dataset:
    """List files `DATA_PATH/{train,val}_list.txt`. A line per image holds a relative path, white space and a label."""
    root = data_path(config)
    listing = _read_image_list(list_path(root, split), config.MODEL.NUM_CLASSES)
    dataset = listing.dataset(FileStorage(root, listing.names))
    _check_any_exists(dataset, listing.path)
    return dataset


@register_dataset('imagenet2012', 'imagenet')
def build_imagenet(config, split: str) -> Dataset:
    """ImageNet: PaddleViT's list files; without them class folders below `train/` and `val/`."""
    root = data_path(config)
    if not os.path.exists(list_path(root, split)) and os.path.isdir(os.path.join(root, split)):
        return build_folder(config, split)
    return build_list(config, split)


def list_path(root: str, split: str) -> str:
    return os.path.join(root, f'{split}_list.txt')


def read_list(path: str, num_classes: int | None = None) -> tuple[list[str], np.ndarray]:
    """Read a list file; skip blank lines.

    Returns:
        Relative paths, which may contain blanks, and labels [N] int64.

    Raises:
        UserError: a line is not 'path label', or a label is not below `num_classes`; the text names file and line.
    """
    listing = _read_image_list(path, num_classes)
    return list(listing.names), listing.labels


def _read_image_list(path: str, num_classes: int | None) -> Listing:
    root = os.path.dirname(path)
    hint = f'`python tools/make_lists.py -data_path {root}` writes it from a folder tree'
    listing = read_listing(path, _path_and_label, "'relative/path label'", hint, num_classes)
    for index in listing.names.starting_with('#'):
        name = listing.names[index]
        if not os.path.exists(os.path.join(root, name)):
            raise UserError(f"{listing.where(index)}: there is no file '{name}'; remove the line if it is a comment.")
    return listing


def _path_and_label(line: str) -> list[str]:
    return [field.strip() for field in line.rsplit(None, 1)]


@dataclasses.dataclass
class Listing:
    """Content of a list file. Nothing in it is a Python object per line, so that long lists fit into memory.

    Attributes:
        path: path of the list file.
        numbers: [N] line numbers of the items, from 1.
        names: names of the items.
        hashes: [N] int64, hash values of the names.
        labels: [N] int64.
    """

    path: str
    numbers: Sequence[int]
    names: PackedStrings
    hashes: np.ndarray
    labels: np.ndarray

    def where(self, index: int) -> str:
        """Return file and line of an item."""
        return f'{self.path}:{self.numbers[index]}'

    def dataset(self, storage: Storage) -> Dataset:
        """Build the data set of the items, which `storage` opens."""
        path, numbers, notes = self.path, self.numbers, self._contradictions()
        return Dataset(storage, self.labels, f"'{path}'", notes=notes, locate=lambda index: f'{path}:{numbers[index]}')

    def _contradictions(self) -> list[str]:
        """Return a sentence about names with several different labels, or an empty list."""
        first: dict[str, int] = {}
        names = ((self.names[index], index) for index in repeated(self.hashes))
        pairs = [(first.setdefault(name, index), index) for name, index in names]
        pairs = [(one, other) for one, other in pairs if self.labels[one] != self.labels[other]]
        return [
            f"{self.where(other)}: '{self.names[other]}' has label {self.labels[other]}, but {self.labels[one]} in line "
            f'{self.numbers[one]}; {len(pairs)} lines in total contradict an earlier one.'
            for one, other in pairs[:1]
        ]


def repeated(values: np.ndarray) -> list[int]:
    """Return the indices of the values that occur more than once, in ascending order."""
    ordered = np.sort(values)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.flatnonzero(np.isin(values, again)).tolist() if len(again) else []


def read_listing(
    path: str, fields: Callable[[str], list[str]], form: str, hint: str, num_classes: int | None
) -> Listing:
    """Read a list file; skip blank lines.

    Args:
        fields: splits a line into name and label.
        form: expected form of a line, for messages.
        hint: how to get a missing file, for messages.

    Raises:
        UserError: a line has another form, or a label is not below `num_classes`; the text names file and line.
    """
    numbers, hashes, labels = array('q'), array('q'), array('q')

    def names() -> Iterator[str]:
        for number, line in read_lines(path, hint):
            found = fields(line)
            if len(found) != 2 or not (found[1].isascii() and found[1].isdecimal()):
                raise UserError(
                    f'{path}:{number}: expected {form} with a label of 0 or more, not {line.strip()[:_QUOTED]!r}.'
                )
            numbers.append(number)
            labels.append(_label(found[1], num_classes, path, number))
            hashes.append(hash(found[0]))
            yield found[0]

    packed = PackedStrings(names())
    lines = range(1, len(packed) + 1) if numbers and numbers[-1] == len(packed) else numbers  # without blank lines
    return Listing(path, lines, packed, np.array(hashes, np.int64), np.array(labels, np.int64))


def _label(digits: str, num_classes: int | None, path: str, number: int) -> int:
    digits = digits.lstrip('0') or '0'
    if num_classes is not None and (len(digits) > _DIGITS or int(digits) >= num_classes):
        raise UserError(
            f'{path}:{number}: label {digits[:_QUOTED]} is out of range, MODEL.NUM_CLASSES is {num_classes} '
            f'(labels 0 to {num_classes - 1}).'
        )
    if len(digits) > _DIGITS:
        raise UserError(f'{path}:{number}: label {digits[:_QUOTED]} is too large: at most {_DIGITS} digits are read.')
    return int(digits)


def read_lines(path: str, hint: str) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of each non-blank line of a list file.

    Args:
        hint: how to get a missing file, for messages.
    """
    try:
        with open_regular(path, encoding='utf-8-sig', errors='surrogateescape') as file:
            for number, line in enumerate(iter(lambda: file.readline(_LINE), ''), 1):
                if len(line) == _LINE:
                    raise UserError(f'{path}:{number}: the line has {_LINE} characters or more; is it a list file?')
                if '\0' in line:
                    raise UserError(f'{path}:{number}: a zero byte in the line; remove it, or save the list as UTF-8.')
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise UserError(f"list file '{path}' is missing; {hint}, or give another -data_path.") from None
    except OSError as error:
        raise UserError(f"cannot read the list file '{path}': {error.strerror}.") from None


def _check_any_exists(dataset: Dataset, path: str, probes: int = 16) -> None:
    """Raise UserError if none of a few evenly spaced entries exists, which shows a wrong DATA_PATH at the start."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, probes).astype(int))
    if not any(os.path.exists(dataset.describe(index)) for index in indices):
        raise UserError(
            f"'{path}' names '{dataset.describe(0)}', which does not exist, and neither do other entries; "
            'paths are relative to the folder of the list (DATA.DATA_PATH).'
        )


def data_path(config) -> str:
    """Return DATA.DATA_PATH, an existing folder."""
    path = expand_user(config.DATA.DATA_PATH)
    if not os.path.isdir(path):
        state = 'is not a folder' if os.path.exists(path) else 'does not exist'
        raise UserError(f"the data folder '{path}' {state}; set -data_path (DATA.DATA_PATH).")
    return path
