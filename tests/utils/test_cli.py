# SPDX-License-Identifier: Apache-2.0
"""How commands end."""

from __future__ import annotations

import importlib
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils import cli, reports
from utils.errors import UserError


def mistake():
    raise UserError("there is no 'x'.")


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch):
    """`run` is made for processes that end with it."""
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    handlers = {number: signal.getsignal(number) for number in cli.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def ended(main) -> int | None:
    with pytest.raises(SystemExit) as info:
        cli.run(main)
    return info.value.code


def test_a_mistake_is_one_line_and_status_2(capsys):
    assert ended(mistake) == 2
    assert capsys.readouterr() == ('', "error: there is no 'x'.\n")


def test_the_status_of_main_is_kept():
    assert ended(lambda: None) == 0
    assert ended(lambda: 3) == 3


def test_a_programming_error_keeps_its_traceback(capsys):
    assert ended(lambda: 1 / 0) == 1
    error = capsys.readouterr().err
    assert error.startswith('Traceback')
    assert 'ZeroDivisionError' in error


@pytest.mark.parametrize(
    'argv', [[], ['tools/none.py'], ['tools/_common.py'], ['models/gmlp.py'], ['/tmp'], ['-cfg=x']]
)
def test_a_users_script_runs_commands_only(argv, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['mine.py', *argv])
    with pytest.raises(SystemExit) as info:
        cli.run_command()
    assert info.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: there is no command '{' '.join(argv)}': the first argument ")


def test_a_users_script_runs_a_command_with_the_rest_of_its_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['mine.py', 'config.py', '-opts', 'SEED', '7'])
    with pytest.raises(SystemExit):
        cli.run_command()
    assert re.search(r'^SEED +7 +-opts$', capsys.readouterr().out, re.MULTILINE)


def test_a_rank_reports_its_error_to_the_launcher_which_prints_it(capsys, monkeypatch):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    monkeypatch.setenv('PADDLE_TRAINER_ID', '1')
    monkeypatch.setattr(cli, '_exit', sys.exit)  # a rank ends without clean-up
    with ours, theirs:
        monkeypatch.setenv(reports.REPORTS, reports.describe_handle(theirs.fileno()))
        assert (ended(mistake), ended(lambda: 1 / 0), ended(lost)) == (2, 1, 1)
        user, fault, peer = reports.receive_reports(ours)
    assert user == {'kind': 'error', 'rank': '1', 'status': 2, 'text': "error: there is no 'x'."}
    assert fault['text'].startswith('Traceback') and fault['text'].endswith('ZeroDivisionError: division by zero')
    assert peer['kind'] == 'lost' and 'process 1 lost the connection to another process' in peer['text']
    assert capsys.readouterr().err == ''


def lost():
    raise RuntimeError('[/gloo/transport/tcp/pair.cc:534] Connection reset by peer')


def child(program, stdout=subprocess.PIPE, **variables):
    """(status, standard output, standard error) of a command whose `main` is `program`."""
    code = f'import sys\nfrom utils.cli import run\ndef main():\n    {program}\nrun(main)'
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env={**os.environ, **variables}, stdout=stdout, stderr=subprocess.PIPE
    )
    return done.returncode, done.stdout, done.stderr


def test_a_terminal_need_not_be_utf_8():
    program = r"print('\u6570 dat\udce9'); sys.stderr.write('\u6570\udce9')"
    assert child(program, PYTHONIOENCODING='ascii') == (0, rb'\u6570 dat\udce9' + b'\n', rb'\u6570\udce9')
    assert child(program, PYTHONIOENCODING='utf-8') == (0, '数 dat\\udce9\n'.encode(), '数\\udce9'.encode())


def test_a_name_that_the_file_system_cannot_have():
    ascii_only = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    status, _, error = child(r"open('/tmp/\u6570', 'w')", **ascii_only)
    assert (status, error) == (2, rb"error: the name '/tmp/\u6570' does not exist in ascii; set PYTHONUTF8=1." + b'\n')


@pytest.mark.parametrize('program', ["print('x')", "print('x' * 100000)"], ids=['at the end', 'at once'])
def test_output_to_a_full_disk(program):
    with open('/dev/full', 'wb') as full:
        status, _, error = child(program, stdout=full)
    assert status == 2
    assert error == (
        b"error: cannot write 'standard output': No space left on device; free space there, or write elsewhere (-output).\n"
    )


def test_handles_of_another_job_hide_nothing(capsys, monkeypatch):
    for value in ('0:1:2', 'x', '99999:1:2'):
        monkeypatch.setenv(reports.REPORTS, value)
        monkeypatch.setenv(reports.CONSOLE, value)
        assert ended(mistake) == 2
        assert capsys.readouterr().err == "error: there is no 'x'.\n"


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '>&- 2>&-'])
def test_standard_streams_may_be_closed(closed):
    program = "from utils.cli import run; import sys; run(lambda: print('x') or print('y', file=sys.stderr))"
    command = f'"{sys.executable}" -c "{program}" {closed}'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    shown = ('' if closed.startswith('>') else 'x\n', '' if '2>' in closed else 'y\n')
    assert (done.returncode, done.stdout, done.stderr) == (0, *shown)


def test_a_reader_that_left_is_no_error():
    program = "from utils.cli import run\nrun(lambda: [print('line ' * 100) for _ in range(10000)] and None)"
    child = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.read(child.stdout.fileno(), 10)
    child.stdout.close()
    assert child.stderr.read() == b''
    assert child.wait(timeout=60) == 1


def test_a_missing_package_is_named_and_how_to_install_it(capsys):
    assert ended(lambda: importlib.import_module('gone.module')) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the Python package 'gone' is missing in ")
    assert 'make train' in error and 'pip install -r ' in error and error.count('\n') == 1


def test_a_missing_module_of_the_repository_is_a_programming_error(capsys):
    assert ended(lambda: importlib.import_module('utils.gone')) == 1
    assert capsys.readouterr().err.startswith('Traceback')


@pytest.mark.parametrize('number', cli.SIGNALS)
def test_a_signal_ends_with_its_status_after_cleaning_up(number):
    program = """
import os, sys
from utils.cli import run
def main():
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
    finally:
        print('cleaned up')
run(main)
"""
    assert started('-c', program, str(int(number))) == (128 + number, 'cleaned up\n', '')


def test_a_signal_keeps_its_status_where_paddle_replaces_its_exception():
    """The tracing of a program raises `type(error)(message)`."""
    program = """
import os, signal
from utils.cli import run
def main():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt as error:
        raise type(error)('In transformed code: ...') from None
run(main)
"""
    assert started('-c', program) == (143, '', '')


def test_a_signal_in_an_import_that_swallows_it_ends_at_once(tmp_path):
    (tmp_path / 'greedy.py').write_text(
        'import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\nexcept BaseException:\n    pass\n'
    )
    program = "from utils.cli import run\nrun(lambda: print('begun', flush=True) or __import__('greedy'))"
    assert started('-c', program, PYTHONPATH=str(tmp_path)) == (143, 'begun\n', '')


def test_nohup_keeps_its_promise():
    program = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from utils.cli import run
run(lambda: os.kill(os.getpid(), signal.SIGHUP))
"""
    assert started('-c', program) == (0, '', '')


def test_an_old_python_is_one_sentence():
    program = 'import sys\nsys.version_info = (3, 8, 18)\nfrom utils.cli import run\nrun(None)'
    status, out, err = started('-c', program)
    assert (status, out) == (2, '')
    assert err == f'error: this is Python 3.8.18 ({sys.executable}), but LeanViT needs 3.9 or newer.\n'


def started(*argv, **variables) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr
