# SPDX-License-Identifier: Apache-2.0
"""Data sets, augmentation and data loading. Only `datasets.batch` and `datasets.mixing` import Paddle.

A new data set is a function from a configuration and a split to a `Dataset`:

>>> @register_dataset('mine')
... def build_mine(config, split):
...     return Dataset(FileStorage(config.DATA.DATA_PATH, paths), labels, source=config.DATA.DATA_PATH)
"""

from datasets import (  # noqa: F401 (register themselves)
    cifar,
    detection,
    digits,
    folder,
    lmdb,
    scenes,
    segmentation_layouts,
    transfer,
    zip,
)
from datasets.dataset import Dataset, FileStorage, Images, describe_empty, resolve_num_classes
from datasets.loader import Batch, Loader, build_dataloader
from datasets.registry import DATASETS, register_dataset

__all__ = [
    'Batch',
    'Dataset',
    'FileStorage',
    'Images',
    'Loader',
    'build_dataloader',
    'build_dataset',
    'describe_empty',
    'list_datasets',
    'register_dataset',
    'resolve_num_classes',
]


def build_dataset(config, split: str) -> Dataset:
    """Build the data set that DATA.DATASET names.

    Args:
        split: 'train' or 'val'.

    Raises:
        UserError: an unknown name, or missing or malformed data; the text names file and line.
    """
    return DATASETS[config.DATA.DATASET](config, split).with_channels(config.DATA.IMAGE_CHANNELS)


def list_datasets() -> list[str]:
    """Return the names that DATA.DATASET may take."""
    return list(DATASETS)
