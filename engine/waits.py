# SPDX-License-Identifier: Apache-2.0
"""Count the operations with which the host waits for the queue of a GPU, to check that a training step has none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import paddle
from paddle import Tensor

from engine.paddle_private import OPERATORS, WAITING

# Operations that copy values between host and device, and wait for all work that was queued before.
READS = ('numpy', 'item', 'tolist', 'cpu', '__bool__', '__float__', '__int__', '__index__', '__array__')


def is_on_gpu(tensor: Tensor) -> bool:
    """Return True if reading a tensor waits for a GPU; pinned memory is read at once."""
    return tensor.place.is_gpu_place()


@contextlib.contextmanager
def count_waits(waits: Callable[[Tensor], bool] = is_on_gpu) -> Iterator[list[str]]:
    """Append the name of each operation that waits to a list.

    Args:
        waits: returns True for a tensor whose reading waits.
    """
    found: list[str] = []
    depth = [0]  # operations may call one another; the outermost counts

    def counted(name: str, original: Callable, applies: Callable[..., bool]) -> Callable:
        def call(*args, **options):
            if depth[0] == 0 and applies(*args, **options):
                found.append(name)
            depth[0] += 1
            try:
                return original(*args, **options)
            finally:
                depth[0] -= 1

        return call

    with contextlib.ExitStack() as stack:
        operations = [(Tensor, name, lambda tensor, *_, **__: waits(tensor)) for name in READS]
        operations.append((paddle, 'to_tensor', lambda *_, place=None, **__: place is None))
        operations.append((Tensor, 'set_value', lambda _, value: not isinstance(value, Tensor)))
        operations.append((Tensor, '__getitem__', lambda _, index: _reads_index(index)))
        operations += [
            (OPERATORS, name, lambda x, *others, **_: waits(x) and None not in others[1:2]) for name in WAITING
        ]
        for owner, name, applies in operations:
            replaced = counted(name, getattr(owner, name), applies)
            stack.enter_context(mock.patch.object(owner, name, replaced))
        assign = counted('grad', Tensor.grad.__set__, lambda *_: True)  # copies, and waits
        stack.enter_context(mock.patch.object(Tensor, 'grad', property(Tensor.grad.__get__, assign)))
        yield found


def _reads_index(index) -> bool:
    """Return True if the shape of the result or its place depends on the values of a tensor: a mask, or a 0-D tensor."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and (part.dtype == paddle.bool or not part.shape) for part in parts)
