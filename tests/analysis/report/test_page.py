# SPDX-License-Identifier: Apache-2.0
"""The page about runs: its sections, its structure, foreign text, damaged files, comparison."""

import json
import os
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from analysis.report.page import render
from analysis.report.runs import distinct_names, read_runs
from tests.analysis.report.helpers import Page, predicted_run, write_images, write_predictions, write_run
from utils.errors import UserError

ALL = [
    'results',
    'curves',
    'schedules',
    'classes',
    'confusion',
    'calibration',
    'mistakes',
    'configuration',
    'environment',
]


def page_of(*folders) -> Page:
    html = render(read_runs([str(folder) for folder in folders]))
    page = Page(html)
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    loaded = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ('src', 'href', 'xlink:href', 'action', 'data') or 'url(' in value
    ]
    assert all(value.startswith(('data:image/png;base64,', '#')) for value in loaded)
    assert not re.search(r'https?://|@import|url\(', html)
    assert not {'script', 'link', 'iframe', 'object', 'base', 'form'} & {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith('on')]
    anchors = page.attributes('a', 'href')
    assert anchors == [f'#{name}' for name in page.sections if name != 'notes']
    return page


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('data'))


def test_a_page_with_all_sections(data, tmp_path):
    run = predicted_run(tmp_path / 'run', data)
    Image.fromarray(np.zeros((4, 5, 3), 'uint8')).save(run / 'reconstruction_0010.png')
    Image.fromarray(np.zeros((4, 5, 3), 'uint8')).save(run / 'reconstruction_0005.png')
    Image.fromarray(np.zeros((4, 5, 3), 'uint8')).save(run / 'reconstruction_0007.png')
    page = page_of(run)
    assert page.sections == [*ALL[:7], 'pictures', *ALL[7:]]
    assert ('h1', 'Run run') in page.texts
    for text in (
        '0.7000 (best: 0.8000, epoch 2)',
        '0.1667 (best: 0.1667, epoch 3)',
        '6 s',
        'configs/tiny.yaml:7',
        '3.11.7',
    ):
        assert text in page.text, text
    charts = page.attributes('svg', 'aria-label')
    assert [name for name in charts if name in ('loss', 'acc1', 'acc5', 'lr', 'keep_rate', 'grad_norm')] == [
        'loss', 'acc1', 'acc5', 'lr', 'keep_rate', 'grad_norm',
    ]  # fmt: skip
    assert 'reconstruction, epoch 5' in page.text and 'reconstruction, epoch 10' in page.text
    assert 'epoch 7' not in page.text
    style = dict(page.texts)['style']
    assert 'prefers-color-scheme: dark' in style and 'color-scheme: light dark' in style


def test_mistakes_confusions_and_calibration(data, tmp_path):
    page = page_of(predicted_run(tmp_path / 'run', data))
    captions = [text for tag, text in page.texts if tag == 'figcaption']
    assert [text for text in captions if 'predicted' in text and '(' in text] == [
        'fly, predicted cat (0.900)', 'cat, predicted dog (0.500)',
    ]  # fmt: skip
    assert '2 of 2 mistakes' in page.text
    tips = [text for tag, text in page.texts if tag == 'title']
    assert 'fly predicted as cat: 1 of 2 (50.0 %)' in tips and 'dog correct: 2 of 2 (100.0 %)' in tips
    # bins of 1/15: confidences .4 .5 .6 .7 .8 .9, each in a bin of its own; right: 1 0 1 1 1 0
    error = np.mean([0.6, 0.5, 0.4, 0.3, 0.2, 0.9])
    assert f'ECE {error:.4f}' in page.text
    assert len(page.attributes('img', 'src')) == 2


