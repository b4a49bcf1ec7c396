# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the model tests."""

import pytest
from paddle.nn import initializer


@pytest.fixture
def zero_weights(monkeypatch):
    """Initialize models by zeros: random numbers take most of the time to build a large model."""
    zeros = initializer.Constant(0.0)
    for name in ('XavierUniform', 'KaimingNormal', 'KaimingUniform', 'Normal', 'TruncatedNormal', 'Uniform'):
        monkeypatch.setattr(
            getattr(initializer, name), '__call__', lambda _, parameter, block=None: zeros(parameter, block)
        )
