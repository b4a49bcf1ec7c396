# SPDX-License-Identifier: Apache-2.0
"""Segmentation under the launchers: trained by iterations, stopped and resumed, evaluated on one and two processes."""

import json
import re
import signal

import numpy as np
import pytest
from PIL import Image

from tests.runs.conftest import assert_same, learnt, metrics, run, send, start, state, wait_for

CONFIG = """
DATA:
  DATASET: segmentation
  DATA_PATH: '{data}'
  IMAGE_SIZE: 32
  IMAGE_SCALE: [128, 32]
  BATCH_SIZE: 2
  BATCH_SIZE_EVAL: 2
  NUM_WORKERS: 1
MODEL:
  TYPE: upernet
  NAME: tiny
  HEAD_DROPOUT: 0.1
  DROPPATH: 0.1
  TRANS: {{PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 4, NUM_HEADS: 2}}
  LAMBDA: {{PRUNE_LAYERS: [0, 2], REMOVED: True}}
  UPERNET: {{OUT_INDICES: [0, 1, 2, 3], CHANNELS: 8, AUX_CHANNELS: 8}}
TRAIN:
  TASK: segmentation
  NUM_ITERS: 16
  WARMUP_ITERS: 2
  BASE_LR: 0.01
  LINEAR_SCALED_LR: None
  MODEL_EMA: True
  MODEL_EMA_DECAY: 0.9
  LR_SCHEDULER: {{NAME: poly, UPDATE: step}}
  RANDOM_ERASE_PROB: 0.0
VALIDATE_ITERS: 6
REPORT_FREQ: 1
SAVE_STEPS: 1
SAVE: '{output}'
"""
SCRIPTS = {1: ('main_single_gpu.py', {}), 2: ('main_multi_gpu.py', {'NPROC': '2'})}


@pytest.fixture(scope='session')
def scenes(tmp_path_factory) -> str:
    """Twelve training and five validation images of several sizes, of two classes by brightness, some pixels ignored."""
    root, rng = tmp_path_factory.mktemp('scenes'), np.random.default_rng(0)
    (root / 'classes.txt').write_text('dark\nbright\n')
    for split, count in (('train', 12), ('val', 5)):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            labels = np.kron(rng.integers(0, 2, (4, 4 + number % 3)), np.ones((8, 8))).astype('uint8')
            image = labels[..., None] * 120 + rng.integers(0, 100, (*labels.shape, 3))
            labels[:2] = 255
            Image.fromarray(image.astype('uint8')).save(root / 'images' / split / f'{number}.png')
            Image.fromarray(labels).save(root / 'annotations' / split / f'{number}.png')
    return str(root)


@pytest.fixture(scope='session', params=[1, 2], ids=['one process', 'two processes'])
def straight(request, tmp_path_factory, scenes):
    """(processes, recipe, folder of an uninterrupted run)."""
    folder = tmp_path_factory.mktemp(f'segmentation{request.param}')
    recipe = folder / 'tiny.yaml'
    recipe.write_text(CONFIG.format(data=scenes, output=folder))
    script, variables = SCRIPTS[request.param]
    run(script, f'-cfg={recipe}', '-tag=straight', **variables)
    return request.param, str(recipe), folder / 'straight'


def test_training_by_iterations(straight):
    """Steps, validations, table of the classes, pictures and VisualDL."""
    _, _, folder = straight
    rows = [row for row in metrics(folder) if row['kind'] == 'val']
    assert [row['step'] for row in rows] == [6, 12, 16]
    assert all(row['images'] == 5 and 0 < row['miou'] <= row['aacc'] <= 1 for row in rows)
    assert state(folder)['step'] == 16
    log = (folder / 'log.txt').read_text()
    assert (
        len(re.findall(r'^.*bright  IoU 0\.\d{4}  Acc [01]\.\d{4}$', log, re.MULTILINE)) == 6
    )  # weights and their moving average
    assert len(list(folder.glob('segmentation_*.png'))) == 3
    written = b''.join(path.read_bytes() for path in (folder / 'vdl').iterdir())
    assert written.count(b'segmentation') == 3 and b'miou' in written.lower()


def test_stopped_and_resumed_equals_straight(straight, tmp_path):
    processes, recipe, folder = straight
    script, variables = SCRIPTS[processes]
    flags = (f'-cfg={recipe}', f'-output={tmp_path}', '-tag=cut')
    process = start(script, *flags, **variables)
    wait_for(tmp_path / 'cut' / 'log.txt', 'Epoch[002/', process)
    status, out, err = send(process, signal.SIGTERM)
    assert status == 143, out + err
    assert state(tmp_path / 'cut')['step'] < 16
    run(script, *flags, f'-resume={tmp_path / "cut"}', **variables)
    assert_same(learnt(tmp_path / 'cut'), learnt(folder))


