# SPDX-License-Identifier: Apache-2.0
"""How a command starts and ends: any text can be printed; a user's mistake is one sentence, never a traceback.

Imported before anything else, so that it can refuse an old Python: standard library only, syntax of Python 3.6.
"""

import functools
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable

from utils.errors import UserError
from utils.text import printable_lines

USER_ERROR = 2  # exit status, as argparse's
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, a terminal that is closed

_OLDEST_PYTHON = (3, 9)
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_COMMANDS = r'(main_\w+|config|tools/[a-z]\w*)\.py'  # files that `run_command` runs
_PIP_NAMES = {
    'PIL': 'pillow', 'cv2': 'opencv-python-headless', 'paddle': 'paddlepaddle', 'sklearn': 'scikit-learn', 'yaml': 'PyYAML',
}  # fmt: skip


class Interrupted(KeyboardInterrupt):
    """One of `SIGNALS` came; `number` is which."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def begin() -> None:
    """Check Python's version; from here on errors of imports and signals end the process without a traceback."""
    if sys.version_info < _OLDEST_PYTHON:
        version = '.'.join(map(str, sys.version_info[:3]))
        print(f'error: this is Python {version} ({sys.executable}), but LeanViT needs 3.9 or newer.', file=sys.stderr)
        sys.exit(USER_ERROR)
    print_any_text()
    sys.excepthook = lambda kind, error, trace: _exit(_explain(error))
    handle_signals(_interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked while the process restarts


def print_any_text() -> None:
    """Escape what a terminal or pipe cannot encode, such as a Chinese path in ASCII, instead of raising an error.

    Control characters are escaped too: names in files of others must not move the cursor. Progress bars on standard error
    return it to the start of the line.
    """
    for stream, keep in ((sys.stdout, ''), (sys.stderr, '\r')):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
            if not isinstance(stream.write, functools.partial):
                stream.write = functools.partial(_write_printable, stream.write, keep)


def _write_printable(write, keep, text):
    write(printable_lines(text, keep))
    return len(text)


def run(main: 'Callable[[], int | None]') -> None:
    """Runs a command's `main` and exits with the status it returns; UserError is printed and gives status 2.

    Of several processes that a launcher started, the first to fail speaks; what the others meet then is its consequence.
    """
    begin()
    try:
        status = main()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        status = _explain(error)
    _exit(status or 0)


def run_command() -> None:
    """Runs the command that the first argument names, with what the calling script registered; see docs/extending.md.

    python mine.py main_multi_gpu.py -cfg=mine.yaml
    python mine.py tools/predict.py -pretrained=output/latest photos/
    """
    run(_run_named)


def _run_named() -> 'int | None':
    from utils.environment import start_paddle  # keeps the whole command line, for restarts and workers

    path = os.path.join(_ROOT, *sys.argv[1:2])
    name = os.path.relpath(path, _ROOT)
    if not os.path.isfile(path) or not re.fullmatch(_COMMANDS, name):
        raise UserError(
            f"there is no command '{' '.join(sys.argv[1:2])}': the first argument must be main_single_gpu.py, "
            'main_multi_gpu.py, config.py or a file of tools/, such as tools/predict.py.'
        )
    sys.argv[:2] = [path]
    if name.startswith('tools'):
        start_paddle()
    return importlib.import_module(name[: -len('.py')].replace(os.sep, '.')).main()


def exit_status(error: KeyboardInterrupt) -> int:
    """128 + n, as a shell reports a process that signal n ended."""
    return 128 + getattr(error, 'number', signal.SIGINT)


# ---------------------------------------------------------------------------------------------------- signals
def handle_signals(handler) -> None:
    """Install a handler of `SIGNALS`; SIGHUP stays ignored where nohup asked for that."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


_interrupted_at = None  # when the first signal came


def _interrupt(number, frame) -> None:
    """Raise Interrupted, so that files which are being written are removed; exit at once when that cannot work.

    An exception that rises inside an import may be swallowed there. A signal that is repeated means: at once; Paddle's
    launcher repeats SIGTERM within half a second.
    """
    global _interrupted_at
    now = time.monotonic()
    if _interrupted_at is None and not _imports(frame):
        _interrupted_at = now
        raise Interrupted(number)
    if _interrupted_at is None or number == signal.SIGINT or now - _interrupted_at > 1:
        os._exit(128 + number)


def _imports(frame) -> bool:
    """Whether an import is under way."""
    while frame is not None:
        if frame.f_code.co_filename.startswith('<frozen importlib'):
            return True
        frame = frame.f_back
    return False


# ---------------------------------------------------------------------------------------------------- errors
def _explain(error: BaseException) -> int:
    """Print what happened, in one sentence where the user can fix it. Returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return exit_status(error)
    if isinstance(error, BrokenPipeError):  # the reader of our output left, as `| head` does
        return 1
    text = str(error) if isinstance(error, UserError) else _environment_fault(error) or _missing_package(error)
    if _is_first():
        if text:
            print(f'error: {text}', file=sys.stderr)
        else:
            import traceback  # not at the top, so that `begin` comes early

            traceback.print_exception(type(error), error, error.__traceback__)
    return USER_ERROR if text else 1


def _environment_fault(error: BaseException) -> str:
    """What to do about a full disk or names that the file system's encoding lacks; empty for any other error."""
    from utils.files import NO_SPACE, cannot_write

    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return str(cannot_write(error.filename or 'standard output', error))
    if isinstance(error, UnicodeEncodeError) and sys.getfilesystemencoding() != 'utf-8':
        return f"the name '{error.object}' does not exist in {error.encoding}; set PYTHONUTF8=1."
    return ''


def _missing_package(error: BaseException) -> str:
    """What to do about a package that cannot be imported; empty for any other error, and for modules of this repository."""
    name = (getattr(error, 'name', None) or '').partition('.')[0]
    path = os.path.join(_ROOT, name)
    if not isinstance(error, ImportError) or not name or os.path.exists(path) or os.path.exists(path + '.py'):
        return ''
    package = _PIP_NAMES.get(name, name)
    cause = 'is missing' if isinstance(error, ModuleNotFoundError) else f'cannot be imported ({error})'
    requirements = os.path.join(_ROOT, 'requirements.txt')
    return (
        f"the Python package '{name}' {cause} in {sys.executable}; run 'make train' once and use .venv/bin/python, or "
        f"'pip install -r {requirements}' ('pip install {package}' if it is not listed there)."
    )


def _is_first() -> bool:
    """Whether no other process of this job has failed before; always so where no launcher made a place to say it."""
    latch = os.environ.get('LEANVIT_FIRST_ERROR')
    if latch is None:
        return True
    try:
        os.close(os.open(latch, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:  # the variable is left over from a job that has ended
        return True
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
