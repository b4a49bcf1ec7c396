# SPDX-License-Identifier: Apache-2.0
"""How a command ends: a user's mistake is one sentence and an exit status, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from utils.errors import UserError


def run(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits with the status it returns; UserError is printed and gives status 2."""
    try:
        status = main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        status = 2
    sys.exit(status)
