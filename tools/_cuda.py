# SPDX-License-Identifier: Apache-2.0
"""Print the CUDA version of Paddle's package index for this machine's NVIDIA driver, such as 126; nothing without a driver.

The Makefile runs it before any package is installed: standard library only.
"""

import re
import subprocess

INDEXES = (118, 126, 129, 130)  # of https://www.paddlepaddle.org.cn/packages/stable/cu...


def choose(report: str) -> str:
    """Return the newest index that the driver of a report of nvidia-smi supports; '' if there is none."""
    version = re.search(r'CUDA Version: *(\d+)\.(\d+)', report)
    usable = [index for index in INDEXES if version and index <= 10 * int(version[1]) + int(version[2])]
    return str(max(usable)) if usable else ''


def report() -> str:
    """Return the output of nvidia-smi; '' if it is missing or fails."""
    try:
        return subprocess.run(
            ['nvidia-smi'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        ).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        return ''


if __name__ == '__main__':
    print(choose(report()))
