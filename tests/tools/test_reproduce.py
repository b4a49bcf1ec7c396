# SPDX-License-Identifier: Apache-2.0
"""tools/reproduce.py on a zoo of short trainings on the embedded digits, end to end."""

import csv
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from config import get_config
from engine.run import run_config
from models import build_model
from models.profile import profile
from models.zoo import PUBLISHED, Published, read_zoo
from tests.conftest import ROOT
from tools._reproduction import Request, find_weights, given_weights
from tools._zoo_table import cells_of, draw
from tools.reproduce import RESULTS, Results, main
from utils.errors import UserError
from utils.formats import read_file
from utils.weights import METADATA

SHORT = ['TRAIN.NUM_ITERS', 3, 'TRAIN.WARMUP_EPOCHS', 0, 'TRAIN.LR_SCHEDULER.NAME', 'constant', 'SAVE_KEEP', 1]
TABLE = 'name,acc1,acc5,source\ngmlp_digits,99.7,,README.md\ndeit_digits,95.8,100,docs/lambda_vit.md\nvit_digits,97,,docs/mae.md\n'


@pytest.fixture(scope='module')
def zoo(tmp_path_factory) -> SimpleNamespace:
    """The run folder gmlp_digits, deit_digits.npz in PyTorch's layout, a damaged vit_digits.pdparams, and a table of all."""
    root = tmp_path_factory.mktemp('zoo')
    for name in ('gmlp_digits', 'deit_digits'):
        config = get_config(f'configs/{name}.yaml', [*SHORT, 'SAVE', str(root / 'weights'), 'TAG', name])
        config.defrost()
        run_config(config)
    best = root / 'weights' / 'deit_digits' / 'best.pdparams'
    arrays = {name: value for name, value in read_file(str(best)).items() if name != METADATA}
    os.rename(best.parent, root / 'deit')
    np.savez(
        root / 'weights' / 'deit_digits.npz', **{name: as_in_pytorch(name, value) for name, value in arrays.items()}
    )
    (root / 'weights' / 'vit_digits.pdparams').write_bytes(b'damaged')
    (root / 'zoo.csv').write_text(TABLE)
    argv = [
        '-zoo',
        root / 'zoo.csv',
        '-weights',
        root / 'weights',
        '-output',
        root / 'out',
        '-rounds',
        '2',
        '-speed_batch',
        '4',
    ]
    return SimpleNamespace(root=root, argv=list(map(str, argv)), out=root / 'out')


def as_in_pytorch(name: str, value: np.ndarray) -> np.ndarray:
    """Linear layers of PyTorch hold the transposed matrix."""
    return value.T if value.ndim == 2 and not name.startswith(('cls', 'pos')) else value


def validated(folder) -> tuple[float, float]:
    """Top-1 and top-5 accuracy of the last validation of a run, percent."""
    with open(folder / 'metrics.jsonl', encoding='utf-8') as file:
        last = [row for row in map(json.loads, file) if row['kind'] == 'val'][-1]
    return 100 * last['acc1'], 100 * last['acc5']


def stored(zoo) -> dict:
    content = json.loads((zoo.out / RESULTS).read_text())
    return {row['name']: row for row in content['rows']}


def test_the_zoo_is_reproduced_and_a_failed_row_is_repeated(zoo):
    command = [sys.executable, 'tools/reproduce.py', *zoo.argv]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    rows = stored(zoo)
    assert [row['status'] for row in rows.values()] == ['done', 'done', 'failed']
    assert 'vit_digits.pdparams' in rows['vit_digits']['reason'] and 'Traceback' not in result.stderr
    for name, folder in (('gmlp_digits', zoo.root / 'weights' / 'gmlp_digits'), ('deit_digits', zoo.root / 'deit')):
        row = rows[name]
        assert (row['acc1'], row['acc5']) == pytest.approx(validated(folder), abs=1e-3) and row['images'] == 355
        cost = profile(build_model(get_config(f'configs/{name}.yaml', ['MODEL.NUM_CLASSES', 10])), [1, 1, 16, 16])
        assert (row['params'], row['macs']) == (cost.params, cost.macs) and row['images_per_second'] > 0
    assert os.listdir(zoo.out / 'weights') == ['deit_digits.pdparams']
    check_table(zoo, rows)
    best = zoo.root / 'deit' / 'best.pdparams'  # the third one, without its training
    config = get_config('configs/vit_digits.yaml', ['MODEL.NUM_CLASSES', 10])
    write_weights(zoo.root / 'weights' / 'vit_digits.pdparams', config)
    assert best.exists() and main([*zoo.argv, 'vit_digits', 'gmlp_digits']) == 0
    again = stored(zoo)
    assert again['vit_digits']['status'] == 'done' and 'reason' not in again['vit_digits']
    assert {name: again[name] for name in ('gmlp_digits', 'deit_digits')} == {
        name: rows[name] for name in ('gmlp_digits', 'deit_digits')
    }


def write_weights(path, config) -> None:
    from utils.formats import write_pdparams

    model = build_model(config)
    write_pdparams({**model.state_dict(), METADATA: model.weight_rules.metadata(model)}, str(path))


