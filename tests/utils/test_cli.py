# SPDX-License-Identifier: Apache-2.0
"""How commands end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils import cli
from utils.errors import UserError


def mistake():
    raise UserError("there is no 'x'.")


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


def test_of_several_processes_the_first_to_fail_speaks(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv('LEANVIT_FIRST_ERROR', str(tmp_path / 'latch'))
    assert ended(mistake) == 2
    assert ended(mistake) == 2
    assert ended(lambda: 1 / 0) == 1
    assert capsys.readouterr().err == "error: there is no 'x'.\n"


def test_a_reader_that_left_is_no_error():
    program = "from utils.cli import run\nrun(lambda: [print('line ' * 100) for _ in range(10000)] and None)"
    child = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.read(child.stdout.fileno(), 10)
    child.stdout.close()
    assert child.stderr.read() == b''
    assert child.wait(timeout=60) == 1
