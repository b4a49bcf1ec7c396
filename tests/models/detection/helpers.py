# SPDX-License-Identifier: Apache-2.0
"""Ground truth and weights of the detection vectors."""

import numpy as np


def polygons(arrays: dict, prefix: str, instances: int) -> list[list[np.ndarray]]:
    """Polygons of each instance, from the flat lists of the vectors."""
    owners, lengths, numbers = (arrays[f'{prefix}_{part}'] for part in ('instance', 'len', 'xy'))
    result = [[] for _ in range(instances)]
    for owner, end, length in zip(owners.astype(int), np.cumsum(lengths).astype(int), lengths.astype(int)):
        result[owner].append(numbers[end - length : end].astype('float64'))
    return result
