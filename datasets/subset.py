# SPDX-License-Identifier: Apache-2.0
"""Subsets of a data set."""

from __future__ import annotations

import numpy as np
from PIL import Image

from datasets.dataset import Dataset, EncodedStorage, Storage


def random_subset(dataset: Dataset, size: int, seed: int) -> Dataset:
    """Draw at most `size` images by `seed` without replacement, in the order of the data set."""
    return _subset(dataset, np.sort(np.random.default_rng(seed).permutation(len(dataset))[:size]))


def first_images(dataset: Dataset, size: int) -> Dataset:
    """Take the first images, at most `size`."""
    return _subset(dataset, np.arange(min(size, len(dataset))))


def evenly_spaced(dataset: Dataset, size: int) -> Dataset:
    """Take evenly spaced images, at most `size`."""
    size = min(size, len(dataset))
    return _subset(dataset, np.arange(size) * len(dataset) // size)


def _subset(dataset: Dataset, indices: np.ndarray) -> Dataset:
    if len(indices) == len(dataset):
        return dataset
    encoded = isinstance(dataset.storage, EncodedStorage)
    storage = (EncodedSubset if encoded else SubsetStorage)(dataset.storage, indices)
    subset = Dataset(storage, dataset.labels[indices], dataset.source, dataset.class_names)
    return subset.with_channels(dataset.channels)


class SubsetStorage(Storage):
    """The items `indices` of another storage."""

    def __init__(self, storage: Storage, indices: np.ndarray):
        self.storage = storage
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Image.Image:
        return self.storage.open(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.storage.describe(int(self.indices[index]))


class EncodedSubset(SubsetStorage, EncodedStorage):
    """The items `indices` of a storage of image files."""

    def read(self, index: int) -> bytes:
        return self.storage.read(int(self.indices[index]))
