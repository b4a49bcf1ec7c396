# SPDX-License-Identifier: Apache-2.0
"""Images that are not square, from training by a launcher to predictions, exported programs and pictures."""

import json
import os

import numpy as np
import pytest
import yaml
from PIL import Image

from config import get_config
from deploy.inference import load_trained
from engine.run import run_config
from models.exported import Predictor
from tests.runs.conftest import metrics, run, write_recipe
from tools import (
    analyze_attention,
    browse_data,
    export,
    extract_features,
    predict,
    verify_data,
    visualize_mae,
    visualize_tokens,
)
from tools._pictures import readable, single_batch
from utils.errors import UserError

SIZE = (16, 28)  # 4 x 7 patches
RECIPE = """
DATA: {IMAGE_SIZE: [16, 28], CROP: resized, CROP_PCT: 0.9, NUM_WORKERS: 0}
MODEL:
  TYPE: vit
  NAME: wide
  TRANS: {PATCH_SIZE: 4, EMBED_DIM: 12, DEPTH: 3, NUM_HEADS: 3}
  EVIT: {KEEP_RATE: 0.7, DROP_LOC: [1], FUSE_TOKEN: true}
TRAIN: {NUM_EPOCHS: 1}
"""
MAE = """
DATA: {IMAGE_SIZE: [16, 28], CROP: resized, NUM_WORKERS: 0}
MODEL:
  TYPE: mae
  NAME: wide
  TRANS: {PATCH_SIZE: 4, EMBED_DIM: 12, DEPTH: 1, NUM_HEADS: 3}
  MAE: {DECODER_EMBED_DIM: 8, DECODER_DEPTH: 1, DECODER_NUM_HEADS: 2}
TRAIN: {TASK: mae, NUM_EPOCHS: 1, RAND_AUGMENT: false, COLOR_JITTER: 0.0, RANDOM_ERASE_PROB: 0.0}
"""


def run_here(path, *options):
    """Run a recipe in this process."""
    config = get_config(str(path), list(options))
    config.defrost()
    run_config(config)


@pytest.fixture(scope='module')
def trained(tmp_path_factory, images):
    """Run folder of a classifier; mixing, random erasing, RandAugment and EMA are on."""
    folder = tmp_path_factory.mktemp('wide')
    run('main_single_gpu.py', f'-cfg={write_recipe(folder, images, RECIPE)}', '-tag=run')
    return folder / 'run'


@pytest.fixture(scope='module')
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp('photo') / 'photo.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), 'uint8')).save(path)
    return str(path)


def test_the_run_says_what_it_trained_on(trained):
    assert yaml.safe_load((trained / 'config.yaml').read_text())['DATA']['IMAGE_SIZE'] == list(SIZE)
    assert metrics(trained)[-1]['images'] == 13 and np.isfinite(metrics(trained)[0]['loss'])


def test_predictions_features_and_the_program_agree(trained, photo, tmp_path):
    """One image by all doors."""
    assert predict.main([f'-pretrained={trained}', f'-output={tmp_path / "out.json"}', photo]) == 0
    assert extract_features.main([f'-pretrained={trained}', f'-output={tmp_path / "f.npz"}', photo]) == 0
    export.main([f'-pretrained={trained}', f'-output={tmp_path / "program"}'])
    spec = json.loads((tmp_path / 'program.preprocess.json').read_text())
    assert (spec['image_size'], spec['resize_short'], spec['crop_pct']) == (list(SIZE), [17, 31], 0.9)
    assert spec['input']['shape'] == [None, 3, *SIZE]
    config = get_config(str(trained / 'config.yaml'), ['MODEL.PRETRAINED', str(trained), 'MODEL.NUM_CLASSES', 3])
    config.defrost()
    _, model = load_trained(config, log=lambda line: None)
    ((_, pixels),) = readable([photo], config)
    assert pixels.shape == (*SIZE, 3)
    x = single_batch(pixels, config)
    logits = Predictor(str(tmp_path / 'program'))(x.numpy())
    np.testing.assert_allclose(logits, model(x), atol=1e-5)
    features = np.load(tmp_path / 'f.npz')['features']
    np.testing.assert_allclose(features, model.forward_head(model.forward_features(x), pre_logits=True), atol=1e-5)
    first = json.loads((tmp_path / 'out.json').read_text())[0]['predictions'][0]
    assert first['class'] == int(logits.argmax())


