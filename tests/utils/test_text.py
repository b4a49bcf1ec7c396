# SPDX-License-Identifier: Apache-2.0
"""Text of foreign files in messages: no control characters, no megabytes."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils.errors import UserError
from utils.runlog import RunLog
from utils.text import NAME, SENTENCE, printable, printable_lines

ATTACKS = {
    'clear screen': ('a\x1b[2Jb', r'a\x1b[2Jb'),
    'title': ('\x1b]0;owned\x07', r'\x1b]0;owned\x07'),
    'return': ('safe\rforged', r'safe\rforged'),
    'line': ('a\nMASTER_LOG b', r'a\nMASTER_LOG b'),
    'eight-bit control': ('\x9b2J', r'\x9b2J'),
    'right to left': ('gpj.\u202egnp', r'gpj.\u202egnp'),
    'half a character': ('\ud800\udce9', r'\ud800\udce9'),
    'tab and zero': ('\t\0', r'\t\x00'),
}


@pytest.mark.parametrize('name', ATTACKS)
def test_escapes(name):
    text, expected = ATTACKS[name]
    assert printable(text) == expected == printable(expected)
    assert str(UserError(f"'{text}' is wrong.")) == f"'{expected}' is wrong."


def test_plain_text_stays():
    for text in ('größe 数据 \\x1b', "it's 'x'", '', '数\u3000据\xa0'):
        assert printable(text) == text
    assert printable_lines('a\tb\nc\x07') == 'a\tb\nc\\x07'


def test_long_text_keeps_its_ends():
    for text in ('x' * 10**7, '\x1b' * 10**7, '\U0001f600\u202e' * 10**6):
        cut = printable(f'run/last.pdparams: {text}; download it again.')
        assert len(cut) <= SENTENCE and cut.startswith('run/last') and cut.endswith('download it again.')
        assert len(printable(text, NAME)) <= NAME


def test_errors_pass_through_processes():
    error = pickle.loads(pickle.dumps(UserError('a\x1b')))
    assert str(error) == r'a\x1b'


@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
def test_whatever_a_command_prints(stream):
    program = (
        'import sys\nfrom utils.cli import run\ndef main():\n'
        f"    print('\\x1b[2Jname\\u202e', 'x' * 10**6, 'b\\tc', file=sys.{stream})\nrun(main)"
    )
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=ROOT, env={**os.environ, 'PYTHONIOENCODING': 'utf-8'}, capture_output=True
    )
    assert done.returncode == 0
    text = getattr(done, stream)
    assert text.startswith(rb'\x1b[2Jname\u202e x') and text.endswith(b' b\tc\n') and len(text) < 2 * SENTENCE


def test_log_lines_cannot_be_forged(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', io.StringIO())
    log = RunLog(str(tmp_path), 0)
    log.master('image \x1b[2J\n01/01 00:00:00 MASTER_LOG acc1: 1.0')
    log.local('config\nKEY: \x1b[2J')
    log.close()
    (line,) = (tmp_path / 'log.txt').read_text().splitlines()
    assert r'\x1b[2J\n01/01' in line
    assert '\x1b' not in (tmp_path / 'log_0.txt').read_text() + sys.stdout.getvalue()
