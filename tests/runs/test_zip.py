# SPDX-License-Identifier: Apache-2.0
"""Training from zip files, cached or not, is training from the files they were made of."""

import pytest

from tests.runs.conftest import assert_same, learnt, metrics, run


@pytest.fixture
def zips(images, tmp_path) -> str:
    """The test images, packed by the tool."""
    run('tools/make_zip.py', '-data_path', images, '-output', str(tmp_path / 'zips'), '-dataset', 'folder')
    return str(tmp_path / 'zips')


@pytest.fixture
def train(recipe, zips, tmp_path):
    """`train(processes, data set, cache)` runs one epoch and returns what was learnt."""

    def one_epoch(processes: int, dataset: str, cache: str) -> dict:
        tag = f'{dataset}-{cache}'
        data = ['DATA.DATASET', dataset, 'DATA.CACHE', cache, *(['DATA.DATA_PATH', zips] if dataset == 'zip' else [])]
        options = ['-opts', 'TRAIN.NUM_EPOCHS', '1', 'MODEL.NUM_CLASSES', '3', *data]
        run('main_multi_gpu.py', f'-cfg={recipe}', f'-tag={tag}', *options, NPROC=str(processes))
        return learnt(tmp_path / 'out' / tag)

    return one_epoch


def test_one_process(train):
    """To the last bit; alone, a process has all of the data as its share."""
    assert_same(train(1, 'folder', 'no'), train(1, 'zip', 'part'))


def test_two_processes(train, tmp_path):
    """To the last bit where each process holds everything; with a share each, the same number of steps on other batches."""
    folder = train(2, 'folder', 'no')
    assert_same(folder, train(2, 'zip', 'full'))
    part = train(2, 'zip', 'part')
    assert part['position'][:3] == folder['position'][:3]
    assert metrics(tmp_path / 'out' / 'zip-part')[-1]['images'] == 13


def test_bad_map_line(recipe, zips):
    """One sentence with file and line; validation is held against the classes of training."""
    with open(f'{zips}/val_map.txt', 'a', encoding='utf-8') as file:
        file.write('class0/1.png\t3\n')
    out, err = run('main_multi_gpu.py', f'-cfg={recipe}', '-dataset=zip', f'-data_path={zips}', NPROC='2', status=2)
    assert err.count('error: ') == 1
    assert f'{zips}/val_map.txt:14: label 3 is out of range, MODEL.NUM_CLASSES is 3 (labels 0 to 2).' in err
    assert 'Traceback' not in err
