# SPDX-License-Identifier: Apache-2.0
"""Start and exit of a command: text of any encoding can be printed; a user's mistake gives one sentence, no traceback.

This module is imported before any other, so that it can refuse an old Python: standard library only, syntax of Python 3.6.
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
from utils.reports import CONSOLE, ERROR, LOST, inherited_handle, send_report
from utils.signals import SIGNALS, handle_signals
from utils.text import printable_lines

USER_ERROR = 2  # exit status, as argparse's

_OLDEST_PYTHON = (3, 9)
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_COMMANDS = r'(main_\w+|config|tools/[a-z]\w*)\.py'  # files that `run_command` runs
# What gloo, NCCL and Paddle's store raise where another rank ended or did not answer.
_LOST = r'gloo|[Cc]onnection (reset|closed|refused)|TCPStore|tcp_store|nccl|NCCL'
_PIP_NAMES = {
    'PIL': 'pillow', 'cv2': 'opencv-python-headless', 'paddle': 'paddlepaddle', 'sklearn': 'scikit-learn', 'yaml': 'PyYAML',
}  # fmt: skip


class Interrupted(KeyboardInterrupt):
    """Raised when the process receives one of `SIGNALS`, whose number is `number`.

    Paddle's tracing of a program replaces an exception by `type(error)(message)`: a message stands for the last signal.
    """

    def __init__(self, number: 'int | str'):
        super().__init__()
        self.number = _last_signal if isinstance(number, str) else number


def begin() -> None:
    """Check Python's version, then install handlers that end the process without a traceback on errors and signals."""
    if sys.version_info < _OLDEST_PYTHON:
        version = '.'.join(map(str, sys.version_info[:3]))
        print(f'error: this is Python {version} ({sys.executable}), but LeanViT needs 3.9 or newer.', file=sys.stderr)
        sys.exit(USER_ERROR)
    _open_streams()
    print_any_text()
    sys.excepthook = lambda kind, error, trace: _exit(_explain(error))
    handle_signals(_interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked while the process restarts


def _open_streams() -> None:
    """Replace closed standard streams, and let a rank write to the standard error of its launcher.

    Handle 2 of a rank remains a pipe to the launcher, which relays what C++ code writes.
    """
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115 (open until the end)
    console = inherited_handle(CONSOLE)
    if console is not None and sys.stderr.fileno() != console:
        encoding = sys.stderr.encoding
        sys.stderr = open(console, 'w', buffering=1, encoding=encoding, closefd=False)  # noqa: SIM115


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
    """Run a command's `main` and exit with the status that it returns. A UserError is printed and gives status 2.

    Of several processes that a launcher started, only the error of the first to fail is printed; later errors follow from it.
    """
    begin()
    try:
        status = main()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        status = _explain(error)
    _exit(status or 0)


def run_command() -> None:
    """Run the command that the first argument names, with what the calling script registered; see docs/extending.md.

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
    """Return 128 + n, as a shell reports a process that signal n ended."""
    return 128 + getattr(error, 'number', signal.SIGINT)


# ---------------------------------------------------------------------------------------------------- signals
_interrupted_at = None  # when the first signal came
_last_signal = signal.SIGINT


def _interrupt(number, frame) -> None:
    """Raise Interrupted, so that incomplete files are removed. Exit at once during an import or on a repeated signal.

    An import may swallow an exception that is raised inside it. Paddle's launcher repeats SIGTERM within half a second,
    so SIGTERM and SIGHUP count as repeated only after one second.
    """
    global _interrupted_at, _last_signal
    _last_signal = number
    now = time.monotonic()
    if _interrupted_at is None and not _imports(frame):
        _interrupted_at = now
        raise Interrupted(number)
    if _interrupted_at is None or number == signal.SIGINT or now - _interrupted_at > 1:
        os._exit(128 + number)


def _imports(frame) -> bool:
    """Return True if an import statement is running."""
    while frame is not None:
        if frame.f_code.co_filename.startswith('<frozen importlib'):
            return True
        frame = frame.f_back
    return False


# ---------------------------------------------------------------------------------------------------- errors
def _explain(error: BaseException) -> int:
    """Print an error, in one sentence where the user can fix it, else with its traceback. Return the exit status.

    A rank reports the error to its launcher instead, which prints the first one.
    """
    if isinstance(error, KeyboardInterrupt):
        return exit_status(error)
    if isinstance(error, BrokenPipeError):  # the reader of the pipe exited, as in `| head`
        return 1
    lost = '' if isinstance(error, UserError) else _lost_connection(error)
    text = str(error) if isinstance(error, UserError) else lost or _environment_fault(error) or _missing_package(error)
    status = USER_ERROR if text and not lost else 1
    if text:
        text = f'error: {text}'
    else:
        import traceback  # imported here, so that `begin` runs early

        text = ''.join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
    if not send_report(LOST if lost else ERROR, status, text):
        print(text, file=sys.stderr)
    return status


def _lost_connection(error: BaseException) -> str:
    """Return a sentence if another rank ended or did not answer during a collective; '' for any other error."""
    if 'PADDLE_TRAINER_ID' not in os.environ or not isinstance(error, (RuntimeError, OSError, SystemError)):
        return ''
    if not re.search(_LOST, str(error)):
        return ''
    return (
        f'process {os.environ["PADDLE_TRAINER_ID"]} lost the connection to another process, which ended or did not answer; '
        "see that process's output for the cause."
    )


def _environment_fault(error: BaseException) -> str:
    """Return what to do about a full disk or a name outside the file system's encoding; '' for any other error."""
    from utils.files import NO_SPACE, cannot_write

    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return str(cannot_write(error.filename or 'standard output', error))
    if isinstance(error, UnicodeEncodeError) and sys.getfilesystemencoding() != 'utf-8':
        return f"the name '{error.object}' does not exist in {error.encoding}; set PYTHONUTF8=1."
    return ''


def _missing_package(error: BaseException) -> str:
    """Return what to do about a package that cannot be imported; '' for other errors and for modules of this repository."""
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


def _exit(status: int) -> None:
    """Flush the output and exit. A rank exits at once: Paddle's shutdown may wait forever for ranks that have exited."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # reported before; a later flush by Python would raise it again
            discard_output(stream)
    if 'PADDLE_TRAINER_ID' in os.environ:
        os._exit(status)
    sys.exit(status)


def discard_output(stream=None) -> None:
    """Discard what a stream, by default standard output, holds and gets: it cannot be written."""
    stream = sys.stdout if stream is None else stream
    try:
        handle = stream.fileno()
    except (OSError, ValueError):  # a stream of a program that runs this code
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, handle)
    os.close(null)


# ---------------------------------------------------------------------------------------------------- values
def unquoted(text: str) -> str:
    """The value of a flag without a pair of quotes around it."""
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in '\'"' else text


def whole_number(text: str) -> int:
    """The value of a flag as an integer."""
    return int(unquoted(text))


whole_number.__name__ = 'whole number'  # what argparse calls it
