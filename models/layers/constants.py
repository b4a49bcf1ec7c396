# SPDX-License-Identifier: Apache-2.0
"""Constant arrays as tensors, copied to each device once: such a copy lets the host wait for the queue of a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import numpy as np
import paddle
from paddle import Tensor


def constant(make: Callable[..., np.ndarray], *arguments: Hashable) -> Tensor:
    """Return `make(*arguments)` as a tensor on the current device, which must not be changed.

    It is made once for the same arguments. While a program is traced, it becomes a constant of the program.
    """
    if not paddle.in_dynamic_mode():
        return paddle.to_tensor(make(*arguments))
    return _on_device(make, arguments, paddle.device.get_device())


@functools.lru_cache(maxsize=256)
def _on_device(make: Callable[..., np.ndarray], arguments: tuple[Hashable, ...], device: str) -> Tensor:
    return paddle.to_tensor(make(*arguments))
