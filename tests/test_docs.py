# SPDX-License-Identifier: Apache-2.0
"""Form and language of the documents: order of a method's page, words, scripts of the pictures, keys, error sentences."""

from __future__ import annotations

import ast
import glob
import importlib
import json
import os
import re

import pytest

from config import SCHEMA
from tests.conftest import ROOT
from tests.test_structure import SOURCES

DOCS = os.path.join(ROOT, 'docs')
PAGES = sorted(glob.glob(f'{DOCS}/*.md'))
METHODS = ('deit', 'detection', 'evit', 'gmlp', 'lambda_vit', 'mae', 'mocov3', 'ms_mlp', 'segmentation', 'tome')
TOOLS = ('analysis', 'plan', 'visualize')
START, END = ['What it is for', 'Try it in minutes'], ['Options', 'Results', 'How it works', 'References']
ORDER = {
    **dict.fromkeys(METHODS, [*START, 'Train', 'Evaluate', *END]),
    **dict.fromkeys(TOOLS, [*START, 'Run on ImageNet', *END]),
}

# Words that the documents and the code avoid: the field has a term for them, or they are hard for non-native readers.
AVOIDED = (
    'anew', 'mend(s|ed)?', 'whoever', 'thereof', 'likewise', 'at work', 'lie(s)? in', 'tells?', 'told', 'thinks?', 'dealt out',
    'perceptrons?', 'begins? with those', 'takes turns', 'kin', 'perish(es)?', 'sudden death', 'leaves? behind',
    # British spelling
    r'\w*colours?\w*', 'grey', r'centre\w*', r'neighbour\w*', r'behaviours?', r'favours?', r'licences?', r'analys(e|es|ed|ing)',
    r'\w*(normal|optim|initial|organ|recogn|summar|general|synchron|stabil|quant|util|minim|maxim)is(e|es|ed|er|ers|ing|ation)',
)  # fmt: skip
WORDS = re.compile(rf'(?<![\w./`-])({"|".join(AVOIDED)})(?![\w`-])', re.IGNORECASE)
CODE = (*SOURCES, 'docs/figures/*.py', '*.sh', 'requirements*.txt', 'Makefile')
QUOTED = ("'centre'",)  # values of keys, which the configurations of users contain
TEXTS = sorted(
    os.path.relpath(path, ROOT)
    for pattern in ('*.md', 'docs/*.md', 'configs/*.yaml', *CODE)
    for path in glob.glob(os.path.join(ROOT, pattern))
)


def read(path: str) -> str:
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
        return file.read()


@pytest.mark.parametrize('name', ORDER)
def test_pages_of_methods_have_one_form(name):
    text = read(f'docs/{name}.md')
    assert 'https://arxiv.org/abs/' in ''.join(text.splitlines(True)[:5]), 'the first lines name the paper'
    assert re.findall(r'^## (.+)$', text, re.MULTILINE) == ORDER[name]
    sections = dict(re.findall(r'^## (.+?)$(.*?)(?=^## |\Z)', text, re.MULTILINE | re.DOTALL))
    assert re.search(r'^(python|sh) .*', sections['Try it in minutes'], re.MULTILINE), 'a command on the embedded data'
    assert re.search(r'^\| .*\|$', sections['Options'], re.MULTILINE), 'options are a table'


def test_every_method_has_its_page_in_the_readme():
    for name in ORDER:
        assert f'(docs/{name}.md)' in read('README.md'), name


@pytest.mark.parametrize('path', TEXTS)
def test_words(path):
    text = re.sub(r'```.*?```|`[^`\n]*`|\]\([^)]*\)', '', read(path), flags=re.DOTALL)
    text = re.sub('|'.join(QUOTED), '', text)
    found = [match.group() for match in WORDS.finditer(text)]
    assert not found, f'{path}: {", ".join(found)}; use the term of the field, in American spelling'


