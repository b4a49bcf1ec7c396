# SPDX-License-Identifier: Apache-2.0
"""Start of each tool: put the repository on sys.path, then start like the launchers.

`python tools/NAME.py` finds this file, since Python puts the script's real folder on sys.path.
"""

import os
import sys

_TOOLS = os.path.dirname(os.path.abspath(__file__))
if os.path.abspath(sys.path[0]) == _TOOLS:
    sys.path[0] = os.path.dirname(_TOOLS)


def start(paddle: bool = True, single_process: bool = True) -> None:
    """Call `utils.cli.begin` and, for tools that need Paddle, `utils.environment.start_paddle`."""
    from utils.cli import begin

    begin()
    if paddle:
        from utils.environment import start_paddle

        start_paddle(single_process)