def check_table(zoo, rows) -> None:
    with open(zoo.out / 'table.csv', encoding='utf-8', newline='') as file:
        table = {row['name']: row for row in csv.DictReader(file)}
    assert float(table['deit_digits']['acc1']) == rows['deit_digits']['acc1'] and table['vit_digits']['acc1'] == ''
    lines = [line for line in (zoo.out / 'table.md').read_text().splitlines() if line.startswith('| gmlp')]
    cells = lines[0].strip('| ').split(' | ')
    assert cells[1] == '99.70' and float(cells[3]) == pytest.approx(rows['gmlp_digits']['acc1'] - 99.7, abs=0.0051)
    width, height = Image.open(zoo.out / 'zoo.png').size
    assert width > height > 400


# ---------------------------------------------------------------------------------------------------- parts
def row(name='a_x', **fields) -> dict:
    known = {'acc1': 80.0, 'acc5': None, 'params': 5e6, 'macs': 1e9, 'images_per_second': 100.0, 'status': 'done'}
    return {'name': name, 'published_acc1': 79.5, 'published_acc5': None, **known, **fields}


def test_cells():
    assert cells_of(row()) == ['a_x', '79.50', '80.00', '+0.50', '–', '–', '5.0', '1.00', '100.0', '']
    failed = {'name': 'b', 'published_acc1': None, 'published_acc5': 1.0, 'status': 'failed', 'reason': 'a | b\nc'}
    assert cells_of(failed) == ['b', '–', '–', '–', '1.00', '–', '–', '–', '–', 'a \\| b\\nc']
    assert cells_of(row(unreadable=2))[-1] == '2 images unreadable'


def test_a_picture_of_many_families(tmp_path):
    rows = [
        row(f'{"abcdefghij"[number % 10]}_{number}', macs=1e9 * (number + 1), published_acc1=None)
        for number in range(40)
    ]
    with open(tmp_path / 'x.png', 'wb') as file:
        draw(file, rows, '')
    assert Image.open(tmp_path / 'x.png').size[1] > 1000


@pytest.mark.parametrize(
    'content, message',
    [
        ('name,top1\na,1\n', r"zoo.csv', line 2: an unknown column 'top1'; the columns are name, acc1"),
        ('name,acc1\na,high\n', 'line 2: acc1 and acc5 must be numbers in percent, or empty'),
        ('acc1\n3\n', 'line 2: no name'),
        ('name\n"a\0', 'cannot read the table|no name'),
    ],
)
def test_malformed_tables(tmp_path, content, message):
    (tmp_path / 'zoo.csv').write_text(content)
    if '\0' in content:
        read = (tmp_path / 'zoo.csv').read_bytes()
        (tmp_path / 'zoo.csv').write_bytes(read.replace(b'\0', b'\xff'))
    with pytest.raises(UserError, match=message):
        read_zoo(str(tmp_path / 'zoo.csv'))


def test_a_table_may_have_a_column_only(tmp_path):
    (tmp_path / 'zoo.csv').write_text('acc1,name\n70.5,mine\n,other\n')
    assert read_zoo(str(tmp_path / 'zoo.csv')) == {'mine': Published('mine', 70.5), 'other': Published('other')}


def test_given_weights(tmp_path):
    published = Published('deit', url='https://host/path/deit-1234abcd.pth')
    assert given_weights(str(tmp_path), published) is None
    for name in ('deit-1234abcd.pth', 'deit.pth', 'deit.pdparams', 'deit'):
        (tmp_path / name).mkdir()
        assert given_weights(str(tmp_path), published) == str(tmp_path / name)
    assert given_weights(str(tmp_path), Published('folder/deit.yaml')) == str(tmp_path / 'deit')


def test_weights_that_are_not_given_are_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv('LEANVIT_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('tools._reproduction.fetch', lambda name: f'fetched {name}')

    def found(name: str, weights=str(tmp_path)) -> str:
        return find_weights(Request(PUBLISHED.get(name, Published(name)), None, weights, str(tmp_path), 1, 1))

    assert found('deit_tiny_patch16_224') == found('deit_tiny_patch16_224', None) == 'fetched deit_tiny_patch16_224'
    with pytest.raises(
        UserError, match='no weights are published: put them into the folder of -weights, as vit_digits.pdp'
    ):
        found('vit_digits')
    (tmp_path / 'cache' / 'weights' / 'vit_digits').mkdir(parents=True)  # of an earlier download, or put there by hand
    assert found('vit_digits') == 'fetched vit_digits'


@pytest.mark.parametrize(
    'argv, message',
    [
        (['nonsense'], "unknown model 'nonsense'"),
        (['gmlp_digits', '-weights', 'none'], "-weights: there is no folder 'none'"),
        (['gmlp_digits', '-rounds', '0'], '-rounds is 0, but must be at least 1'),
        (['deit_tiny_patch16_224', '-data_path', 'none'], 'none'),
        (['gmlp_digits', '-opts', 'TRAIN.EPOCHS', '3'], "unknown key 'TRAIN.EPOCHS'"),
    ],
)
def test_mistakes_end_before_any_work(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        main(['-output', str(tmp_path / 'out'), *argv])
    assert not (tmp_path / 'out').exists()


def test_results_of_other_conditions_are_not_mixed(tmp_path):
    results = Results(str(tmp_path), {'device': 'A'}, {})
    results.add(Published('x', 1.0), {'status': 'done'})
    assert Results(str(tmp_path), {'device': 'A'}, {}).is_done('x')
    with pytest.raises(
        UserError, match=r"holds results of other conditions \(device 'A', now 'B'\); give another folder"
    ):
        Results(str(tmp_path), {'device': 'B'}, {})
    (tmp_path / RESULTS).write_text('[1]')
    with pytest.raises(UserError, match='does not hold results of this tool'):
        Results(str(tmp_path), {'device': 'A'}, {})
