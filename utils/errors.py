# SPDX-License-Identifier: Apache-2.0
"""The exception for errors that a user can fix."""


class UserError(Exception):
    """An error in the user's input. The text is one sentence: what is wrong, where, and how to fix it.

    Launchers and tools print the text without a traceback and exit with a non-zero status.
    """
