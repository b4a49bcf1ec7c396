# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a list file with many lines, whose images are one picture."""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from config import get_config
from datasets import build_dataset
from datasets.dataset import EncodedStorage, Storage
from datasets.loader import build_dataloader
from models.registry import config_file
from utils.processes import resident_memory

BATCH_SIZE, WORKERS, BATCHES = 256, 2, 8
_CLASSES = 1000
_MB = 1e6


class OnePicture(EncodedStorage):
    """A storage whose images all have the content of one file; their names are those of another storage."""

    def __init__(self, storage: Storage, content: bytes):
        self.storage = storage
        self.content = content

    def __len__(self) -> int:
        return len(self.storage)

    def describe(self, index: int) -> str:
        return self.storage.describe(index)

    def read(self, index: int) -> bytes:
        self.describe(index)  # reads the memory of the name
        return self.content


def measure_list(folder: str, count: int) -> dict[str, float]:
    """Return processor seconds and memory, in MB, of data set, first batch of an epoch, and one of two workers."""
    path, content = write_list(folder, count)
    options = ['DATA.DATASET', 'list', 'DATA.DATA_PATH', folder, 'DATA.IMAGE_SIZE', 32, 'TRAIN.REPEATED_AUG', 0]
    options += ['DATA.BATCH_SIZE', BATCH_SIZE, 'DATA.NUM_WORKERS', WORKERS]
    config = get_config(config_file('deit_small_patch16_224'), options)
    found: dict[str, float] = {'images': count, 'list MB': os.path.getsize(path) / _MB}
    dataset = measured(found, 'data set', lambda: build_dataset(config, 'train'))
    dataset = dataset.with_storages(lambda storage: OnePicture(storage, content))
    with build_dataloader(config, dataset, training=True) as loader:
        batches = measured(found, 'epoch', lambda: started(loader))
        for _ in itertools.islice(batches, BATCHES):
            pass
        found['worker MB'] = max(private_memory(child.pid) for child in multiprocessing.active_children()) / _MB
    return found


def write_list(folder: str, count: int) -> tuple[str, bytes]:
    """Write a list file with names like ImageNet's, and the first of its images. Return its path and that image."""
    names = (f'train/n{i % _CLASSES:08d}/n{i % _CLASSES:08d}_{i:08d}.JPEG' for i in range(count))
    path, first = os.path.join(folder, 'train_list.txt'), os.path.join(folder, 'train', 'n00000000')
    with open(path, 'w', encoding='utf-8') as file:
        file.writelines(f'{name} {index % _CLASSES}\n' for index, name in enumerate(names))
    picture = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(picture, 'JPEG')
    os.makedirs(first)
    with open(os.path.join(first, 'n00000000_00000000.JPEG'), 'wb') as file:
        file.write(picture.getvalue())
    return path, picture.getvalue()


def started(loader):
    """Start an epoch, up to its first batch. Return the iterator."""
    batches = loader.epoch(1)
    next(batches)
    return batches


def measured(found: dict[str, float], name: str, call: Callable):
    """Call a function; add its processor seconds, the memory that it keeps and its peak. Return its result."""
    before, begun = resident_memory('VmRSS'), time.process_time()
    with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # resets the peak
    result = call()
    found[f'{name} s'] = time.process_time() - begun
    found[f'{name} MB'] = (resident_memory('VmRSS') - before) / _MB
    found[f'{name} peak MB'] = (resident_memory('VmHWM') - before) / _MB
    return result


def private_memory(process: int) -> int:
    """Return the bytes of a process that it shares with no other."""
    with open(f'/proc/{process}/smaps_rollup', encoding='ascii') as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith(('Private_Dirty', 'Private_Clean')))