@pytest.mark.parametrize('kind', ['pretraining', 'evaluation', 'metrics', 'config'])
def test_sections_without_content_are_absent(kind, tmp_path):
    opts = ['TRAIN.TASK', 'mae', 'MODEL.TYPE', 'mae'] if kind == 'pretraining' else []
    run = write_run(tmp_path / 'run', *opts, info=False)
    expected = {
        'pretraining': ['results', 'curves', 'schedules', 'configuration'],
        'evaluation': ['results', 'configuration'],
        'metrics': ['notes', 'results', 'curves'],
        'config': ['notes', 'configuration'],
    }[kind]
    if kind == 'evaluation':
        (run / 'metrics.jsonl').write_text('{"kind": "eval", "epoch": 0, "step": 0, "acc1": 0.75, "images": 4}\n')
        (run / 'log.txt').unlink()
    elif kind == 'metrics':
        (run / 'log.txt').unlink()
        (run / 'config.yaml').unlink()
        expected.insert(3, 'schedules')
    elif kind == 'config':
        (run / 'log.txt').unlink()
        (run / 'metrics.jsonl').unlink()
    page = page_of(run)
    assert page.sections == expected
    assert kind != 'evaluation' or '0.7500' in page.text
    assert 'This run recorded no sources' in page.text or kind == 'metrics'


def test_runs_are_compared(data, tmp_path):
    first, second = predicted_run(tmp_path / 'a' / 'run', data), predicted_run(
        tmp_path / 'b' / 'run', data, 'TRAIN.NUM_EPOCHS', 7, name='other', offset=0.1
    )  # fmt: skip
    third = write_run(tmp_path / 'c' / 'run', 'TRAIN.NUM_EPOCHS', 7)
    page = page_of(first, second, third)
    assert page.sections == ALL
    assert ('h1', 'Comparison of 3 runs') in page.texts
    table = page.text[page.text.index('values differ') :]
    assert table.startswith('values differ') or re.match(r'\d+ values differ', table)
    position = table.index('TRAIN.NUM_EPOCHS')
    assert table[position:].splitlines()[1:4] == ['300', '7', '7']
    assert 'TRAIN.BASE_LR' not in table[: table.index('Configuration of a/run')]
    polylines = page.attributes('polyline', 'class')
    assert {f'curve c{color} dash-{dash}' for color in range(3) for dash in (0, 1)} <= set(polylines)
    assert page.text.count('ECE') == 2
    assert len([tag for tag, text in page.texts if tag == 'h3' and text in ('a/run', 'b/run')]) == 4  # two sections


def test_equal_runs_say_so(tmp_path):
    page = page_of(write_run(tmp_path / 'a'), write_run(tmp_path / 'b'))
    assert 'All values are equal' in page.text


def test_validations_within_epochs_are_drawn_by_step(tmp_path):
    run = write_run(tmp_path / 'run')
    with open(run / 'metrics.jsonl', 'a', encoding='utf-8') as file:
        file.write('{"kind": "val", "epoch": 3, "step": 35, "loss": 0.1, "acc1": 0.7}\n')
    page = page_of(run)
    assert ('text', 'step') in page.texts
    assert 'validation: 0.1 (step 35)' in page.text


# ---------------------------------------------------------------------------------------------------- foreign text
EVIL = '<script>alert("x")</script>&amp;\'"><img src=http://evil.example/x onerror=y>'


def test_foreign_text_is_escaped(tmp_path):
    """Names of classes, runs, files, metrics, values of the configuration, and all of run.json."""
    names = ('a<script>alert(1)<!--', 'b</style><b>', 'c"><svg onload=x>')
    data = write_images(tmp_path / 'data<i>', [name.replace('/', '') for name in names])
    clean = tuple(name.replace('/', '') for name in names)
    run = predicted_run(tmp_path / '<script>run', data, names=clean, name=EVIL)
    (run / 'run.json').write_text(json.dumps({
        'commands': [EVIL], 'environment': {EVIL: EVIL}, 'sources': {'TRAIN.BASE_LR': EVIL},
    }))  # fmt: skip
    with open(run / 'metrics.jsonl', 'a', encoding='utf-8') as file:
        file.write(json.dumps({'kind': 'val', 'epoch': 4, 'step': 40, EVIL: 0.5}) + '\n')
    page = Page(render(read_runs([str(run)])))
    allowed = {
        *(
            'html',
            'head',
            'meta',
            'title',
            'style',
            'body',
            'main',
            'h1',
            'h2',
            'h3',
            'p',
            'span',
            'br',
            'nav',
            'a',
            'section',
        ),
        *(
            'ul',
            'li',
            'dl',
            'dt',
            'dd',
            'div',
            'table',
            'thead',
            'tbody',
            'tr',
            'th',
            'td',
            'code',
            'figure',
            'figcaption',
        ),
        *('details', 'summary', 'img', 'svg', 'line', 'polyline', 'circle', 'rect', 'text'),
    }
    assert {tag for tag, _ in page.elements} <= allowed
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith('on')]
    assert all(source.startswith('data:') for source in page.attributes('img', 'src'))
    assert page.text.count(EVIL) >= 6  # metric, model, command, environment twice, source
    for name in clean:
        assert name in page.text
    assert page.texts[0] == ('title', 'Run <script>run')


