# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the model tests."""

import pytest
from paddle.nn import initializer


@pytest.fixture
def zero_weights(monkeypatch):
    """Models start with zeros: drawing the numbers is most of the time it takes to build a large one."""
    zeros = initializer.Constant(0.0)
    for name in ('XavierUniform', 'KaimingNormal', 'KaimingUniform', 'Normal', 'TruncatedNormal', 'Uniform'):
        monkeypatch.setattr(
            getattr(initializer, name), '__call__', lambda _, parameter, block=None: zeros(parameter, block)
        )
