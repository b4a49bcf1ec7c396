# SPDX-License-Identifier: Apache-2.0
"""Strict matching of named arrays to a model; Paddle's `set_state_dict` ignores missing and unknown names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from paddle import Tensor, nn

from models.weights.rules import STATISTICS_SUFFIXES, Grid, WeightRules, rules_of, stored_grid
from utils.errors import UserError
from utils.formats import bfloat16
from utils.text import NAME, printable

NO_METADATA: Mapping = MappingProxyType({})
LISTED = 8  # most names per kind of error in a message

# Index tables that a model builds from its sizes; those of files are dropped.
REBUILT_SUFFIXES = ('.relative_position_index',)


@dataclass
class MatchResult:
    """Result of `match_state`.

    Attributes:
        state: name -> array for `set_state_dict`, in the model's shapes and types.
        resized: name -> (shape in the file, shape in the model) of interpolated arrays.
        kept: names of buffers that are not in the file; the model built them.
        unused: name -> reason of arrays that the model does not use.
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
    metadata: Mapping = NO_METADATA,
) -> MatchResult:
    """Convert arrays to the model's shapes and types.

    Only the precision of values changes, except for position embeddings of another resolution; see `WeightRules.resize`.

    Args:
        model: defines names, shapes and types; it is not changed.
        arrays: name in the model -> array.
        source: name of the source in errors.
        optional: names that may be missing.
        original_names: name in the model -> name in the file, if they differ.
        metadata: of the file; only its grid of patches is used, see `stored_grid`.

    Raises:
        UserError: lists unknown arrays, parameters without an array, differences in shape or type, and arrays with NaN
            or infinite values.
    """
    targets, original_names = model.state_dict(), original_names or {}
    parameters = {name for name, _ in model.named_parameters()}
    result, missing, different = MatchResult(), {}, []
    rules = rules_of(model)
    old_grid, grid = stored_grid(metadata, source), stored_grid(rules.metadata(model), 'the model')
    result.unused = rules.unused(model, arrays, source)
    arrays = {name: array for name, array in arrays.items() if name not in result.unused}
    for name, target in targets.items():
        if name in arrays:
            array = _fitted(model, name, arrays[name], target, old_grid, same_grid=old_grid == grid)
            if isinstance(array, str):
                different.append(array)
                continue
            if array.shape != arrays[name].shape or not (old_grid == grid or np.array_equal(array, arrays[name])):
                result.resized[name] = (arrays[name].shape, array.shape)
            result.state[name] = array
        elif name not in parameters and not name.endswith(STATISTICS_SUFFIXES):
            result.kept.append(name)
        elif name not in optional:
            missing[name] = f'{name} {list(target.shape)}'
    unknown = {n: f'{original_names.get(n, n)} {list(a.shape)}' for n, a in arrays.items() if n not in targets}
    errors = [
        _listing([*unknown.values()], 'in the file without a place in the model'),
        _listing([*missing.values()], 'in the model without weights in the file'),
        _listing(different, 'of another shape or type'),
    ]
    if any(errors):
        found = [*filter(None, errors), *_remedies(rules, unknown, missing)]
        raise UserError(f'{source} does not fit {type(model).__name__}: {"; ".join(found)}.')
    check_finite({original_names.get(name, name): array for name, array in result.state.items()}, source)
    return result


def _fitted(
    model: nn.Layer, name: str, array: np.ndarray, target: Tensor, grid: Grid | None, same_grid: bool
) -> np.ndarray | str:
    """Return the array in the shape and type of its target, or how it differs. Shapes are compared before anything is copied.

    Args:
        grid: of the file, see `WeightRules.resize`.
        same_grid: the model has the same grid, so that arrays of the right shape fit.
    """
    shape, wanted = array.shape, tuple(target.shape)
    if shape != wanted and not _may_be_resized(shape, wanted):
        return f'{name} {list(shape)} instead of {list(wanted)}'
    result = _cast(array, target)
    if result is None:
        return f'{name} {array.dtype} instead of {_type_name(target)}'
    if shape != wanted or not same_grid:
        known = () if grid is None else (grid,)  # rules without this argument know square grids only
        result = rules_of(model).resize(model, name, result, *known)
    return result if result.shape == wanted else f'{name} {list(shape)} instead of {list(wanted)}'


def _may_be_resized(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Position embeddings of another resolution differ in one side."""
    return len(shape) == len(wanted) and 0 not in shape and sum(a != b for a, b in zip(shape, wanted)) == 1


def check_finite(arrays: Mapping[str, np.ndarray], source: str) -> None:
    """Raise UserError with the names of arrays that have NaN or infinite values."""
    # A file can give one array thousands of names: each array is checked once. Numbers must be finite in float32 too.
    distinct = {id(array): array for array in arrays.values() if array.dtype.kind == 'f'}
    with np.errstate(over='ignore'):
        wrong = {key for key, array in distinct.items() if not np.isfinite(_at_most_float32(array)).all()}
    broken = [name for name, array in arrays.items() if id(array) in wrong]
    if broken:
        more = f' and {len(broken) - LISTED} more arrays' if len(broken) > LISTED else ''
        raise UserError(
            f'{source} has NaN or infinite values in {", ".join(printable(n, NAME) for n in broken[:LISTED])}{more}; the training that wrote it '
            'diverged or the file is damaged, use an earlier one.'
        )


def _at_most_float32(array: np.ndarray) -> np.ndarray:
    return array.astype('float32') if array.dtype.itemsize > 4 else array


def _remedies(rules: WeightRules, unknown: Iterable[str], missing: Iterable[str]) -> list[str]:
    """Return the configuration changes that `WeightRules.optional_parts` suggests."""
    found = {}
    for names, column in ((unknown, 0), (missing, 1)):
        for pattern, key, *values in rules.optional_parts:
            if any(re.fullmatch(pattern, name) for name in names):
                found[key] = f'set {key} to {values[column]}'
    return list(found.values())


def _cast(array: np.ndarray, target: Tensor) -> np.ndarray | None:
    """Return the array in the type of the target, or None if the conversion is not exact (floats may round)."""
    wanted = _type_name(target)
    if 'float' in wanted:
        if array.dtype == np.uint16:  # Paddle stores bfloat16 as uint16
            array = bfloat16.to_float32(array)
        if array.dtype.kind != 'f':
            return None
        with np.errstate(over='ignore'):  # float64 values beyond float32 become infinite: an error in `check_finite`
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
