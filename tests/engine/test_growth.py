# SPDX-License-Identifier: Apache-2.0
"""The memory of a run does not grow with the number of its epochs."""

import gc
import os
import threading

import numpy as np
import paddle

from config import get_config
from engine import train
from engine.run import run_config
from tests.runs.conftest import recipe  # noqa: F401
from utils.device import upload


def test_an_upload_leaves_nothing_behind():
    """Each call of paddle.to_tensor leaks a list."""
    arrays = [np.arange(12, dtype=kind).reshape(3, 4) for kind in ('uint8', 'int32', 'int64', 'float32', 'float64')]
    arrays += [
        arrays[0].T,
        arrays[3][:, ::2],
        np.array([True, False]),
        np.zeros((0, 3), 'float32'),
        np.array(3, 'float32'),
    ]
    for array in arrays:
        tensor, expected = upload(array), paddle.to_tensor(array)
        assert tensor.dtype == expected.dtype and tensor.place._equals(expected.place)
        assert tensor.stop_gradient and not tensor.persistable
        np.testing.assert_array_equal(tensor.numpy(), array)
        before = array.copy()
        array[...] = 0
        np.testing.assert_array_equal(tensor.numpy(), before)
    gc.collect()
    count = len(gc.get_objects())
    for _ in range(100):
        upload(arrays[3])
    gc.collect()
    assert len(gc.get_objects()) - count < 10


def test_nothing_grows_from_epoch_to_epoch(recipe, monkeypatch):  # noqa: F811
    """Objects, open files, memory maps and threads after 3 and after 10 epochs."""
    seen, finish = [], train.Trainer._finish_epoch

    def count(self):
        finish(self)
        gc.collect()
        with open('/proc/self/maps', 'rb') as maps:
            regions = sum(1 for _ in maps)
        seen.append((len(gc.get_objects()), len(os.listdir('/proc/self/fd')), regions, threading.active_count()))

    monkeypatch.setattr(train.Trainer, '_finish_epoch', count)
    config = get_config(recipe, ['TRAIN.NUM_EPOCHS', 10, 'SAVE_STEPS', 0, 'DATA.NUM_WORKERS', 1])
    config.defrost()
    run_config(config)
    early, late = seen[2], seen[9]
    assert late[0] - early[0] < 7 * 20, (early, late)  # with a leak in each upload it was 7 * 59
    assert late[1] <= early[1] and late[2] - early[2] <= 8 and late[3] <= early[3], (early, late)
