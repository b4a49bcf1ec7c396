# SPDX-License-Identifier: Apache-2.0
"""The one exception for what a user can correct."""

from utils.text import printable


class UserError(Exception):
    """A mistake in what the user gave: its text is one clear sentence that says what, where and how to correct it.

    Launchers and tools print the text without a traceback and exit with a non-zero status. The text may quote files: it is
    made printable and cut here, once for all errors.
    """

    def __init__(self, text: object = ''):
        super().__init__(printable(text))
