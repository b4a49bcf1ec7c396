# SPDX-License-Identifier: Apache-2.0
"""Command-line tools: `python tools/NAME.py` from any folder, or `python -m tools.NAME` in the repository."""

import sys

from tools import _bootstrap

sys.modules['_bootstrap'] = _bootstrap  # a tool that runs as a script imports it by this name