def test_control_characters_are_visible(tmp_path):
    run = write_run(tmp_path / 'run')
    (run / 'run.json').write_text(json.dumps({
        'commands': ['a\x00b\x1b[2J\u202ec\ud800'], 'environment': {}, 'sources': {},
    }))  # fmt: skip
    assert 'a\\x00b\\x1b[2J\\u202ec\\ud800' in page_of(run).text
    render(read_runs([str(run)])).encode()


# ---------------------------------------------------------------------------------------------------- damaged files
def damage(run, name, content):
    path = run / name
    if path.exists():
        path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


HEAD = b'index,image,label,class1,name1,probability1,error\n'
DAMAGED = {
    'half a row': ('metrics.jsonl', b'{"kind": "train", "epoch": 1, "st\n[1]\n{"kind": "val", "epoch": "x", "step": 1}\n', '3 damaged lines'),
    'metrics are a folder': ('metrics.jsonl', None, 'metrics.jsonl'),
    'log is a folder': ('config.yaml', b'TRAIN: {LR: 3', 'The configuration is left out'),
    'unknown key': ('config.yaml', b'NO_SUCH_KEY: 1', "unknown key 'NO_SUCH_KEY'"),
    'run.json': ('run.json', b'[]', 'it has other content'),
    'deep run.json': ('run.json', b'[' * 100_000, 'it is no JSON'),
    'empty predictions': ('predictions.csv', b'', 'it is empty'),
    'no predictions': ('predictions.csv', HEAD, 'it has no prediction'),
    'short row': ('predictions.csv', HEAD + b'0,a.png,1\n', 'a row has 3 instead of 7 cells'),
    'large label': ('predictions.csv', HEAD + b'0,a.png,999999999,0,,0.5,\n', 'out of range'),
    'negative label': ('predictions.csv', HEAD + b'0,a.png,-1,0,,0.5,\n', 'out of range'),
    'no number': ('predictions.csv', HEAD + b'0,a.png,1,0,,often,\n', 'out of range'),
    'column': ('predictions.csv', b'index,image,label\n0,a.png,1\n', 'it has no column class1'),
    'huge cell': ('predictions.csv', HEAD + b'0,' + b'a' * 200_000 + b',1,0,,0.5,\n', 'field larger than field limit'),
    'classes': ('classes.csv', b'name,acc1\ncat,0.5\n', 'its first columns are not class and name'),
    'picture': ('tokens.png', b'\x89PNG\r\n\x1a\nno', 'tokens.png'),
}  # fmt: skip


@pytest.mark.parametrize('case', DAMAGED)
def test_a_damaged_file_gives_one_sentence_and_the_rest_of_the_page(case, data, tmp_path):
    name, content, sentence = DAMAGED[case]
    run = predicted_run(tmp_path / 'run', data)
    damage(run, name, content)
    (one,) = read_runs([str(run)])
    assert len(one.notes) == 1 and sentence in one.notes[0] and one.notes[0].endswith('.')
    page = page_of(run)
    assert page.sections[0] == 'notes' and {'configuration', 'curves'} & set(page.sections)
    assert one.notes[0] in page.text


def test_pictures_of_mistakes_need_the_data(data, tmp_path):
    moved = tmp_path / 'moved'
    run = predicted_run(tmp_path / 'run', moved)
    text = page_of(run).text
    assert 'The pictures are left out: ' in text and str(moved) in text
    shutil.copytree(data, moved)
    write_predictions(run, [str(moved / 'val' / f'{k}.png') for k in range(6)])
    assert "image 1 of the data is not '" in page_of(run).text
    run.joinpath('predictions.csv').unlink()
    assert 'mistakes' not in page_of(run).sections


def test_what_is_no_run(tmp_path):
    with pytest.raises(
        UserError, match='is not the folder of a run: it has neither config.yaml nor metrics.jsonl; give'
    ):
        read_runs([str(tmp_path)])


