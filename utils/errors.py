# SPDX-License-Identifier: Apache-2.0
"""The exception for errors that a user can fix."""

from utils.text import printable


class UserError(Exception):
    """An error in the user's input. The text is one sentence: what is wrong, where, and how to fix it.

    Launchers and tools print the text without a traceback and exit with a non-zero status. The text may quote files: it is
    made printable and cut here, once for all errors.
    """

    def __init__(self, text: object = ''):
        super().__init__(printable(text))
