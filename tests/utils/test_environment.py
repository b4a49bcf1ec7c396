# SPDX-License-Identifier: Apache-2.0
"""A home folder that cannot be written to."""

import os

import pytest

from utils.environment import ensure_home, expand_user


@pytest.fixture
def variables(monkeypatch):
    """The environment, of which a test may change anything."""
    monkeypatch.setattr(os, 'environ', dict(os.environ))
    os.environ.pop('LEANVIT_HOME', None)
    return os.environ


def test_a_home_that_can_be_written_to_stays(variables, tmp_path):
    variables['HOME'] = str(tmp_path)
    ensure_home()
    assert variables['HOME'] == str(tmp_path)
    assert expand_user('~/data') == f'{tmp_path}/data'


@pytest.mark.parametrize('kind', ['file', 'below a file', 'missing', 'unusable cache'])
def test_another_home_is_taken(variables, tmp_path, kind):
    homes = {
        'file': '/dev/null',
        'below a file': '/dev/null/x',
        'missing': str(tmp_path / 'x'),
        'unusable cache': str(tmp_path),
    }
    (tmp_path / '.cache').touch()
    variables.update(HOME=homes[kind], LEANVIT_CACHE=str(tmp_path / 'cache'))
    ensure_home()
    assert variables['HOME'] == str(tmp_path / 'cache' / 'home')
    assert os.path.isdir(variables['HOME'])
    assert expand_user('~/data') == f'{homes[kind]}/data'  # what the user means
    assert expand_user('~') == homes[kind]
    ensure_home()  # as a process that is started by this one does
    assert expand_user('~/data') == f'{homes[kind]}/data'


def test_without_a_cache_the_home_is_temporary(variables, tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    for cache in ('', '/dev/null/cache'):
        variables.update(HOME='/dev/null', LEANVIT_CACHE=cache)
        ensure_home()
        assert variables['HOME'] == str(tmp_path / f'leanvit-home-{os.getuid()}')
