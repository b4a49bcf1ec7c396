# SPDX-License-Identifier: Apache-2.0
"""What each tool does first when it is started: find the repository, then start as the launchers do.

`python tools/NAME.py` finds this file because Python puts the script's folder, symbolic links resolved, on sys.path.
"""

import os
import sys

_TOOLS = os.path.dirname(os.path.abspath(__file__))
if os.path.abspath(sys.path[0]) == _TOOLS:
    sys.path[0] = os.path.dirname(_TOOLS)


def start(paddle: bool = True, single_process: bool = True) -> None:
    """See `utils.cli.begin` and, unless the tool works without Paddle, `utils.environment.start_paddle`."""
    from utils.cli import begin

    begin()
    if paddle:
        from utils.environment import start_paddle

        start_paddle(single_process)
