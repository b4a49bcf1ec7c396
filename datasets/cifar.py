# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 in the Python layout of https://www.cs.toronto.edu/~kriz/cifar.html."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from datasets.dataset import Dataset
from datasets.folder import data_path
from datasets.registry import register_dataset
from utils.errors import UserError
from utils.files import open_regular
from utils.formats.pickles import PickleReader, mapped
from utils.text import NAME, printable

MAX_FILE = 1 << 29  # bytes; CIFAR-100's train has 155 MB


@register_dataset('cifar10')
def build_cifar10(config, split: str) -> Dataset:
    """CIFAR-10: `DATA_PATH/cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}`, or DATA_PATH is that folder."""
    files = [f'data_batch_{i}' for i in range(1, 6)] if split == 'train' else ['test_batch']
    return _build(config, 'cifar-10', 'cifar-10-batches-py', files, 'labels', 'batches.meta', 'label_names')


@register_dataset('cifar100')
def build_cifar100(config, split: str) -> Dataset:
    """CIFAR-100 with the fine labels: `DATA_PATH/cifar-100-python/{train,test,meta}`, or DATA_PATH is that folder."""
    files = ['train'] if split == 'train' else ['test']
    return _build(config, 'cifar-100', 'cifar-100-python', files, 'fine_labels', 'meta', 'fine_label_names')


class ArrayStorage:
    """Images in memory, [N, H, W, 3] uint8."""

    def __init__(self, images: np.ndarray, name: str):
        self.images = images
        self.name = name

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def describe(self, index: int) -> str:
        return f'{self.name}[{index}]'


def _build(config, name: str, folder: str, files: list[str], label_key: str, meta: str, names_key: str) -> Dataset:
    root = data_path(config)
    if not os.path.exists(os.path.join(root, meta)):
        root = os.path.join(root, folder)
    (class_names,) = _fields(os.path.join(root, meta), name, names_key)
    if not isinstance(class_names, list):
        raise UserError(f"'{os.path.join(root, meta)}' has no list of {names_key}; unpack {name}-python.tar.gz again.")
    images, labels = [], []
    for file in files:
        path = os.path.join(root, file)
        pixels, file_labels = _fields(path, name, 'data', label_key)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
            raise UserError(f"'{path}' does not hold rows of 3072 bytes; unpack {name}-python.tar.gz again.")
        if not isinstance(file_labels, list) and not (isinstance(file_labels, np.ndarray) and file_labels.ndim == 1):
            raise UserError(f"'{path}' has no list of {label_key}; unpack {name}-python.tar.gz again.")
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += file_labels.tolist() if isinstance(file_labels, np.ndarray) else file_labels
    return Dataset(ArrayStorage(np.concatenate(images), root), labels, source=f"'{root}'", class_names=class_names)


def _fields(path: str, name: str, *keys: str) -> list:
    """Return entries of a pickled dict."""
    try:
        with open_regular(path, MAX_FILE) as file, mapped(file) as stream:
            content = PickleReader().load(stream)
        if not isinstance(content, dict):
            raise ValueError('it holds no dict')
        missing = [key for key in keys if key not in content]
        if missing:
            raise ValueError(f'it has no {missing[0]}')
        return [content[key] for key in keys]
    except FileNotFoundError:
        raise UserError(
            f"'{path}' is missing; unpack https://www.cs.toronto.edu/~kriz/{name}-python.tar.gz into DATA.DATA_PATH."
        ) from None
    except Exception as error:  # a damaged pickle can raise any exception
        reason = printable(getattr(error, 'strerror', None) or error, NAME) or type(error).__name__
        raise UserError(f"'{path}' is damaged ({reason}); unpack {name}-python.tar.gz again.") from None
