# SPDX-License-Identifier: Apache-2.0
"""Match named arrays to a model, strictly: Paddle's `set_state_dict` accepts missing, unknown and misshapen ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from paddle import Tensor, nn

from models.weights.rules import WeightRules, rules_of
from utils.errors import UserError
from utils.formats import bfloat16
from utils.text import NAME, printable

LISTED = 8  # names an error shows per kind of trouble

# Index tables that a model builds from its sizes; files may carry theirs.
REBUILT_SUFFIXES = ('.relative_position_index',)
# Buffers that are learned, unlike all others.
STATISTICS_SUFFIXES = ('._mean', '._variance')


@dataclass
class MatchResult:
    """What `match_state` returns.

    Attributes:
        state: for `set_state_dict`, in the model's shapes and types.
        resized: name -> (shape in the file, shape in the model) of interpolated tables.
        kept: names of buffers that the file lacks and the model has built itself.
        unused: name -> why the model does not use it.
    """

    state: dict[str, np.ndarray] = field(default_factory=dict)
    resized: dict[str, tuple[tuple, tuple]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)


def match_state(
    model: nn.Layer,
    arrays: Mapping[str, np.ndarray],
    source: str,
    optional: Iterable[str] = (),
    original_names: Mapping[str, str] | None = None,
) -> MatchResult:
    """Bring arrays under the model's names into its shapes and types.

    Values change their precision only, except position embeddings of another resolution; see `WeightRules.resize`.

    Args:
        model: offers names, shapes and types; it is not changed.
        arrays: by the model's names.
        source: what to call their origin in an error.
        optional: names that may be missing.
        original_names: what the file calls an array, where that is not the model's name.

    Raises:
        UserError: lists the names and shapes of arrays without a place, parameters without an array, differences, and
            arrays with NaN or infinite values.
    """
    targets, original_names = model.state_dict(), original_names or {}
    parameters = {name for name, _ in model.named_parameters()}
    result, missing, different = MatchResult(), {}, []
    rules = rules_of(model)
    result.unused = rules.unused(model, arrays, source)
    arrays = {name: array for name, array in arrays.items() if name not in result.unused}
    for name, target in targets.items():
        if name in arrays:
            array, wanted = arrays[name], tuple(target.shape)
            shape = array.shape
            if shape != wanted and not _may_be_resized(shape, wanted):  # before anything of this size is copied
                different.append(f'{name} {list(shape)} instead of {list(wanted)}')
                continue
            array = _cast(array, target)
            if array is None:
                different.append(f'{name} {arrays[name].dtype} instead of {_type_name(target)}')
                continue
            if shape != wanted:
                array = rules.resize(model, name, array)
                result.resized[name] = (shape, wanted)
            if array.shape != wanted:
                different.append(f'{name} {list(shape)} instead of {list(wanted)}')
                continue
            result.state[name] = array
        elif name not in parameters and not name.endswith(STATISTICS_SUFFIXES):
            result.kept.append(name)
        elif name not in optional:
            missing[name] = f'{name} {list(target.shape)}'
    unknown = {n: f'{original_names.get(n, n)} {list(a.shape)}' for n, a in arrays.items() if n not in targets}
    trouble = [
        _listing([*unknown.values()], 'in the file without a place in the model'),
        _listing([*missing.values()], 'in the model without weights in the file'),
        _listing(different, 'of another shape or type'),
    ]
    if any(trouble):
        found = [*filter(None, trouble), *_remedies(rules, unknown, missing)]
        raise UserError(f'{source} does not fit {type(model).__name__}: {"; ".join(found)}.')
    check_finite({original_names.get(name, name): array for name, array in result.state.items()}, source)
    return result


def _may_be_resized(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Position embeddings of another resolution differ in one side."""
    return len(shape) == len(wanted) and 0 not in shape and sum(a != b for a, b in zip(shape, wanted)) == 1


def check_finite(arrays: Mapping[str, np.ndarray], source: str) -> None:
    """Raises UserError where numbers are NaN or infinite, with the names of their arrays."""
    broken = [name for name, array in arrays.items() if array.dtype.kind == 'f' and not np.isfinite(array).all()]
    if broken:
        more = f' and {len(broken) - LISTED} more arrays' if len(broken) > LISTED else ''
        raise UserError(
            f'{source} has NaN or infinite values in {", ".join(printable(n, NAME) for n in broken[:LISTED])}{more}; the training that wrote it '
            'diverged or the file is damaged, use an earlier one.'
        )


def _remedies(rules: WeightRules, unknown: Iterable[str], missing: Iterable[str]) -> list[str]:
    """What to change in the configuration, by the table `WeightRules.optional_parts`."""
    found = {}
    for names, column in ((unknown, 0), (missing, 1)):
        for pattern, key, *values in rules.optional_parts:
            if any(re.fullmatch(pattern, name) for name in names):
                found[key] = f'set {key} to {values[column]}'
    return list(found.values())


def _cast(array: np.ndarray, target: Tensor) -> np.ndarray | None:
    """The array in the target's kind of number, or None where that would change what it says."""
    wanted = _type_name(target)
    if 'float' in wanted:
        if array.dtype == np.uint16:  # how Paddle stores bfloat16
            array = bfloat16.to_float32(array)
        if array.dtype.kind != 'f':
            return None
        with np.errstate(over='ignore'):  # a float64 beyond float32 becomes infinite, which is refused later
            return array.astype('float64' if wanted == 'float64' else 'float32', order='C')
    if array.dtype.kind not in 'biuf':
        return None
    with np.errstate(invalid='ignore'):
        result = array.astype(wanted, order='C')
    return result if np.array_equal(result, array) else None


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).rpartition('.')[2]


def _listing(items: list[str], what: str) -> str:
    if not items:
        return ''
    more = f', and {len(items) - LISTED} more' if len(items) > LISTED else ''
    return f'{len(items)} {what} ({", ".join(printable(item, NAME) for item in items[:LISTED])}{more})'