def test_the_newer_predictions_count(data, tmp_path):
    run = predicted_run(tmp_path / 'run', data)
    (run / 'evaluation').mkdir()
    write_predictions(
        run / 'evaluation',
        [str(data / 'val' / name / f'{k}.png') for name in ('cat', 'dog', 'fly') for k in (0, 1)],
        (0,) * 6,
    )
    later = time.time() + 10
    os.utime(run / 'evaluation' / 'predictions.csv', (later, later))
    assert '4 of 4 mistakes' in page_of(run).text
    os.utime(run / 'predictions.csv', (later + 10, later + 10))
    assert '2 of 2 mistakes' in page_of(run).text


@pytest.mark.parametrize(
    ('columns', 'metric'), [('class1,name1,share1', 'iou'), ('class1,name1,score1,left1,top1,width1,height1', 'box_ap')]
)
def test_results_by_class_of_segmentation_and_detection(columns, metric, tmp_path):
    """Their predictions have no labels, so there is neither a confusion matrix nor a damaged file."""
    run = write_run(tmp_path / 'run')
    cells = ','.join('0' for _ in columns.split(','))
    (run / 'predictions.csv').write_text(f'index,image,{columns},error\n0,a.png,{cells},\n')
    (run / 'classes.csv').write_text(f'class,name,{metric},correct\n0,sky,0.25,7\n1,road,,0\n2,tree,4.5e-05,1\n')
    page = page_of(run)
    assert page.sections == ['results', 'curves', 'schedules', 'classes', 'configuration', 'environment']
    tips = [text for tag, text in page.texts if tag == 'title']
    assert [tip for tip in tips if metric in tip] == [f'sky, {metric}: 0.2500', f'tree, {metric}: 0.0000']


def test_names_of_runs():
    assert distinct_names(['output/a', 'output/b']) == ['a', 'b']
    assert distinct_names(['x/run', 'y/run/']) == ['x/run', 'y/run']
    assert distinct_names(['a', 'a']) == ['a (1)', 'a (2)']


def test_many_classes(data, tmp_path):
    """A chart of the worst and the best classes, a confusion matrix of pixels."""
    run = write_run(tmp_path / 'run')
    names = [f'class {k}' for k in range(100)]
    rows = [f'{k},a.png,{k},{(k + (k < 7)) % 100},x,0.9,' for k in range(100)]
    (run / 'predictions.csv').write_text(HEAD.decode() + '\n'.join(rows) + '\n')
    rows = [f'{k},{name},{k / 100}' for k, name in enumerate(names)]
    (run / 'classes.csv').write_text('class,name,acc1\n' + '\n'.join(rows) + '\n')
    page = page_of(run)
    assert 'acc1: the 30 worst and the 10 best of 100 classes' in page.text
    assert 'class 40, acc1: 0.4000' not in page.text and 'class 29, acc1: 0.2900' in page.text
    assert 'confusion matrix' in page.attributes('img', 'alt')


# ---------------------------------------------------------------------------------------------------- browser
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome', 'chrome-headless-shell', 'headless_shell')


def test_in_a_browser(data, tmp_path):
    """Chromium lays the page out, in the light and in the dark, without a request and without a message on its console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip('no Chromium on this machine')
    target = tmp_path / 'page.html'
    target.write_text(render(read_runs([str(predicted_run(tmp_path / 'run', data))])), encoding='utf-8')
    pictures = []
    for scheme in ('light', 'dark'):
        shot = tmp_path / f'{scheme}.png'
        flags = [
            f'--user-data-dir={tmp_path / scheme}',
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--hide-scrollbars',
        ]
        flags += ['--enable-logging=stderr', '--window-size=1200,3000', f'--screenshot={shot}']
        flags += ['--force-dark-mode', '--blink-settings=preferredColorScheme=0'] if scheme == 'dark' else []
        result = subprocess.run(
            [browser, *flags, target.as_uri()], capture_output=True, text=True, timeout=120, check=False
        )
        assert 'CONSOLE' not in result.stderr, result.stderr[-2000:]
        pictures.append(np.asarray(Image.open(shot).convert('L'), float))
    light, dark = pictures
    assert light.std() > 5 and dark.std() > 5  # not blank
    assert light.mean() > 180 > 100 > dark.mean()
