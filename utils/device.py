# SPDX-License-Identifier: Apache-2.0
"""Copies between host and device that do not wait for the queue of a GPU. Worker processes must not import this module.

`paddle.to_tensor(array)` and `Tensor.numpy()` wait until a GPU has finished all work that was queued before. The functions
below go through pinned memory, from and to which a GPU copies while the host continues. `Copies` uses a stream of its own, so
that the GPU copies and computes at the same time.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping

import numpy as np
import paddle
from paddle import Tensor
from paddle.device import Event, Stream, current_stream, stream_guard


def on_gpu() -> bool:
    """Return True if the current device is a GPU."""
    return paddle.device.get_device().startswith('gpu')


def upload(array: np.ndarray) -> Tensor:
    """Copy an array to the current device; the array may change afterwards."""
    if not on_gpu():
        return _copied(array)
    pinned = _pinned.copy(array)
    tensor = pinned.cuda(blocking=False)
    _pinned.keep([pinned])
    return tensor


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


class Copies:
    """Copies of arrays to the GPU, on a stream of their own; the arrays may change as soon as this object is built.

    Pinned memory is filled straight from the arrays. Destinations are allocated for the stream of the computation, whose earlier
    work may still use their memory: the copies wait for all work that is queued at this point, and for none that is queued later.

    Args:
        arrays: by name.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        pinned = {name: _pinned.copy(array) for name, array in arrays.items()}
        self._tensors = {name: paddle.empty(array.shape, array.dtype) for name, array in pinned.items()}
        stream, allocated = _copy_stream(paddle.device.get_device()), Event()
        allocated.record()
        stream.wait_event(allocated)
        with stream_guard(stream):
            for name, tensor in self._tensors.items():
                tensor.copy_(pinned[name], False)
            # With the destinations, which a batch that is dropped must not free under a copy.
            self._copied = _pinned.keep([*pinned.values(), *self._tensors.values()])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, for work that is queued from now on; the stream of the computation waits, the host does not."""
        current_stream().wait_event(self._copied)
        return self._tensors


@functools.lru_cache(maxsize=8)
def _copy_stream(device: str) -> Stream:
    """Return the stream for copies to `device`, the current one."""
    return Stream()


class _Pinned:
    """Pinned memory, which is kept until a GPU has read it."""

    def __init__(self):
        self._in_flight: deque[tuple[Event, list[Tensor]]] = deque()

    def copy(self, array: np.ndarray) -> Tensor:
        """Copy an array to pinned memory."""
        while self._in_flight and self._in_flight[0][0].query():
            self._in_flight.popleft()
        return paddle.to_tensor(array, place=paddle.CUDAPinnedPlace())

    def keep(self, tensors: list[Tensor]) -> Event:
        """Keep the tensors of copies until the current stream is done with them. Return the event of that moment."""
        done = Event()
        done.record()
        self._in_flight.append((done, tensors))
        return done


_pinned = _Pinned()
