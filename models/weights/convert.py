# SPDX-License-Identifier: Apache-2.0
"""Weights published for PyTorch -> weights of our models.

Names are mapped by the model's `WeightRules`. PyTorch's linear layers keep [out, in] and Paddle's [in, out]; the model's
layers decide which array is one, since the shape of a square one does not.
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

# PyTorch's name of a BatchNorm buffer and Paddle's.
_BUFFERS = {'running_mean': '_mean', 'running_var': '_variance'}


@dataclass
class PortReport:
    """What became of each array of the source; `str()` gives the lines to print.

    Attributes:
        used: name in the source -> name in the model.
        dropped: name in the source -> why it is not needed.
        matched: what was resized, and which buffers the model builds itself.
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
    """Converts a published state dict into one that `model.set_state_dict` takes completely.

    Args:
        model: gives names and shapes; it is not changed.
        arrays: name -> array in PyTorch's names and layouts, as `find_state_dict` returns them.
        own_names: the arrays come from Paddle: the model's own names and layouts already.
        source: what to call the origin in an error.

    Raises:
        UserError: an array that is neither used nor known to be of no use, a parameter without an array, or a
            difference in shape; all are listed.
    """
    return port_with_report(model, arrays, own_names, source)[0]


def port_with_report(
    model: nn.Layer, arrays: Mapping[str, np.ndarray], own_names: bool = False, source: str = 'the source'
) -> tuple[dict[str, np.ndarray], PortReport]:
    """`port_state_dict` and what it did."""
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
    """The arrays that the model may use under its own names and in Paddle's layouts; `port_state_dict` fits them to it."""
    report, renamed = report or PortReport(), {}
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
    """The model's name of a source's array, or None and the reason why it is not needed."""
    if name.endswith(REBUILT_SUFFIXES):
        return None, 'an index table, which the model builds itself'
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
    """Transposes the weights of linear layers; very old files hold the patch embedding as a matrix, [C, in * P * P]."""
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
