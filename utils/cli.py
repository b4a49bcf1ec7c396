# SPDX-License-Identifier: Apache-2.0
"""How a launcher or tool speaks and ends: any text can be printed; a user's mistake is one sentence, never a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from utils.errors import UserError
from utils.files import NO_SPACE, cannot_write

USER_ERROR = 2  # exit status, as argparse's


def run(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits with the status it returns; UserError is printed and gives status 2.

    Of several processes that a launcher started, the first to fail speaks; what the others meet then is its consequence.
    """
    print_any_text()
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        status = _fail(error)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        status = 1
    except OSError as error:
        if error.errno not in NO_SPACE:
            status = _crash()
        else:
            status = _fail(cannot_write(error.filename or 'standard output', error))
    except UnicodeEncodeError as error:
        if sys.getfilesystemencoding() == 'utf-8':
            status = _crash()
        else:
            status = _fail(
                UserError(f"the name '{error.object}' does not exist in {error.encoding}; set PYTHONUTF8=1.")
            )
    except Exception:
        status = _crash()
    _exit(status or 0)


def print_any_text() -> None:
    """Escapes what a terminal or pipe cannot encode, such as a Chinese path in ASCII, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')


def _fail(error: UserError) -> int:
    if _is_first():
        print(f'error: {error}', file=sys.stderr)
    return USER_ERROR


def _crash() -> int:
    if _is_first():
        traceback.print_exc()
    return 1


def _is_first() -> bool:
    """Whether no other process of this job has failed before; always so where no launcher made a place to say it."""
    latch = os.environ.get('LEANVIT_FIRST_ERROR')
    if latch is None:
        return True
    try:
        os.close(os.open(latch, os.O_CREAT | os.O_EXCL))
    except OSError:
        return False
    return True


def _exit(status: int) -> None:
    """Leaves at once: with a process group whose peers are gone, Paddle's own shutdown may wait for them for ever."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # said before; what is left would raise it again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if 'PADDLE_TRAINER_ID' in os.environ:
        os._exit(status)
    sys.exit(status)
