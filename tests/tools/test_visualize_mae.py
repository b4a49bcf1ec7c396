# SPDX-License-Identifier: Apache-2.0
"""tools/visualize_mae.py: visible patches stay unchanged, masked patches are reconstructed."""

import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from PIL import Image

from config import get_config
from models import build_model
from tasks.mae_pictures import reconstruct
from tasks.pictures import BACKGROUND, GAP, image_grid
from tests.conftest import ROOT
from tools._pictures import single_batch
from tools.visualize_mae import main
from utils.errors import UserError
from utils.formats import write_pdparams

CONFIG = """
DATA: {{IMAGE_SIZE: 32, CROP_PCT: 1.0, CROP: resized, IMAGE_CHANNELS: {channels}}}
MODEL:
  TYPE: mae
  NAME: tiny
  TRANS: {{PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 1, NUM_HEADS: 2}}
  MAE: {{DECODER_EMBED_DIM: 16, DECODER_DEPTH: 1, DECODER_NUM_HEADS: 2, MASK_RATIO: 0.5}}
TRAIN: {{TASK: mae}}
"""


@pytest.fixture
def made(tmp_path):
    """A configuration, weights and two pictures, one of them of another shape."""
    paddle.seed(0)
    cfg, weights = str(tmp_path / 'mae.yaml'), str(tmp_path / 'mae.pdparams')
    with open(cfg, 'w', encoding='utf-8') as file:
        file.write(CONFIG.format(channels=3))
    write_pdparams(build_model(get_config(cfg)).state_dict(), weights)
    os.makedirs(tmp_path / 'photos')
    rng = np.random.default_rng(0)
    for name, shape in (('a.png', (32, 32, 3)), ('b.png', (40, 60, 3))):
        Image.fromarray(rng.integers(0, 200, shape, 'uint8')).save(tmp_path / 'photos' / name)
    return tmp_path, cfg, weights


def test_a_sheet(made):
    folder, cfg, weights = made
    command = [sys.executable, 'tools/visualize_mae.py', '-cfg', cfg, '-pretrained', weights]
    command += ['-output', str(folder / 'mae.png'), str(folder / 'photos')]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert 'mae.png: 2 of 2 images' in result.stdout
    sheet = np.asarray(Image.open(folder / 'mae.png'))
    assert sheet.shape == (2 * (32 + GAP) + GAP, 3 * (32 + GAP) + GAP, 3)
    np.testing.assert_array_equal(sheet[GAP : GAP + 32, GAP : GAP + 32], Image.open(folder / 'photos' / 'a.png'))


@pytest.mark.parametrize('channels', [3, 1])
def test_half_of_the_patches_are_seen_and_kept(tmp_path, channels):
    cfg = str(tmp_path / 'mae.yaml')
    with open(cfg, 'w', encoding='utf-8') as file:
        file.write(CONFIG.format(channels=channels))
    config = get_config(cfg)
    model = build_model(config)
    model.eval()
    image = np.random.default_rng(0).integers(0, 200, (32, 32, channels), 'uint8')

    def pictures(seed):
        noise = paddle.to_tensor(np.random.default_rng(seed).random((1, 16), 'float32'))
        data = config.DATA
        return reconstruct(model, single_batch(image, config), noise, data.IMAGENET_MEAN, data.IMAGENET_STD)[0]

    original, visible, reconstructed = pictures(0)
    np.testing.assert_array_equal(original, image)
    hidden = (visible == BACKGROUND).all(-1)
    assert hidden.mean() == 0.5
    np.testing.assert_array_equal(visible[~hidden], image[~hidden])
    assert np.abs(reconstructed[~hidden].astype(int) - image[~hidden]).max() <= 1
    assert (reconstructed[hidden] != image[hidden]).mean() > 0.5
    _, again, _ = pictures(1)
    assert (again != visible).any()
    assert image_grid([(image, visible, reconstructed)]).size == (3 * (32 + GAP) + GAP, 32 + 2 * GAP)


def test_mistakes_leave_nothing(made):
    folder, cfg, weights = made
    flags, output = ['-cfg', cfg, '-pretrained', weights], str(folder / 'out.png')
    with pytest.raises(UserError, match='must end in .png'):
        main([*flags, '-output', 'x.jpg', str(folder / 'photos')])
    with pytest.raises(UserError, match='is one of the images'):
        main([*flags, '-output', str(folder / 'photos' / 'a.png'), str(folder / 'photos')])
    (folder / 'broken.png').write_bytes(b'x')
    with pytest.raises(UserError, match='none of the 1 images'):
        main([*flags, '-output', output, str(folder / 'broken.png')])
    with pytest.raises(UserError, match='has no decoder'):
        main(
            [
                *flags,
                '-output',
                output,
                str(folder / 'photos'),
                '-opts',
                'MODEL.TYPE',
                'vit',
                'MODEL.EVIT.DROP_LOC',
                '()',
            ]
        )
    assert not os.path.exists(output)
