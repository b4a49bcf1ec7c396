# SPDX-License-Identifier: Apache-2.0
"""Copies between host and device that do not wait for the queue of a GPU. Worker processes must not import this module.

`paddle.to_tensor(array)` and `Tensor.numpy()` wait until a GPU has finished all work that was queued before. The functions
below go through pinned memory, from and to which a GPU copies while the host continues.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import paddle
from paddle import Tensor
from paddle.device import Event


def on_gpu() -> bool:
    """Return True if the current device is a GPU."""
    return paddle.device.get_device().startswith('gpu')


def upload(array: np.ndarray) -> Tensor:
    """Copy an array to the current device; the array may change afterwards."""
    return _staging.upload(array) if on_gpu() else _copied(array)


def _copied(array: np.ndarray) -> Tensor:
    """Copy an array to a tensor on the CPU; each call of `paddle.to_tensor` leaks a list of 120 bytes (Paddle 3.3.1)."""
    array = np.asarray(array)
    tensor = paddle.empty(array.shape, str(array.dtype))
    if array.size:
        tensor.set_value(array)
    return tensor


class Download:
    """Values of a tensor, on the way to the host; the tensor may change afterwards."""

    def __init__(self, tensor: Tensor):
        self._copied = Event() if on_gpu() else None
        if self._copied is None:
            self._values = tensor.clone()
        else:
            self._values = tensor.pin_memory(blocking=False)
            self._copied.record()

    def numpy(self) -> np.ndarray:
        """Wait for this copy, not for later work, and return the values."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.numpy()


class _Staging:
    """Pinned copies of arrays, each kept until the GPU has read it."""

    def __init__(self):
        self._in_flight: deque[tuple[Event, Tensor]] = deque()

    def upload(self, array: np.ndarray) -> Tensor:
        """Copy an array to pinned memory, and queue its copy to the GPU."""
        while self._in_flight and self._in_flight[0][0].query():
            self._in_flight.popleft()
        pinned = paddle.to_tensor(array, place=paddle.CUDAPinnedPlace())
        tensor, copied = pinned.cuda(blocking=False), Event()
        copied.record()
        self._in_flight.append((copied, pinned))
        return tensor


_staging = _Staging()