def test_evaluation_does_not_depend_on_the_processes_or_the_storage(straight, scenes, tmp_path):
    """Five images, which two processes cannot share equally; the second time from a zip file."""
    processes, recipe, folder = straight
    script, variables = SCRIPTS[3 - processes]
    flags = [f'-cfg={recipe}', f'-output={tmp_path}', '-eval', f'-pretrained={folder / "last.pdparams"}', '-tag=eval']
    if processes == 2:
        run(
            'tools/make_zip.py', '-dataset=segmentation', f'-data_path={scenes}', f'-output={tmp_path}', '-split', 'val'
        )
        flags += ['-dataset=zip', f'-data_path={tmp_path}']
    run(script, *flags, **variables)
    found, expected = metrics(tmp_path / 'eval')[-1], metrics(folder)[-1]
    assert (found['kind'], found['images']) == ('eval', 5)
    for name in ('miou', 'macc', 'aacc'):
        assert found[name] == expected[name]


def test_two_processes_equal_one_with_the_whole_batch(scenes, tmp_path):
    """Shares of the batch, of the statistics of batch normalization and of the gradient; crops do not depend on the processes."""
    recipe = tmp_path / 'tiny.yaml'
    recipe.write_text(CONFIG.format(data=scenes, output=tmp_path))
    same = (
        '-opts',
        'MODEL.DROPPATH',
        '0',
        'MODEL.HEAD_DROPOUT',
        '0',
        'TRAIN.NUM_ITERS',
        '3',
        'TRAIN.MODEL_EMA',
        'False',
    )
    run('main_single_gpu.py', f'-cfg={recipe}', '-tag=one', '-batch_size=4', *same)
    run('main_multi_gpu.py', f'-cfg={recipe}', '-tag=two', '-batch_size=2', *same, NPROC='2')
    losses = [[row['loss'] for row in metrics(tmp_path / tag) if row['kind'] == 'train'] for tag in ('one', 'two')]
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, two = (state(tmp_path / tag)['model'] for tag in ('one', 'two'))
    names = [name for name in one if name.endswith('_variance')]
    assert len(names) > 10
    for name in names:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3, err_msg=name)


def test_predictions_are_those_of_the_evaluation(straight, scenes, tmp_path):
    """Class maps with palette, from which the mIoU of the run follows, overlays, and shares of the classes."""
    _, recipe, folder = straight
    run('tools/make_lmdb.py', '-dataset=segmentation', f'-data_path={scenes}', f'-output={tmp_path}', '-split', 'val')
    flags = [f'-cfg={recipe}', f'-pretrained={folder / "last.pdparams"}', f'-output={tmp_path / "out.json"}']
    opts = ('-opts', 'DATA.DATASET', 'lmdb', 'DATA.DATA_PATH', str(tmp_path))  # names and colors come from the file
    run('tools/predict.py', *flags, f'{scenes}/images/val', *opts)
    rows = json.loads((tmp_path / 'out.json').read_text())
    assert len(rows) == 5
    counts = np.zeros((2, 2), int)
    for number, row in enumerate(rows):
        name = row['image'].rpartition('/')[2].removesuffix('.png')
        with Image.open(tmp_path / 'out' / f'{number:06d}_{name}_classes.png') as file:
            found, palette = np.asarray(file), file.getpalette()
        with Image.open(tmp_path / 'out' / f'{number:06d}_{name}_overlay.png') as file:
            assert (file.mode, file.size[::-1]) == ('RGB', found.shape)
        with Image.open(f'{scenes}/annotations/val/{name}.png') as file:
            labels = np.asarray(file)
        assert palette[:6] == [0, 0, 0, 128, 0, 0]
        shares = {entry['name']: entry['share'] for entry in row['classes']}
        assert shares == {name: share for name, share in zip(('dark', 'bright'), _shares(found)) if share}
        np.add.at(counts, (labels[labels != 255], found[labels != 255]), 1)
    hits = np.diag(counts)
    assert np.mean(hits / (counts.sum(0) + counts.sum(1) - hits)) == pytest.approx(
        metrics(folder)[-1]['miou'], rel=1e-9
    )


def _shares(classes: np.ndarray) -> list[float]:
    return (np.bincount(classes.reshape(-1), minlength=2) / classes.size).tolist()
