# SPDX-License-Identifier: Apache-2.0
"""tools/report.py on runs that were trained, in this process."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from config import get_arguments, get_config, update_config
from engine.run import run_config
from tests.analysis.report.helpers import Page, write_run
from tools.report import main
from utils.errors import UserError

CONFIG = """
DATA: {{DATASET: folder, DATA_PATH: '{data}', IMAGE_SIZE: 16, BATCH_SIZE: 8, NUM_WORKERS: 0, CROP_PCT: 1.0}}
MODEL:
  TYPE: vit
  NAME: tiny
  TRANS: {{PATCH_SIZE: 4, EMBED_DIM: 16, DEPTH: 2, NUM_HEADS: 2}}
  EVIT: {{KEEP_RATE: 0.5, DROP_LOC: [0, 1]}}
TRAIN: {{NUM_EPOCHS: 2, WARMUP_EPOCHS: 1, LR_SCHEDULER: {{UPDATE: step}}}}
REPORT_FREQ: 2
SAVE: '{output}'
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory, images) -> Path:
    """The folder of a finished EViT."""
    folder = tmp_path_factory.mktemp('report')
    (folder / 'tiny.yaml').write_text(CONFIG.format(data=images, output=folder))
    arguments = [f'-cfg={folder / "tiny.yaml"}', '-tag=run', '-opts', 'TRAIN.BASE_LR', '0.01']
    run_config(update_config(get_config(), get_arguments(arguments)))
    return folder / 'run'


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / 'run'))


def read_page(path) -> Page:
    return Page(Path(path).read_text(encoding='utf-8'))


def test_a_run_without_and_with_its_predictions(run, capsys):
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f'{run} has no predictions: -evaluate adds results by class, confusion matrix, calibration and mistakes.',
        f'{run / "report.html"}: run',
    ]
    page = read_page(run / 'report.html')
    assert page.sections == ['results', 'curves', 'schedules', 'configuration', 'environment']
    assert {'lr', 'grad_norm', 'keep_rate'} <= set(page.attributes('svg', 'aria-label'))
    assert (
        f'{run.parent / "tiny.yaml"}:6' not in page.text
    )  # the folder was copied: the sources are those of the training
    sources = json.loads((run / 'run.json').read_text())['sources']
    assert sources['MODEL.NAME'].endswith('tiny.yaml:5') and sources['TRAIN.BASE_LR'] == '-opts'
    for source in (sources['MODEL.NAME'], '-opts', 'set at the start of the run'):
        assert source in page.text

    assert main([str(run), '-evaluate']) == 0
    page = read_page(run / 'report.html')
    assert page.sections == [
        'results', 'curves', 'schedules', 'classes', 'confusion', 'calibration', 'mistakes', 'pictures', 'configuration',
        'environment',
    ]  # fmt: skip
    with open(run / 'evaluation' / 'predictions.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    (result,) = map(json.loads, (run / 'evaluation' / 'metrics.jsonl').read_text().splitlines())
    right = sum(row['label'] == row['class1'] for row in rows)
    assert len(rows) == 13 and right / 13 == pytest.approx(result['acc1'])
    assert f'accuracy {right / 13:.4f}, 13 images' in page.text
    assert f'{13 - right} of {13 - right} mistakes' in page.text
    assert 'tokens' in page.attributes('img', 'alt') and 'class1' in page.text
    assert f'From {run}/evaluation/predictions.csv: an evaluation of the best weights' in page.text.replace('\n', '')


def test_the_evaluation_leaves_the_run_as_it_is(run):
    names = ('config.yaml', 'metrics.jsonl', 'log.txt', 'run.json', 'last.pdparams')
    before = {name: (run / name).read_bytes() for name in names}
    main([str(run), '-evaluate', '-batch_size=4'])
    assert {name: (run / name).read_bytes() for name in names} == before
    assert get_config(str(run / 'evaluation' / 'config.yaml')).DATA.BATCH_SIZE == 4


def test_an_evaluation_that_fails_is_a_sentence_on_the_page(run, tmp_path, capsys):
    missing = tmp_path / 'missing'
    assert main([str(run), '-evaluate', f'-data_path={missing}', f'-output={tmp_path / "new" / "page.html"}']) == 1
    page = read_page(tmp_path / 'new' / 'page.html')
    assert page.sections == ['notes', 'results', 'curves', 'schedules', 'configuration', 'environment']
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"'{run}' cannot be evaluated: ") and str(missing) in sentence
    assert sentence in page.text


def test_several_runs_of_several_tasks(run, tmp_path, capsys):
    other = write_run(tmp_path / 'mae', 'TRAIN.TASK', 'mae', 'MODEL.TYPE', 'mae')
    assert main([str(run), str(other), '-evaluate']) == 0
    assert f'{other}: TRAIN.TASK mae has no predictions, so -evaluate adds nothing' in capsys.readouterr().out
    page = read_page(run / 'comparison.html')
    assert ('h1', 'Comparison of 2 runs') in page.texts and 'TRAIN.TASK' in page.text
    assert not os.path.exists(other / 'evaluation')


def test_latest_is_followed(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    os.symlink('run', 'latest')
    assert main(['latest']) == 0
    assert ('h1', 'Run run') in read_page('run/report.html').texts


@pytest.mark.parametrize(
    ('flags', 'sentence'),
    [
        (['no/such/run'], "'no/such/run' is not the folder of a run: it has neither config.yaml nor metrics.jsonl"),
        (['.', '-data_path=x'], '-data_path has an effect with -evaluate only: add -evaluate, or remove -data_path.'),
        (['.', '-output=page.pdf'], 'must end in .html'),
    ],
)
def test_mistakes_of_the_command(flags, sentence):
    with pytest.raises(UserError) as caught:
        main(flags)
    assert sentence in str(caught.value)
