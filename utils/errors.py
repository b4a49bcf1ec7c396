# SPDX-License-Identifier: Apache-2.0
"""The one exception for what a user can correct."""


class UserError(Exception):
    """A mistake in what the user gave: its text is one clear sentence that says what, where and how to correct it.

    Launchers and tools print the text without a traceback and exit with a non-zero status.
    """
