# SPDX-License-Identifier: Apache-2.0
"""Transfer from one published data set to another, in their own layouts, by the recipes and the launcher."""

import numpy as np
import pytest
from PIL import Image

from tests.datasets.layouts import write_flowers, write_text
from tests.runs.conftest import metrics, run, state

SMALL = [
    *('DATA.IMAGE_SIZE', '16', 'DATA.BATCH_SIZE', '8', 'DATA.NUM_WORKERS', '2', 'VALIDATE_FREQ', '1'),
    *('MODEL.TRANS.PATCH_SIZE', '8', 'MODEL.TRANS.EMBED_DIM', '24', 'MODEL.TRANS.DEPTH', '2'),
    *('TRAIN.NUM_EPOCHS', '2', 'TRAIN.WARMUP_EPOCHS', '1'),
]


def write_images(root, names):
    rng = np.random.default_rng(0)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def flowers(tmp_path):
    root = tmp_path / 'flowers'
    write_images(root, [f'jpg/image_{number:05d}.jpg' for number in range(1, 31)])
    labels = [1 + number % 102 for number in range(0, 300, 10)]
    write_flowers(root, labels, list(range(30, 15, -1)), list(range(1, 11)), list(range(11, 16)))
    return root


@pytest.fixture
def pets(tmp_path):
    root, names = tmp_path / 'pets', [f'pug_{number}' for number in range(12)]
    write_images(root / 'images', [f'{name}.jpg' for name in names])
    lines = [f'{name} {1 + 3 * number} 2 1\n' for number, name in enumerate(names)]
    write_text(root / 'annotations', {'trainval.txt': ''.join(lines[:8]), 'test.txt': ''.join(lines[8:])})
    return root


def transfer(name, tmp_path, *flags):
    """Trains by the recipe of a data set; the log."""
    recipe = f'-cfg=./configs/vit_tiny_patch16_224_mae_transfer_{name}.yaml'
    output = [f'-output={tmp_path / "out"}', f'-tag={name}']
    return run(
        'main_single_gpu.py',
        recipe,
        f'-data_path={tmp_path / name.removesuffix("102")}',
        *output,
        *flags,
        '-opts',
        *SMALL,
    )[0]


def test_from_one_to_another(flowers, pets, tmp_path):
    """The classifier is re-initialized, and validation counts what the authors call the test part."""
    transfer('flowers102', tmp_path, '-pretrained=none')
    assert metrics(tmp_path / 'out' / 'flowers102')[-1]['images'] == 5
    assert state(tmp_path / 'out' / 'flowers102')['model']['head.weight'].shape == (24, 102)
    log = transfer('pets', tmp_path, f'-pretrained={tmp_path / "out" / "flowers102"}')
    assert 'a classifier of 102 classes and the model a classifier of 37 classes, which is re-initialized' in log
    assert metrics(tmp_path / 'out' / 'pets')[-1]['images'] == 4
    assert state(tmp_path / 'out' / 'pets')['model']['head.weight'].shape == (24, 37)


def test_missing_file(flowers, tmp_path):
    """One sentence: which file, and where it is published."""
    (flowers / 'setid.mat').unlink()
    recipe = '-cfg=./configs/vit_tiny_patch16_224_mae_transfer_flowers102.yaml'
    flags = [f'-data_path={flowers}', f'-output={tmp_path / "out"}', '-pretrained=none']
    _, err = run('main_single_gpu.py', recipe, *flags, '-opts', *SMALL, status=2)
    assert f"'{flowers}/setid.mat' is missing; it is published, as are the images, at https://" in err
    assert 'Traceback' not in err
    assert err.count('error: ') == 1
    assert not any(tmp_path.glob('out/*'))
