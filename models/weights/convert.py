# SPDX-License-Identifier: Apache-2.0
"""Convert published PyTorch weights.

The model's `WeightRules` map the names. Linear layers store [out, in] in PyTorch and [in, out] in Paddle; the layers of
the model, not shapes, show which arrays to transpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from paddle import nn

from models.weights.match import REBUILT_SUFFIXES, MatchResult, match_state
from models.weights.rules import rules_of
from utils.errors import UserError

# BatchNorm buffers: PyTorch's name -> Paddle's name.
_BUFFERS = {'running_mean': '_mean', 'running_var': '_variance'}


@dataclass
class PortReport:
    """Report of a conversion; `str()` returns the lines to print.

    Attributes:
        used: name in the source -> name in the model.
        dropped: name in the source -> reason.
        matched: interpolated arrays, and buffers that the model builds.
    """

    used: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    matched: MatchResult = field(default_factory=MatchResult)

    def __str__(self) -> str:
        numbers = sum(array.size for array in self.matched.state.values())
        lines = [f'{len(self.used)} arrays used, {numbers:,} numbers']
        lines += [f'dropped {name}: {reason}' for name, reason in self.dropped.items()]
        lines += [f'resized {name}: {list(old)} -> {list(new)}' for name, (old, new) in self.matched.resized.items()]
        lines += [f'built by the model: {name}' for name in self.matched.kept]
        return '\n'.join(lines)


def port_state_dict(
    model: nn.Layer, arrays: Mapping[str, np.ndarray], own_names: bool = False, source: str = 'the source'
) -> dict[str, np.ndarray]:
    """Convert a published state dict to a complete one for `model.set_state_dict`.

    Args:
        model: defines names and shapes; it is not changed.
        arrays: name -> array in PyTorch's names and layouts, as returned by `find_state_dict`.
        own_names: the arrays have the model's names and Paddle's layouts already.
        source: name of the source in errors.

    Raises:
        UserError: lists unknown arrays, parameters without an array, and differences in shape.
    """
    return port_with_report(model, arrays, own_names, source)[0]


def port_with_report(
    model: nn.Layer, arrays: Mapping[str, np.ndarray], own_names: bool = False, source: str = 'the source'
) -> tuple[dict[str, np.ndarray], PortReport]:
    """Run `port_state_dict`, and return also its report."""
    report = PortReport()
    renamed = rename_arrays(model, arrays, own_names, source, report)
    wanted, given = map(rules_of(model).count_classes, (model.state_dict(), renamed))
    if wanted != given and wanted and given:
        raise UserError(f'{source} has {given} classes, but the model {wanted}; set MODEL.NUM_CLASSES to {given}.')
    original_names = {ours: name for name, ours in report.used.items()}
    report.matched = match_state(model, renamed, source, original_names=original_names)
    for ours, reason in report.matched.unused.items():
        name = original_names[ours]
        del report.used[name]
        report.dropped[name] = reason
    return report.matched.state, report


def rename_arrays(
    model: nn.Layer,
    arrays: Mapping[str, np.ndarray],
    own_names: bool = False,
    source: str = 'the source',
    report: PortReport | None = None,
) -> dict[str, np.ndarray]:
    """Return the arrays under the model's names and in Paddle's layouts, before shapes are matched."""
    report, renamed = report or PortReport(), {}
    if own_names:
        arrays = rules_of(model).adopt(model, arrays)
    for name, array in arrays.items():
        ours, reason = _our_name(model, name, own_names)
        if ours is None:
            report.dropped[name] = reason
        elif ours in renamed:
            first = next(other for other, used in report.used.items() if used == ours)
            raise UserError(f"{source} holds {ours} twice, as '{first}' and as '{name}'.")
        else:
            report.used[name] = ours
            renamed[ours] = array if own_names else rules_of(model).layout(name, array)
    return renamed if own_names else _paddle_layout(model, renamed)


def _our_name(model: nn.Layer, name: str, own_names: bool) -> tuple[str | None, str]:
    """Return the model's name of a source array, or None and the reason to drop it."""
    if name.endswith(REBUILT_SUFFIXES):
        return None, 'an index table, which the model builds'
    if own_names:
        return name, ''
    if name.endswith('.num_batches_tracked'):
        return None, 'a counter, which Paddle does not keep'
    ours = rules_of(model).rename(name)
    if ours is None:
        return None, f'{type(model).__name__} does not use it'
    path, _, last = ours.rpartition('.')
    return (f'{path}.{_BUFFERS[last]}' if last in _BUFFERS else ours), ''


def _paddle_layout(model: nn.Layer, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Transpose linear weights. Old files store the patch embedding as a matrix [C, in * P * P]: reshape it."""
    owners = {f'{path}.weight': layer for path, layer in model.named_sublayers()}
    result = {}
    for name, array in arrays.items():
        owner = owners.get(name)
        if isinstance(owner, nn.Linear) and array.ndim == 2:
            array = array.T  # a view: sizes are checked before anything is copied
        elif isinstance(owner, nn.Conv2D) and array.ndim == 2 and array.size == math.prod(owner.weight.shape):
            array = array.reshape(owner.weight.shape)
        result[name] = array
    return result