def test_pictures_of_kept_tokens(trained, photo, tmp_path):
    """Panels have the shape of the image, and 4 x 7 patches."""
    visualize_tokens.main([f'-pretrained={trained}', f'-output={tmp_path}', photo])
    strip = np.asarray(Image.open(tmp_path / 'photo_tokens.png'))
    height, width = (224 // 16 * side for side in SIZE)
    margin, gap = visualize_tokens.MARGIN, visualize_tokens.GAP
    assert strip.shape[1] == 2 * margin + 2 * width + gap
    panels = [strip[margin : margin + height, margin + i * (width + gap) :][:, :width].astype(int) for i in range(2)]
    cells = [panel.reshape(4, height // 4, 7, width // 7, 3).swapaxes(1, 2).reshape(28, -1) for panel in panels]
    assert sum((a == b).all() for a, b in zip(*cells)) == 20, 'ceil(0.7 * 28) patches are kept'


def test_attention_distances_are_those_of_the_grid(trained, images, tmp_path):
    options = ['-opts', 'MODEL.EVIT.KEEP_RATE', '1.0', 'MODEL.EVIT.FUSE_TOKEN', 'False']
    analyze_attention.main([f'-pretrained={trained}', f'-output={tmp_path / "a"}', '-images=5', '-pixels', *options])
    found = json.loads((tmp_path / 'a.json').read_text())
    assert found['grid'] == [4, 7] and found['patches'] == 28
    places = np.stack(np.divmod(np.arange(28), 7), -1)
    even = 4 * np.linalg.norm(places[:, None] - places[None], axis=-1).mean()
    assert np.mean(found['distance']) == pytest.approx(even, rel=0.15), (
        'a new model attends to all patches nearly equally'
    )


def test_training_images_are_drawn_in_their_shape(trained, images, tmp_path):
    target = tmp_path / 'batch.png'
    browse_data.main([f'-cfg={trained / "config.yaml"}', f'-output={target}', '-images=2', '-columns=2'])
    factor = 7  # 16 rows are enlarged to 112
    assert Image.open(target).width == 2 * (28 * factor + 8) + 3 * 4


def test_a_square_model_continues_from_these_weights(trained, tmp_path, capsys):
    options = ['MODEL.PRETRAINED', str(trained), 'MODEL.NUM_CLASSES', 3, 'DATA.IMAGE_SIZE', 24]
    config = get_config(str(trained / 'config.yaml'), options)
    config.defrost()
    lines = []
    load_trained(config, log=lines.append)
    assert '----- Pretrained: pos_embed interpolated from [1, 29, 12] to [1, 37, 12]' in lines


def test_masked_autoencoder_and_its_pictures(images, photo, tmp_path):
    run_here(write_recipe(tmp_path, images, MAE), 'TAG', 'run')
    assert np.isfinite(metrics(tmp_path / 'run')[-1]['loss'])
    assert Image.open(tmp_path / 'run' / 'reconstruction_0001.png').width == 3 * 28 + 4 * 4
    visualize_mae.main([f'-pretrained={tmp_path / "run"}', f'-output={tmp_path / "mae.png"}', photo])
    assert Image.open(tmp_path / 'mae.png').size == (3 * 28 + 4 * 4, 16 + 2 * 4)


# ---------------------------------------------------------------------------------------------------- channels
@pytest.fixture(scope='module')
def spectra(tmp_path_factory):
    """Class folders of images with five channels."""
    folder, rng = tmp_path_factory.mktemp('spectra'), np.random.default_rng(0)
    for split, count in (('train', 12), ('val', 6)):
        for number in range(count):
            path = folder / split / f'class{number % 2}' / f'{number}.npy'
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, rng.integers(0, 128, (20, 24, 5), 'uint8') + np.uint8(100 * (number % 2)))
    return folder


CHANNELS = """
DATA:
  IMAGE_CHANNELS: 5
  IMAGENET_MEAN: [0.4, 0.4, 0.4, 0.4, 0.4]
  IMAGENET_STD: [0.2, 0.2, 0.2, 0.2, 0.2]
TRAIN: {NUM_EPOCHS: 1, RAND_AUGMENT: false, COLOR_JITTER: 0.0}
"""


def test_five_channels_from_rgb_weights(trained, spectra, photo, tmp_path, capsys):
    """The log states how the patch embedding is adapted; predictions take arrays, and refuse photographs with the reason."""
    (tmp_path / 'start.yaml').write_text(f'BASE: {trained / "config.yaml"}' + CHANNELS)
    options = ['DATA.DATA_PATH', str(spectra), 'MODEL.PRETRAINED', str(trained), 'MODEL.NUM_CLASSES', 2]
    run_here(tmp_path / 'start.yaml', *options, 'SAVE', str(tmp_path), 'TAG', 'five')
    out = capsys.readouterr().out
    assert 'adapted from 3 to 5 image channels (DATA.IMAGE_CHANNELS): repeated in turn, times 3/5' in out
    assert metrics(tmp_path / 'five')[-1]['images'] == 6
    assert predict.main([f'-pretrained={tmp_path / "five"}', str(spectra / 'val'), photo]) == 1
    printed = capsys.readouterr().out
    assert '7 images, 1 of them unreadable' in printed
    assert 'an image of mode RGB has no 5 channels' in printed
    verify_data.main(
        [
            f'-cfg={tmp_path / "start.yaml"}',
            f'-data_path={spectra}',
            '-num_workers=0',
            f'-report={tmp_path / "report.json"}',
        ]
    )
    export.main([f'-pretrained={tmp_path / "five"}', f'-output={tmp_path / "program"}'])
    spec = json.loads((tmp_path / 'program.preprocess.json').read_text())
    assert spec['mode'] is None and spec['input']['shape'] == [None, 5, *SIZE] and len(spec['mean']) == 5


def test_color_operations_end_the_run_at_its_start(trained, spectra, tmp_path):
    (tmp_path / 'start.yaml').write_text(f'BASE: {trained / "config.yaml"}' + CHANNELS.replace('false', 'true'))
    options = ['DATA.DATA_PATH', str(spectra), 'MODEL.NUM_CLASSES', 2, 'SAVE', str(tmp_path), 'TAG', 'no']
    with pytest.raises(UserError, match='not for 5 channels .*set TRAIN.RAND_AUGMENT False'):
        run_here(tmp_path / 'start.yaml', *options)
    assert not os.path.exists(tmp_path / 'no' / 'last.pdparams')
