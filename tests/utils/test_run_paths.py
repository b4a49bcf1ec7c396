# SPDX-License-Identifier: Apache-2.0
"""Names of runs, and `latest` as a link or as a pointer file."""

import errno
import os
import threading

import pytest

from utils.errors import UserError
from utils.run_paths import check_run_name, follow_latest, point_latest

NO_LINKS = [
    OSError(errno.EPERM, 'Operation not permitted'),
    OSError(errno.ENOTSUP, 'Operation not supported'),
    OSError(errno.EOPNOTSUPP, 'Operation not supported'),
    NotImplementedError('no links'),
]


def refuse(error):
    def call(*args, **options):
        raise error

    return call


@pytest.fixture(params=['link', 'pointer file'])
def kind(request, monkeypatch):
    if request.param == 'pointer file':
        monkeypatch.setattr(os, 'symlink', refuse(NO_LINKS[0]))
    return request.param


@pytest.mark.parametrize('name', ['a', 'a/b', 'a//b/', './a', 'a.b', 'latest2', 'Größe 1'])
def test_names_of_folders_below(name):
    check_run_name(name)


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        *[(name, 'must name a folder below -output') for name in ('..', '../a', 'a/../b', '/a', '.', './', '/', ' ', 'a/..')],
        *[(name, "'latest' stands for the run") for name in ('latest', './latest/x', 'a/latest', 'latest/', 'Latest')],
        *[(name, 'neither a backslash nor') for name in ('a\\b', '..\\a', 'a\0b', 'a\nb', '\udce4')],
        ('latest/..', 'must name a folder below -output'),
    ],
)  # fmt: skip
def test_other_names_are_refused(name, words):
    with pytest.raises(UserError, match=words) as caught:
        check_run_name(name)
    assert str(caught.value).isprintable()


def test_latest_is_followed(tmp_path, kind):
    (tmp_path / 'exp' / 'y').mkdir(parents=True)
    point_latest(str(tmp_path), 'exp/y')
    latest = tmp_path / 'latest'
    assert latest.is_symlink() == (kind == 'link')
    run = f'{tmp_path}/exp/y'
    assert follow_latest(f'{latest}') == run
    assert follow_latest(f'{latest}/') == f'{run}/'
    assert follow_latest(f'{latest}/config.yaml') == f'{run}/config.yaml'
    point_latest(str(tmp_path), 'b')
    assert follow_latest(f'{latest}') == f'{tmp_path}/b'
    assert sorted(os.listdir(tmp_path)) == ['exp', 'latest']


@pytest.mark.parametrize('error', NO_LINKS)
def test_a_pointer_file_where_there_are_no_links(tmp_path, monkeypatch, error):
    monkeypatch.setattr(os, 'symlink', refuse(error))
    point_latest(str(tmp_path), 'a')
    assert (tmp_path / 'latest').read_text() == 'a\n'
    assert os.listdir(tmp_path) == ['latest']


def test_what_is_no_pointer_stays(tmp_path):
    for content in (b'\x80\x04weights', b'two\nlines\n', b'', b'x' * 5000):
        (tmp_path / 'latest').write_bytes(content)
        assert follow_latest(f'{tmp_path}/latest') == f'{tmp_path}/latest'
        point_latest(str(tmp_path), 'a')
        assert (tmp_path / 'latest').read_bytes() == content
    os.unlink(tmp_path / 'latest')
    (tmp_path / 'latest').mkdir()
    point_latest(str(tmp_path), 'a')
    assert (tmp_path / 'latest').is_dir() and not (tmp_path / 'latest').is_symlink()


def test_a_link_to_itself_is_replaced(tmp_path):
    os.symlink('latest', tmp_path / 'latest')
    assert follow_latest(f'{tmp_path}/latest') == f'{tmp_path}/latest'
    point_latest(str(tmp_path), 'a')
    assert os.readlink(tmp_path / 'latest') == 'a'


def test_other_paths_are_what_they_are(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    for path in ('', '/', 'a', './a/b.pdparams', 'a/', '/a', 'nowhere/latest', 'a\0b/latest'):
        assert follow_latest(path) == path
    assert follow_latest('~/a') == '/home/me/a'


def test_runs_that_start_together_all_point(tmp_path, kind):
    """`latest` is never missing, and always leads to one of them."""
    point_latest(str(tmp_path), 'run0')
    errors, seen = [], set()

    def point(number):
        try:
            for _ in range(20):
                point_latest(str(tmp_path), f'run{number}')
                seen.add(os.path.basename(follow_latest(f'{tmp_path}/latest')))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=point, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert seen <= {'run0', 'run1', 'run2'}
    assert os.listdir(tmp_path) == ['latest']
