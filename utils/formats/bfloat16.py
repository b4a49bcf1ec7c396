# SPDX-License-Identifier: Apache-2.0
"""bfloat16 in numpy, which has no such type: its 16 bits are the upper half of a float32."""

import numpy as np


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 numbers given as uint16 bits -> the same numbers in float32, exactly; any shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
