# SPDX-License-Identifier: Apache-2.0
"""The GPU path of the training loop on a CPU: branches are forced, and kernels that a CPU lacks are avoided."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections import deque
from types import SimpleNamespace

import paddle
import pytest
from paddle import nn

import utils.device
from engine.distributed import Context
from tasks.classification import ClassificationTask

GPU = Context(0, 1, True)
PLACE = SimpleNamespace(is_gpu_place=lambda: True, is_xpu_place=lambda: False, is_custom_place=lambda: False)
AUTO_CAST, GRAD_SCALER = 'paddle.amp.auto_cast', 'paddle.amp.grad_scaler'


@pytest.fixture
def gpu(monkeypatch) -> Context:
    """A context whose run takes the branches of a GPU. Autocast stays off: a CPU has no half-precision kernels."""
    tracer, decorate = SimpleNamespace(_expected_place=PLACE), paddle.amp.decorate
    auto_cast = sys.modules[AUTO_CAST]

    def forced(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(auto_cast, '_dygraph_tracer', lambda: tracer)
            return decorate(*args, **options)

    monkeypatch.setattr(paddle.amp, 'decorate', forced)
    monkeypatch.setattr(sys.modules[GRAD_SCALER], '_dygraph_tracer', lambda: tracer)
    for kind in ('float16', 'bfloat16'):
        monkeypatch.setattr(auto_cast, f'_is_gpu_{kind}_supported', lambda: True)
        monkeypatch.setattr(paddle.amp, f'is_{kind}_supported', lambda: True)
    monkeypatch.setattr(paddle.device.cuda, 'max_memory_allocated', lambda: 0)
    _force_copies(monkeypatch)
    return GPU


def _force_copies(monkeypatch) -> None:
    """Let copies between host and device take the way through pinned memory, which is that of the CPU."""
    monkeypatch.setattr(utils.device, 'on_gpu', lambda: True)
    monkeypatch.setattr(utils.device, 'Event', Event)
    monkeypatch.setattr(utils.device, 'Stream', Stream)
    monkeypatch.setattr(utils.device, 'current_stream', lambda: Computation)
    monkeypatch.setattr(utils.device, 'stream_guard', Stream.guard)
    monkeypatch.setattr(utils.device, '_pinned', utils.device._Pinned())
    monkeypatch.setattr(utils.device, '_copy_stream', functools.lru_cache(lambda device: Stream()))
    monkeypatch.setattr(Stream, 'log', [])
    monkeypatch.setattr(paddle, 'CUDAPinnedPlace', paddle.CPUPlace)
    monkeypatch.setattr(paddle.Tensor, 'copy_', Stream.copy)
    for name in ('cuda', 'pin_memory'):
        monkeypatch.setattr(paddle.Tensor, name, lambda tensor, blocking: tensor.clone())


class Event:
    """An event. That of a stream has happened when its work has run, another one when two more were recorded or waited for."""

    recorded = 0

    def record(self) -> None:
        Event.recorded += 1
        self.number, self.stream = Event.recorded, Stream.current
        Stream.log.append(f'record in {"copies" if self.stream else "computation"}')
        if self.stream:
            self.happened = False
            self.stream.work.append(self._happen)

    def _happen(self) -> None:
        self.happened = True

    def query(self) -> bool:
        return self.happened if self.stream else Event.recorded >= self.number + 2

    def synchronize(self) -> None:
        if self.stream:
            self.stream.run(self)
        self.number = -2


class Stream:
    """A stream whose work runs as late as it may: when another one waits for an event behind it."""

    current: Stream | None = None
    log: list[str] = []

    def __init__(self):
        self.work: deque = deque()

    def wait_event(self, event: Event) -> None:
        Stream.log.append('copies wait')

    def run(self, event: Event) -> None:
        while not event.happened:
            self.work.popleft()()

    @staticmethod
    @contextlib.contextmanager
    def guard(stream: Stream):
        Stream.current = stream
        try:
            yield
        finally:
            Stream.current = None

    @staticmethod
    def copy(target: paddle.Tensor, source: paddle.Tensor, blocking: bool) -> None:
        """Replaces `Tensor.copy_`; neither side may be freed before the stream has copied."""
        assert Stream.current is not None and not blocking
        Stream.log.append('copy')
        sides = weakref.ref(target), weakref.ref(source)

        def copy() -> None:
            target, source = (side() for side in sides)
            assert target is not None and source is not None, 'memory was freed before it was copied'
            _COPY(target, source, True)

        Stream.current.work.append(copy)


class Computation:
    """The stream of the computation, which the CPU runs at once."""

    @staticmethod
    def wait_event(event: Event) -> None:
        Stream.log.append('computation waits')
        event.synchronize()


_COPY = paddle.Tensor.copy_


@contextlib.contextmanager
def float32_passes(model: nn.Layer, rounded: str | None = None):
    """Casts the parameters to float32 for a pass, first to `rounded`; gradients reach the parameters through the casts."""
    kept = []
    for layer in model.sublayers(include_self=True):
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                kept.append((layer, name, parameter))
                value = parameter if rounded is None else parameter.astype(rounded)
                layer._parameters[name] = value.astype('float32')
    try:
        yield
    finally:
        for layer, name, parameter in kept:
            layer._parameters[name] = parameter


class Float32Passes(ClassificationTask):
    """Classification whose passes compute in float32 from weights in half precision, or from `rounded` weights."""

    rounded = None

    def loss(self, model, batch, rng):
        with float32_passes(model, self.rounded):
            return super().loss(model, batch, rng)

    def infer(self, model, batch):
        with float32_passes(model, self.rounded):
            return super().infer(model, batch)


class RoundedWeights(Float32Passes):
    rounded = 'bfloat16'
