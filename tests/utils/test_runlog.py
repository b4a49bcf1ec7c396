# SPDX-License-Identifier: Apache-2.0
"""What a run leaves to read."""

import errno
import glob
import io
import json
import os
import sys

import numpy as np
import pytest

from utils.errors import UserError
from utils.runlog import MetricsFile, RunLog, VisualDLFile

NO_SPACE = 'No space left on device; free space there, or write elsewhere'
LATIN1 = 'dat\udce9'  # how Python has the bytes b'dat\xe9', which are not UTF-8


@pytest.mark.parametrize('name', ['log.txt', 'log_0.txt', 'log_all.txt'])
def test_a_log_on_a_full_disk(tmp_path, name):
    os.symlink('/dev/full', tmp_path / name)
    log = RunLog(str(tmp_path), 0)
    write = log.master if name == 'log.txt' else log.local
    with pytest.raises(UserError, match=f"cannot write '{tmp_path}/{name}': {NO_SPACE}"):
        write('line')
    log.close()  # does not raise it again


def test_a_log_that_cannot_be_made(tmp_path):
    with pytest.raises(UserError, match=r"cannot write '.*/nowhere/log_0\.txt': No such file"):
        RunLog(str(tmp_path / 'nowhere'), 0)


def test_standard_output_on_a_full_disk(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, 'stdout', Full())
    with pytest.raises(UserError, match=f"cannot write 'standard output': {NO_SPACE}"):
        RunLog(str(tmp_path), 0).master('line')


@pytest.mark.parametrize('number', [errno.EPIPE, errno.EIO])
def test_the_log_goes_on_without_standard_output(number, tmp_path, monkeypatch):
    """`| head -1` ended, or the terminal was closed."""

    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, 'stdout', Closed())
    log = RunLog(str(tmp_path), 0)
    log.master('line')
    assert 'line\n' in (tmp_path / 'log.txt').read_text()
    assert 'Standard output is closed; the log goes on' in (tmp_path / 'log.txt').read_text()


def test_an_error_of_a_log_can_wait_for_the_end_of_the_step(tmp_path):
    """One error per file; the other files go on."""
    log, errors = RunLog(str(tmp_path), 1), []
    log.on_error = errors.append
    log._files['log_1.txt'].close()
    log._files['log_1.txt'] = open('/dev/full', 'w', buffering=1)  # noqa: SIM115
    log.local('one')
    log.local('two')
    assert [str(error).startswith("cannot write '/dev/full': No space left") for error in errors] == [True]
    assert (tmp_path / 'log_all.txt').read_text().count('\n') == 2
    log.close()


def test_any_name_can_be_logged(tmp_path, monkeypatch):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(screen, 'ascii', errors='backslashreplace'))
    log = RunLog(str(tmp_path), 0)
    log.master(f'{LATIN1} 数')
    log.close()
    assert screen.getvalue().endswith(b'MASTER_LOG dat\\udce9 \\u6570\n')
    for name in ('log.txt', 'log_all.txt'):
        assert (tmp_path / name).read_text(encoding='utf-8').endswith('MASTER_LOG dat\\udce9 数\n')


def test_metrics_on_a_full_disk(tmp_path):
    os.symlink('/dev/full', tmp_path / 'metrics.jsonl')
    with pytest.raises(UserError, match=rf"cannot write '{tmp_path}/metrics\.jsonl': {NO_SPACE}"):
        MetricsFile(str(tmp_path / 'metrics.jsonl')).append({'kind': 'train'})


@pytest.mark.parametrize(
    ('validated', 'trained', 'left'),
    [(True, True, [(1, 'train'), (2, 'train'), (2, 'val')]), (False, True, [(1, 'train'), (2, 'train')]), (False, False, [(1, 'train')])],
)  # fmt: skip
def test_rewind(tmp_path, validated, trained, left):
    """Rows of later steps and a row that was cut off go, too."""
    file = MetricsFile(str(tmp_path / 'metrics.jsonl'))
    for step, kind in [(1, 'train'), (2, 'train'), (2, 'val'), (3, 'train')]:
        file.append({'kind': kind, 'step': step})
    with open(file.path, 'a', encoding='utf-8') as stream:
        stream.write('{"kind": "tr')
    file.rewind(2, validated, trained)
    with open(file.path, encoding='utf-8') as stream:
        assert [(row['step'], row['kind']) for row in map(json.loads, stream)] == left


def test_visualdl_reads_what_is_written(tmp_path):
    from visualdl import LogReader

    folder = str(tmp_path / LATIN1 / 'vdl')
    file = VisualDLFile(folder)
    for step in (1, 2):
        file.add_scalar('train/loss', 0.5 / step, step)
    file.add_image('picture', np.zeros((4, 6, 3), 'uint8'), 2)
    (path,) = glob.glob(f'{folder}/vdlrecords.*.log')
    reader = LogReader(file_path=path)  # complete although the writer is open
    assert [(record.id, record.value) for record in reader.get_data('scalar', 'train/loss')] == [(1, 0.5), (2, 0.25)]
    assert len(reader.get_data('image', 'picture')) == 1
    file.close()


def test_visualdl_on_a_full_disk(tmp_path):
    file = VisualDLFile(str(tmp_path))
    file.close()
    file._file = open('/dev/full', 'ab')  # noqa: SIM115 (closed below)
    with pytest.raises(UserError, match=rf"cannot write '{tmp_path}/vdlrecords\.\d+\.log': {NO_SPACE}"):
        file.add_scalar('train/loss', 1.0, 1)
    file.close()
    with pytest.raises(UserError, match='cannot write'):
        VisualDLFile('/dev/null/vdl')
