# SPDX-License-Identifier: Apache-2.0
"""The README and the guides agree with the code: links, model tables, commands, flags and keys."""

import glob
import os
import re

import pytest

from config import get_arguments, get_config
from models import list_models
from models.registry import config_file
from models.zoo import PUBLISHED, Published
from tests.conftest import ROOT

README = os.path.join(ROOT, 'README.md')
PAGES = [README, os.path.join(ROOT, 'CONTRIBUTING.md')] + sorted(glob.glob(f'{ROOT}/docs/*.md'))

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
    """docs/models.md lists all models, the README some. `python -m tests.test_readme` writes both tables."""
    models = os.path.join(ROOT, 'docs', 'models.md')
    assert names_in(models) == MODELS and len(names_in(README)) >= 10
    for path in (README, models):
        lines = read(path).splitlines()
        assert not [row(name) for name in names_in(path) if row(name) not in lines], 'python -m tests.test_readme'


def test_the_last_line_of_make_train():
    """The README quotes the line with which a run ends; tests/runs/test_launchers.py checks the run."""
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


def write_table(path: str, names: list[str]) -> None:
    """Replace the lines of a page's table by those of `names`."""
    head, rule, rest = read(path).partition('|---|---|---|---|---|---|---|---|\n')
    end = next(i for i, line in enumerate([*rest.splitlines(True), '']) if not line.startswith('|'))
    with open(path, 'w', encoding='utf-8') as file:
        file.write(head + rule + ''.join(row(name) + '\n' for name in names) + ''.join(rest.splitlines(True)[end:]))


if __name__ == '__main__':
    write_table(README, names_in(README))
    write_table(os.path.join(ROOT, 'docs', 'models.md'), MODELS)
