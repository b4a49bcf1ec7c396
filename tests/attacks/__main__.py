# SPDX-License-Identifier: Apache-2.0
"""Print the table of attacks: `python -m tests.attacks [KIND ...]`; all kinds take about six minutes."""

import contextlib
import os
import sys
import tempfile

import tests.conftest  # noqa: F401 (the environment of Paddle)
from tests.attacks import arena, kinds, lab


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
            place = lab.build(folder)
        print(arena.HEADER, flush=True)
        for kind in sys.argv[1:] or kinds.NAMES:
            result = arena.run(kind, kinds.attacks(place, kind))
            print(result.row(), flush=True)
            for name, why in result.failures:
                print(f'{kind}, {name}: {why}', file=sys.stderr, flush=True)
            failed += len(result.failures)
        if os.path.exists('HIT'):
            print('an attack has run code', file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
