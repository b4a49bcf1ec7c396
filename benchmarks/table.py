# SPDX-License-Identifier: Apache-2.0
"""Medians, quartiles and Markdown tables of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.cases import COMPILED, DENSE, EAGER, ENGINES, INFERENCE, LEANVIT, REDUCED, TORCH, TRAINING

RUNNERS = (*((LEANVIT, engine) for engine in ENGINES['fp32']), (TORCH, EAGER), (TORCH, COMPILED))
NONE = '–'
Record = dict  # a case, with `seconds` of a pass in each round, or an `error`


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, median and third quartile."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return float(low), float(median), float(high)


def speed(record: Record) -> float:
    """Return images per second, from the median of the rounds."""
    return record['batch'] / quartiles(record['seconds'])[1]


def ratio(record: Record | None, other: Record | None) -> tuple[float, float, float] | None:
    """Return quartiles of how many times as fast as `other` a case is, round by round; None: one was not measured."""
    if record is None or other is None:
        return None
    rounds = zip(record['seconds'], other['seconds'])
    return quartiles([theirs * record['batch'] / (ours * other['batch']) for ours, theirs in rounds])


def tables(result: dict) -> list[str]:
    """Return the tables of a comparison in Markdown, after a line with its conditions."""
    conditions = ', '.join(f'{name} {value}' for name, value in result['environment'].items())
    found = [conditions, inference_table(result['records']), reduction_table(result['records'])]
    found += [training_table(result['records']), failures(result['records'])]
    return [text for text in found if text]


def inference_table(records: Sequence[Record]) -> str:
    """Images per second of each engine, and the ratios of the best one."""
    rows = []
    for key, group in grouped(records, INFERENCE):
        best = fastest(group, LEANVIT)
        cells = [_cell(group.get(runner), best) for runner in RUNNERS]
        ratios = [_ratio(best, group.get((TORCH, runner))) for runner in (EAGER, COMPILED)]
        rows.append([*map(str, key), *cells, *ratios])
    titles = [runner if side == LEANVIT else f'torch {runner}' for side, runner in RUNNERS]
    return markdown(['model', 'precision', 'batch', *titles, 'best / eager', 'best / compile'], rows)


def reduction_table(records: Sequence[Record]) -> str:
    """Speed of EViT relative to its dense model, the best of each side."""
    by_key, rows = dict(grouped(records, INFERENCE)), []
    for (model, precision, batch), group in by_key.items():
        dense = by_key.get((DENSE, precision, batch))
        if model == REDUCED and dense:
            gains = [_ratio(fastest(group, side), fastest(dense, side)) for side in (LEANVIT, TORCH)]
            rows.append([precision, str(batch), *gains])
    return markdown(['precision', 'batch', 'LeanViT: EViT / DeiT-S', 'PyTorch: EViT / DeiT-S'], rows)


def training_table(records: Sequence[Record]) -> str:
    """Images per second of training steps."""
    rows = []
    for (model, precision, batch), group in grouped(records, TRAINING):
        ours, eager, compiled = (group.get(key) for key in (RUNNERS[0], (TORCH, EAGER), (TORCH, COMPILED)))
        note = '' if precision == 'fp32' or ours is None or ours.get('mixed_precision') else ' (in fp32)'
        cells = [_cell(ours) + note, _cell(eager), _cell(compiled), _ratio(ours, eager), _ratio(ours, compiled)]
        rows.append([model, precision, str(batch), *cells])
    titles = ['LeanViT', 'torch eager', 'torch compile', 'LeanViT / eager', 'LeanViT / compile']
    return markdown(['training step', 'precision', 'batch', *titles], rows)


def failures(records: Sequence[Record]) -> str:
    """What was not measured, and why."""
    names = ('model', 'kind', 'precision', 'batch', 'side', 'runner')
    lines = [f'- {" ".join(str(r[name]) for name in names)}: {r["error"]}' for r in records if 'error' in r]
    return '\n'.join(['Not measured:', *lines]) if lines else ''


def grouped(records: Sequence[Record], kind: str) -> list[tuple[tuple[str, str, int], dict[tuple[str, str], Record]]]:
    """Return measured cases of a kind by (side, runner), for each (model, precision, batch)."""
    groups: dict[tuple, dict] = {}
    for record in records:
        if record['kind'] == kind:
            group = groups.setdefault((record['model'], record['precision'], record['batch']), {})
            if 'error' not in record:
                group[record['side'], record['runner']] = record
    return list(groups.items())


def fastest(group: dict[tuple[str, str], Record], side: str) -> Record | None:
    """Return the case of a side with the most images per second; None: there is none."""
    return max((record for (owner, _), record in group.items() if owner == side), key=speed, default=None)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; '' without rows."""
    lines = [titles, ['---'] * len(titles), *rows]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines) if rows else ''


def _cell(record: Record | None, best: Record | None = None) -> str:
    if record is None:
        return NONE
    text = f'{speed(record):.1f}'
    return f'**{text}**' if record is best else text


def _ratio(record: Record | None, other: Record | None) -> str:
    found = ratio(record, other)
    return NONE if found is None else '{1:.2f} ({0:.2f}–{2:.2f})'.format(*found)
