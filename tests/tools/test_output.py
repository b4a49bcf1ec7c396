# SPDX-License-Identifier: Apache-2.0
"""`-output` of all tools: the same mistakes are the same sentences, before any work, and nothing is left behind."""

from __future__ import annotations

import argparse
import importlib
import os
import re

import pytest

from tests.conftest import ROOT
from tools._output import add_output_file, add_output_folder, add_output_prefix
from utils.errors import UserError


def parse(add, *args, output, **options):
    parser = argparse.ArgumentParser()
    add(parser, *args, **options)
    return next(iter(vars(parser.parse_args(['-output', str(output)])).values()))


FILE, PREFIX, FOLDER = (
    (add_output_file, '.csv', '.json'),
    (add_output_prefix, '.json', '.png'),
    (add_output_folder, 'x'),
)


@pytest.mark.parametrize('kind, name', [(FILE, 'x.csv'), (FILE, 'a/b/x.json'), (PREFIX, 'a/x'), (FOLDER, 'a/b')])
def test_missing_folders_are_fine_and_not_created_yet(tmp_path, kind, name):
    assert parse(*kind, output=tmp_path / name) == str(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    'kind, name, words',
    [
        (FILE, '', r"-output is the folder '{0}'; add a name, such as '{0}/NAME\.csv'"),
        (PREFIX, '', r"-output is the folder '{0}'; add a name, such as '{0}/NAME\.json'"),
        (FILE, 'new/', r"-output is the folder '{0}/new/'; add a name"),
        (PREFIX, 'new/', r"-output is the folder '{0}/new/'; add a name"),
        (FILE, 'x.txt', r"-output is '{0}/x\.txt', but must end in \.csv or \.json"),
        (FOLDER, 'file', r"-output is the file '{0}/file', but must be a folder"),
        (FILE, 'file/x.csv', r"cannot write '{0}/file/x\.csv': Not a directory"),
        (PREFIX, 'file/a/x', r"cannot write '{0}/file/a/x': Not a directory"),
        (FOLDER, 'file/a', r"cannot write '{0}/file/a': Not a directory"),
        (FILE, '../../../../../../../proc/x.csv', "cannot write '.*/proc/x.csv'"),
        (FOLDER, '../../../../../../../proc/x/y', "cannot write '.*/proc/x/y'"),
    ],
)
def test_mistakes(tmp_path, kind, name, words):
    (tmp_path / 'file').touch()
    output = f'{tmp_path}/{name}' if name else tmp_path
    with pytest.raises(UserError, match=words.format(re.escape(str(tmp_path)))):
        parse(*kind, output=output)
    assert os.listdir(tmp_path) == ['file']


def test_a_suffix_may_be_added(tmp_path):
    for name in ('w', 'w.pdparams'):
        path = parse(add_output_file, '.pdparams', complete=True, output=tmp_path / name)
        assert path == str(tmp_path / 'w.pdparams')


OUTPUTS = {
    'FILE': {'extract_features', 'port_weights', 'predict', 'prune', 'report', 'visualize_mae'},
    'DIR/NAME': {'analyze_attention', 'compare_layers', 'export', 'select_layers'},
    'DIR': {'make_lmdb', 'make_zip', 'plan', 'visualize_tokens'},
}


@pytest.mark.parametrize(
    'metavar, tool', [(metavar, tool) for metavar, tools in OUTPUTS.items() for tool in sorted(tools)]
)
def test_help_says_what_output_is(metavar, tool, capsys):
    module = importlib.import_module(f'tools.{tool}')
    with pytest.raises(SystemExit):
        module.main(['-h'])
    assert re.search(rf'-output {metavar}\s', capsys.readouterr().out)


def test_all_tools_use_these_flags():
    for name in os.listdir(os.path.join(ROOT, 'tools')):
        with open(os.path.join(ROOT, 'tools', name), encoding='utf-8') as file:
            assert name == '_output.py' or not re.search(
                r"(add|add_argument)\(\s*'-(output|json|report|grid)'", file.read()
            )
