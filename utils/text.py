# SPDX-License-Identifier: Apache-2.0
"""Text from files that others wrote, made fit for terminals and logs. Standard library only, syntax of Python 3.6."""

import unicodedata

NAME = 160  # characters of one name or value in a message: longer than any parameter name or usual path
SENTENCE = 4000  # characters of one message or printed line: a screen full, and every list of names that an error shows
_CUT = ' [...] '


def printable(text: object, limit: int = SENTENCE, keep: str = '') -> str:
    """`text` as one line that moves no cursor and is at most `limit` characters long.

    Control characters, line ends, bidirectional marks and halves of characters are escaped, such as ESC as `\\x1b`. Of a longer
    text the middle is left out, so that its beginning (where) and its end (what to do) stay.

    Args:
        keep: unprintable characters that stay as they are.
    """
    text = _cut(str(text), limit)
    if text.isprintable():
        return text
    return _cut(''.join(c if _is_harmless(c) or c in keep else _escaped(c) for c in text), limit)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == 'Zs'  # spaces, such as the ideographic one


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = (limit - len(_CUT)) // 4
    return text[: limit - len(_CUT) - tail] + _CUT + text[len(text) - tail :]


def _escaped(character: str) -> str:
    return character.encode('unicode_escape', 'surrogatepass').decode('ascii')


def printable_lines(text: object, keep: str = '') -> str:
    """`printable` of each line of a text, which keeps its line ends and tabs."""
    return '\n'.join(printable(line, keep=f'\t{keep}') for line in str(text).split('\n'))
