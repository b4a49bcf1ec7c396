# SPDX-License-Identifier: Apache-2.0
"""Text for terminals and logs: escaped and shortened text of untrusted files, and durations. Standard library only, syntax of Python 3.6."""

import unicodedata

NAME = 160  # characters of one name or value in a message: longer than any parameter name or usual path
SENTENCE = 4000  # characters of one message or printed line: a screen full, and every list of names that an error shows
_CUT = ' [...] '


def printable(text: object, limit: int = SENTENCE, keep: str = '') -> str:
    """Return `text` in one line of at most `limit` characters, without control characters.

    Control characters, line ends, bidirectional marks and surrogates are escaped: ESC becomes `\\x1b`. The middle of a longer
    text is left out, so that its start (where) and its end (what to do) stay.

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
    """Apply `printable` to each line of a text; line ends and tabs stay."""
    return '\n'.join(printable(line, keep=f'\t{keep}') for line in str(text).split('\n'))


def one_line(path: str) -> str:
    """Escape the line ends of a path, for output with one line per file."""
    return path.replace('\r', '\\r').replace('\n', '\\n')


def duration(seconds: float) -> str:
    """Return a time as in '12 s', '3 min 05 s', '7 h 12 min' or '2 d 03 h'."""
    left = round(seconds)
    for size, unit, smaller, small in ((86400, 'd', 3600, 'h'), (3600, 'h', 60, 'min'), (60, 'min', 1, 's')):
        if left >= size:
            return f'{left // size} {unit} {left % size // smaller:02d} {small}'
    return f'{left} s' if left else f'{seconds:.2g} s'
