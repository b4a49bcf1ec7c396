# SPDX-License-Identifier: Apache-2.0
"""Print the CUDA version of Paddle's package index for this machine's NVIDIA driver and GPUs, such as 126; else nothing.

The Makefile runs it before any package is installed: standard library only.
"""

import re
import subprocess

INDEXES = (118, 126, 129, 130)  # of https://www.paddlepaddle.org.cn/packages/stable/cu...


BEFORE_TURING, OLD_GPUS = 7.5, 126  # CUDA 13 has no code for Pascal and Volta GPUs, whose newest driver supports it
BLACKWELL, NEW_GPUS = 10.0, 129  # CUDA 12.6 has no code for Blackwell GPUs; from driver 12.8 on, each CUDA 12 runs


def choose(report: str, capabilities: str = '') -> str:
    """Return the newest index that the driver and the GPUs support; '' if there is none.

    Args:
        report: output of nvidia-smi.
        capabilities: compute capability of each GPU, one per line; '': unknown.
    """
    version = re.search(r'CUDA Version: *(\d+)\.(\d+)', report)
    if not version:
        return ''
    driver, found = 10 * int(version[1]) + int(version[2]), [float(x) for x in re.findall(r'\d+\.\d', capabilities)]
    if driver == 128 and found and min(found) >= BLACKWELL:
        driver = NEW_GPUS
    if found and min(found) < BEFORE_TURING:
        driver = min(driver, OLD_GPUS)
    return str(max((index for index in INDEXES if index <= driver), default=''))


def ask(*options: str) -> str:
    """Return the output of nvidia-smi; '' if it is missing or fails."""
    try:
        return subprocess.run(
            ['nvidia-smi', *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        ).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        return ''


if __name__ == '__main__':
    print(choose(ask(), ask('--query-gpu=compute_cap', '--format=csv,noheader')))
