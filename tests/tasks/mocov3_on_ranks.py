# SPDX-License-Identifier: Apache-2.0
"""One pass of MoCo-v3 per process over its share of tests/goldens/mocov3-tworank.npz, and of batch normalization over its
share of maps: what it computes goes to FOLDER/RANK.npz.

python tests/tasks/mocov3_on_ranks.py FOLDER
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from engine.launch import is_worker, launch


def main(folder: str) -> None:
    import numpy as np

    from engine import distributed
    from tests.conftest import golden
    from tests.tasks.test_mocov3 import normalize_maps, one_pass

    context = distributed.start()
    g = golden('mocov3-tworank')
    views = np.stack([g[f'in/x{view}_rank{context.rank}'] for view in (1, 2)], 1)
    results = {**one_pass(g, views, context), **normalize_maps((slice(2), slice(2, None))[context.rank])}
    np.savez(os.path.join(folder, f'{context.rank}.npz'), **results)


if __name__ == '__main__':
    if not is_worker():
        sys.exit(launch())
    main(*sys.argv[1:])
