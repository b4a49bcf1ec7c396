# SPDX-License-Identifier: Apache-2.0
"""The README and the guides agree with the code and the Chinese README: links, model tables, commands, flags and keys."""

import glob
import os
import re

import pytest

from config import get_arguments, get_config
from models import list_models
from models.registry import config_file
from models.zoo import PUBLISHED, Published
from tests.conftest import ROOT

README, CHINESE = os.path.join(ROOT, 'README.md'), os.path.join(ROOT, 'README.zh.md')
PAGES = [README, CHINESE, os.path.join(ROOT, 'CONTRIBUTING.md')] + sorted(glob.glob(f'{ROOT}/docs/*.md'))

MODELS = [name for name in list_models() if not name.endswith('_digits')]


def read(path):
    with open(path, encoding='utf-8') as file:
        return file.read()


def speeds() -> dict[str, str]:
    """Images/s by model, from the table of docs/benchmark.md."""
    section = read(os.path.join(ROOT, 'docs', 'benchmark.md')).partition('## Measured speed')[2].partition('\n## ')[0]
    return dict(re.findall(r'^\| `(\w+)` \| ([\d.]+) \|', section, re.MULTILINE))


def row(name: str) -> str:
    """A line of the tables: cost from the header of the configuration's file, which tests/models checks."""
    header = ''.join(line for line in read(config_file(name)).splitlines(True) if line.startswith('#'))
    params, macs = (
        int(text.replace(',', '')) for text in re.search(r'([\d,]+) parameters, ([\d,]+) MACs', header).groups()
    )
    published = PUBLISHED.get(name, Published(name))
    weights = published.url and f'[{"file" if published.url.endswith(".pth") else "page"}]({published.url})'
    cells = [
        name,
        f'{params / 1e6:.1f}',
        f'{macs / 1e9:.2f}',
        str(get_config(config_file(name)).DATA.IMAGE_SIZE),
        published.acc1 and f'{published.acc1:.1f}',
        speeds().get(name),
        weights,
        published.license,
    ]
    return f'| {" | ".join(cell or "–" for cell in cells)} |'


def names_in(path: str) -> list[str]:
    """Models in the table of a page."""
    return re.findall(r'^\| (\w+) \| [\d.]+ \|.*$', read(path), re.MULTILINE)


def test_the_tables_agree_with_the_configurations():
    """docs/models.md lists all models, both READMEs some. `python -m tests.test_readme` writes the tables."""
    models = os.path.join(ROOT, 'docs', 'models.md')
    assert names_in(models) == MODELS and names_in(CHINESE) == names_in(README) and len(names_in(README)) >= 10
    for path in (README, CHINESE, models):
        lines = read(path).splitlines()
        assert not [row(name) for name in names_in(path) if row(name) not in lines], 'python -m tests.test_readme'


def test_the_last_line_of_make_train():
    """The README quotes the last line of a run; tests/runs/test_launchers.py checks the run."""
    assert re.search(
        r'^----- Finished: best Validation Acc@1: 0\.\d{4} after epoch \d+, weights in ', read(README), re.MULTILINE
    )


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
    for opts in re.findall(r'(?<!-)-opts ((?:[A-Z_.]+ [^\s`]+ ?)+)', text):
        if opts.split()[0] != 'KEY':
            get_config(opts=[*opts.split(), 'MODEL.TYPE', 'any', 'TRAIN.TASK', 'any'])  # owners of keys do not matter


# ---------------------------------------------------------------------------------------------------- README.zh.md
def sections(path: str) -> list[str]:
    """Split a page at its headings, each of which begins a section; without the link to the other language."""
    text = re.sub(r'^\[(?:English|中文)\]\(README(?:\.zh)?\.md\)$', '', read(path), flags=re.MULTILINE)
    fenced = re.sub(
        r'^```.*?^```$', lambda match: match[0].replace('\n#', '\n\0#'), text, flags=re.MULTILINE | re.DOTALL
    )
    return [part.replace('\0', '') for part in re.split(r'^(?=#+ )', fenced, flags=re.MULTILINE)[1:]]


def invariants(text: str) -> dict[str, list[str]]:
    """What a translation keeps: targets of links, code and numbers, in any order, as the order of words may change."""
    prose = re.sub(r'`[^`]+`|\]\([^)]+\)', ' ', text)
    found = {
        'links': re.findall(r'\]\(([^)]+)\)', text),
        'code': re.findall(r'`([^`]+)`', text),
        'numbers': re.findall(r'\d+(?:[.,]\d+)*', prose),
    }
    return {kind: sorted(values) for kind, values in found.items()}


def structure(section: str) -> dict:
    """Level of the heading, code blocks, invariants of each cell of the table, items of the list and invariants of the rest."""
    blocks = re.findall(r'^```.*?^```$', section, re.MULTILINE | re.DOTALL)
    rest = re.sub(r'^```.*?^```$', '', section, flags=re.MULTILINE | re.DOTALL)
    rows = re.findall(r'^\|.*\|$', rest, re.MULTILINE)
    prose = re.sub(r'^\|.*\|$', '', rest, flags=re.MULTILINE)
    return {
        'level': section.partition(' ')[0],
        'blocks': blocks,
        'table': [[invariants(cell) for cell in row.split(' | ')] for row in rows],
        'items': len(re.findall('^- ', prose, re.MULTILINE)),
        **invariants(prose),
    }


def test_the_readmes_lead_to_each_other():
    assert read(README).splitlines()[2] == '[中文](README.zh.md)'
    assert read(CHINESE).splitlines()[2] == '[English](README.md)'


def test_the_readmes_have_the_same_headings():
    levels = [[section.partition(' ')[0] for section in sections(path)] for path in (README, CHINESE)]
    assert levels[0] == levels[1]


@pytest.mark.parametrize('number', range(len(sections(README))))
def test_sections_of_the_readmes_are_equal(number):
    """Commands, tables, links, code and numbers. A row or sentence that is new in one of the pages goes into the other, too."""
    english, chinese = structure(sections(README)[number]), structure(sections(CHINESE)[number])
    for part, value in english.items():
        assert chinese[part] == value, f'README.md and README.zh.md differ in {part}'


def test_the_chinese_readme_is_chinese():
    """No cell, item or paragraph is left in English. Titles of papers are in italics."""
    for section in sections(CHINESE):
        prose = re.sub(r'^```.*?^```$|`[^`]+`|\]\([^)]+\)|\*[^*]+\*', '', section, flags=re.MULTILINE | re.DOTALL)
        for text in re.split(r'\n|\|', prose):
            assert not re.search(r'(?<![\w-])(?!token)[a-z-]{3,},? [a-z-]{3,}', text), text


def write_table(path: str, names: list[str]) -> None:
    """Replace the lines of a page's table by those of `names`."""
    head, rule, rest = read(path).partition('|---|---|---|---|---|---|---|---|\n')
    end = next(i for i, line in enumerate([*rest.splitlines(True), '']) if not line.startswith('|'))
    with open(path, 'w', encoding='utf-8') as file:
        file.write(head + rule + ''.join(row(name) + '\n' for name in names) + ''.join(rest.splitlines(True)[end:]))


if __name__ == '__main__':
    for page in (README, CHINESE):
        write_table(page, names_in(README))
    write_table(os.path.join(ROOT, 'docs', 'models.md'), MODELS)
