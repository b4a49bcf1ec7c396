#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train or evaluate with one process per device: every visible GPU, else two processes on the CPU. `-h` lists the flags.

Several machines: `python -m paddle.distributed.launch --nnodes N --master HOST:PORT main_multi_gpu.py -cfg=...` on each.
"""

import sys

from utils.cli import run


def main() -> None:
    from config import get_arguments, get_config, update_config
    from engine.launch import is_worker, launch
    from utils.environment import start_paddle

    args = get_arguments()
    config = update_config(
        get_config(), args
    )  # also in the parent, so that an error is printed once, before workers start
    if not is_worker():
        sys.exit(launch(getattr(args, 'ngpus', None), config.PEER_TIMEOUT))
    start_paddle(single_process=False)
    from engine.run import run_config

    run_config(config)


if __name__ == '__main__':
    run(main)
