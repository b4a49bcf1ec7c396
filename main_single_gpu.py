#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train or evaluate on one device: a GPU if there is one, else the CPU. `-h` lists the flags."""

from utils.cli import run


def main() -> None:
    from config import get_arguments, get_config, update_config
    from utils.environment import start_paddle

    config = update_config(get_config(), get_arguments())
    start_paddle()
    from engine.run import run_config

    run_config(config)


if __name__ == '__main__':
    run(main)
