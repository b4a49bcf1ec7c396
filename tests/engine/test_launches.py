# SPDX-License-Identifier: Apache-2.0
"""Operators after the backward pass: on a GPU each is a kernel launch, whose number does not grow with the model."""

from __future__ import annotations

from collections import Counter

import paddle
import pytest
from paddle import profiler

from config import get_config
from engine.precision import Precision
from engine.update import Updater
from models import build_model
from tests.engine.gpu import gpu  # noqa: F401
from tests.engine.test_curves import SMALL
from tests.tasks.helpers import ALONE

VIEWS = {'flatten', 'reshape', 'squeeze', 'split'}  # on a GPU they compute nothing
LAUNCH = ' kernel launch'


def launches(depth: int, optimizer: str) -> Counter:
    """The operators of a step of a model, by name: clipping, optimizer and EMA."""
    options = {
        **SMALL, 'MODEL.TRANS.DEPTH': depth, 'MODEL.NUM_CLASSES': 3, 'TRAIN.MODEL_EMA': True, 'TRAIN.GRAD_CLIP': 1.0,
        'TRAIN.OPTIMIZER.NAME': optimizer, 'MODEL.EVIT.DROP_LOC': (),
    }  # fmt: skip
    config = get_config(opts=[part for pair in options.items() for part in pair])
    model = build_model(config)
    updater = Updater(config, model, Precision(config, False))
    for parameter in model.parameters():
        parameter.grad = paddle.ones_like(parameter)
    updater.step(1e-3)  # creates the state of the optimizer
    with profiler.Profiler(targets=[profiler.ProfilerTarget.CPU], on_trace_ready=lambda _: None) as profile:
        updater.clip(ALONE)
        updater.step(1e-3)
    found, nodes = Counter(), list(profile.profiler_result.get_data().values())
    while nodes:
        node = nodes.pop()
        nodes += node.children_node
        if node.name.endswith(LAUNCH):
            found[node.name[: -len(LAUNCH)]] += 1
    return Counter({name: count for name, count in found.items() if name not in VIEWS})


@pytest.mark.parametrize(
    ('optimizer', 'kind', 'updates', 'others'),
    [('AdamW', 'fused_adam', 2, 10), ('SGD', 'merged_momentum', 2, 16), ('LARS', 'merged_momentum', 2, 80), ('Lamb', 'merged_momentum', 6, 65)],
)  # fmt: skip
def test_launches_do_not_grow_with_the_model(gpu, optimizer, kind, updates, others):  # noqa: F811
    """AdamW, SGD and LARS have an operator for each of two groups, Lamb has three."""
    small, large = (launches(depth, optimizer) for depth in (2, 4))
    assert small.pop(kind) == large.pop(kind) == updates
    assert small == large and sum(large.values()) == others
