# SPDX-License-Identifier: Apache-2.0
"""Embedded data sets, written once below `$LEANVIT_CACHE`, by default ~/.cache/leanvit."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable

from utils.environment import user_cache
from utils.errors import UserError


def written_once(name: str, write: Callable[[str], None]) -> str:
    """Return the folder `name` of the cache, which the first call fills with `write`. Safe for concurrent processes.

    Raises:
        UserError: the cache cannot be written.
    """
    cache = user_cache()
    folder = os.path.join(cache, name)
    if os.path.isdir(folder):
        return folder
    try:
        os.makedirs(cache, exist_ok=True)
        unfinished = tempfile.mkdtemp(prefix=f'.{name}-', dir=cache)
    except OSError as error:
        raise UserError(f"cannot write to the data cache '{cache}' ({error.strerror}); set LEANVIT_CACHE.") from None
    try:
        write(unfinished)
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, folder)
    except OSError as error:
        if not os.path.isdir(folder):  # otherwise another process wrote the same files
            raise UserError(f"cannot write the digits to '{folder}': {error.strerror}; set LEANVIT_CACHE.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def load_digits():
    """Load scikit-learn's handwritten digits: `images` [1797, 8, 8], 0 to 16, and `target` [1797]."""
    try:
        from sklearn import datasets
    except ImportError:
        raise UserError('the digits data set needs scikit-learn: pip install scikit-learn.') from None
    return datasets.load_digits()