def test_pictures_are_written_by_a_command_in_the_documents():
    """Each picture stands in a page, and a command or script that writes it near it."""
    pages = {path: read(path) for path in ('README.md', *(os.path.relpath(page, ROOT) for page in PAGES))}
    for picture in sorted(os.path.basename(path) for path in glob.glob(f'{DOCS}/*.png')):
        page = next((text for text in pages.values() if f'{picture})' in text), None)
        assert page, f'docs/{picture} stands in no page'
        name = picture.removesuffix('.png')
        writers = (
            f'docs/{picture}',
            f'docs/figures/{name}.py',
            f'docs/figures/digits.py {name.removesuffix("_digits")}',
        )
        assert any(writer in page.replace(f'(docs/{picture})', '') for writer in writers), (
            f'no command writes docs/{picture}'
        )


def fake_run(folder, epochs: int = 2) -> None:
    """A run folder with what the curves of docs/figures/digits.py read."""
    os.makedirs(folder)
    row = {'kind': 'val', 'acc1': 0.9, 'knn_acc1': 0.9, 'loss': 0.2}
    with open(os.path.join(folder, 'metrics.jsonl'), 'w', encoding='utf-8') as file:
        file.writelines(json.dumps({**row, 'epoch': 1 + epoch}) + '\n' for epoch in range(epochs))
    with open(os.path.join(folder, 'log.txt'), 'w', encoding='utf-8') as file:
        file.writelines(f'Epoch[{1 + epoch:03}/002], Step[0000/0023], attn_lambda: 0.5\n' for epoch in range(epochs))


def test_scripts_of_the_pictures_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(os.path.join(DOCS, 'figures'))
    monkeypatch.setattr(importlib.import_module('diagram'), 'DOCS', str(tmp_path))
    for name in ('architecture', 'block', 'layout'):
        importlib.import_module(name).main()
    digits = importlib.import_module('digits')
    monkeypatch.setattr(digits, 'DOCS', str(tmp_path))
    for name in ('dense', 'continued', 'fading', 'mae', 'mae_1', 'finetuned', 'scratch', 'moco'):
        fake_run(tmp_path / name)
    for name in ('lambda', 'mae', 'mocov3'):
        digits.main(name, str(tmp_path))
    names = ['architecture', 'block', 'lambda_digits', 'layout', 'mae_digits', 'mocov3_digits']
    assert sorted(path.stem for path in tmp_path.glob('*.png')) == names


# ---------------------------------------------------------------------------------------------------- keys
def key_rows() -> list[str]:
    """A line per key for docs/glossary.md, from the line that defines it in config.py."""
    meanings = dict(re.findall(r'^_C\.([\w.]+) = (?:Size)?Key\(.*\)  # (.+)$', read('config.py'), re.MULTILINE))
    return [f'| `{name}` | `{key.default!r}` | {meanings[name]} |' for name, key in SCHEMA.keys.items()]


def test_the_glossary_has_every_key():
    rows = [line for line in read('docs/glossary.md').splitlines() if re.match(r'\| `[A-Z_.]+` \|', line)]
    assert rows == key_rows(), 'python -m tests.test_docs writes the table'


def write_keys() -> None:
    """Replace the table of keys at the end of docs/glossary.md."""
    head = read('docs/glossary.md').partition('|---|---|---|\n| `BASE`')[0]
    with open(os.path.join(DOCS, 'glossary.md'), 'w', encoding='utf-8') as file:
        file.write(head + '|---|---|---|\n' + '\n'.join(key_rows()) + '\n')


# ---------------------------------------------------------------------------------------------------- error sentences
def sentences() -> str:
    """The texts of all strings of the code, with … for inserted values."""
    texts = []
    for path in glob.glob(f'{ROOT}/**/*.py', recursive=True):
        if not os.path.relpath(path, ROOT).startswith(('tests', '.venv')):
            for node in ast.walk(ast.parse(read(path))):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else '…' for part in node.values)
                    texts.append(''.join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return '\n'.join(texts)


def test_sentences_of_the_troubleshooting_page_occur_in_the_code():
    quoted = re.findall(r'^\| `([^`]+)` \|', read('docs/troubleshooting.md'), re.MULTILINE)
    code = sentences()
    assert len(quoted) > 40
    assert not [sentence for sentence in quoted if sentence not in code]


if __name__ == '__main__':
    write_keys()
