# SPDX-License-Identifier: Apache-2.0
"""The README and the guides stay true: links lead somewhere, the model table says what the configurations say."""

import glob
import os
import re

import pytest

from config import get_arguments, get_config
from models import list_models
from models.registry import config_file
from models.zoo import PUBLISHED
from tests.conftest import ROOT

PAGES = [os.path.join(ROOT, name) for name in ('README.md', 'CONTRIBUTING.md')] + sorted(glob.glob(f'{ROOT}/docs/*.md'))


def read(path):
    with open(path, encoding='utf-8') as file:
        return file.read()


def row(name: str) -> str:
    """A line of the README's table, from the header of the configuration's file, which tests/models checks."""
    header = ''.join(line for line in read(config_file(name)).splitlines(True) if line.startswith('#'))
    params, macs = (
        int(text.replace(',', '')) for text in re.search(r'([\d,]+) parameters, ([\d,]+) MACs', header).groups()
    )
    config = get_config(config_file(name))
    accuracy = f'{PUBLISHED[name].acc1:.1f}' if name in PUBLISHED else '–'
    return f'| {name} | {params / 1e6:.1f} | {macs / 1e9:.2f} | {config.DATA.IMAGE_SIZE} | {accuracy} |'


def test_the_tables_say_what_the_configurations_say():
    """docs/models.md lists all of them, the README some. `python -m tests.test_readme` writes the former anew."""
    rows = {name: row(name) for name in list_models() if not name.endswith('_digits')}
    assert table(os.path.join(ROOT, 'docs', 'models.md')) == rows
    readme = table(os.path.join(ROOT, 'README.md'))
    assert len(readme) >= 10 and readme == {name: rows[name] for name in readme}


def table(path: str) -> dict[str, str]:
    """The lines of a table of models by the model's name."""
    found = re.findall(r'^\| (\w+) \| [\d.]+ \| .*$', read(path), re.MULTILINE)
    return {name: re.search(rf'^\| {name} \|.*$', read(path), re.MULTILINE).group() for name in found}


@pytest.mark.parametrize('page', PAGES, ids=os.path.basename)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)#\s]+)', read(page)):
        if not target.startswith('http'):
            assert os.path.exists(os.path.join(os.path.dirname(page), target)), target


@pytest.mark.parametrize('page', PAGES, ids=os.path.basename)
def test_commands_name_files_flags_and_keys_that_exist(page):
    text = re.sub(r'\\\n\s*', ' ', read(page))
    for config in re.findall(r'\./(configs/\S+?\.yaml)', text):
        assert os.path.exists(os.path.join(ROOT, config)), config
    for script in re.findall(r'python3? ((?:tools|main)\S+\.py)', text):
        assert os.path.exists(os.path.join(ROOT, script)), script
    for flags in re.findall(r'^python3? main_\w+\.py (.*)$', text, re.MULTILINE):
        get_arguments(flags.split('#')[0].split())
    for opts in re.findall(r'-opts ((?:[A-Z_.]+ [^\s`]+ ?)+)', text):
        if opts.split()[0] != 'KEY':
            get_config(opts=[*opts.split(), 'MODEL.TYPE', 'any', 'TRAIN.TASK', 'any'])  # owners of keys do not matter


if __name__ == '__main__':
    path = os.path.join(ROOT, 'docs', 'models.md')
    head = read(path).partition('|---')[0]
    rule = '|---|---|---|---|---|\n'
    with open(path, 'w', encoding='utf-8') as file:
        file.write(head + rule + ''.join(row(name) + '\n' for name in list_models() if not name.endswith('_digits')))
