# SPDX-License-Identifier: Apache-2.0
"""bfloat16 in numpy, which lacks this type: its 16 bits are the upper half of a float32."""

import numpy as np


def to_float32(bits: np.ndarray) -> np.ndarray:
    """Convert bfloat16 numbers, given as uint16 bits of any shape, to float32 without loss."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
