# SPDX-License-Identifier: Apache-2.0
"""OpenCV, imported on first use."""

from __future__ import annotations

import functools


@functools.cache
def opencv():
    """Import cv2 on first use, since the import takes a third of a second."""
    import cv2

    cv2.setNumThreads(0)  # worker processes already run in parallel
    return cv2
