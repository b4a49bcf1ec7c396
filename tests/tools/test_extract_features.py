# SPDX-License-Identifier: Apache-2.0
"""tools/extract_features.py: the same features as the model and the kNN probe compute, with the names of the images."""

from __future__ import annotations

import os

import numpy as np
import paddle
import pytest

from config import get_config
from deploy.inference import load_classifier
from models import build_model
from tasks.knn import extract_features
from tests.models.helpers import small_config
from tests.tools.conftest import write_config, write_transformer
from tools import extract_features as tool
from utils.errors import UserError
from utils.formats import write_pdparams


def run(trained, tmp_path, *flags, name='f.npz', status=0):
    target = str(tmp_path / name)
    argv = ['-cfg', trained.cfg, '-pretrained', trained.weights, '-output', target, '-num_workers', '0', *flags]
    assert tool.main([*argv, trained.images]) == status
    return target


def test_pooled_features_give_the_logits_of_the_model(trained, tmp_path, capsys):
    with np.load(run(trained, tmp_path)) as file:
        features, names = file['features'], file['names'].tolist()
    assert features.shape == (len(names), 16) and features.dtype == np.float32
    assert names == sorted(names) and all(os.path.isfile(name) for name in names)
    assert f'{len(names)} images, 16 numbers each; 0 images unreadable' in capsys.readouterr().out
    config = get_config(trained.cfg, ['MODEL.PRETRAINED', trained.weights]).clone()
    config.defrost()
    model = load_classifier(config, log=lambda line: None)
    logits = model.head(paddle.to_tensor(features)).numpy()
    from tools import predict  # the classes of the other tool, which runs the whole model

    predict.main(['-cfg', trained.cfg, '-pretrained', trained.weights, '-topk', '1', trained.images])
    printed = [line for line in capsys.readouterr().out.splitlines() if '.' in line and ': ' in line and 'val' in line]
    classes = {
        line.split(': ')[0]: int(line.split(': ')[1].split()[0]) for line in printed if line.split(': ')[0] in names
    }
    assert len(classes) == len(names)
    assert [classes[name] for name in names] == logits.argmax(-1).tolist()


def test_npy_has_a_text_file_with_the_names(trained, tmp_path):
    with np.load(run(trained, tmp_path)) as file:
        features, names = file['features'], file['names'].tolist()
    target = run(trained, tmp_path, name='g.npy')
    np.testing.assert_allclose(np.load(target), features, atol=1e-6)
    assert (tmp_path / 'g.txt').read_text().splitlines() == names
    tool.write(target, ['a\nb', 'c\r'], features[:2])
    assert (tmp_path / 'g.txt').read_text() == 'a\\nb\nc\\r\n'


def test_both_files_are_replaced_or_none(tmp_path):
    """Names that cannot be written leave no features without names."""
    (tmp_path / 'f.txt').mkdir()
    with pytest.raises((UserError, OSError), match='f.txt'):
        tool.write(str(tmp_path / 'f.npy'), ['a'], np.zeros([1, 2], 'float32'))
    assert os.listdir(tmp_path) == ['f.txt']


def test_normalized_features_are_those_of_the_knn_probe(trained, tmp_path):
    with np.load(run(trained, tmp_path, '-normalize')) as file, np.load(run(trained, tmp_path, name='g.npz')) as plain:
        wanted = plain['features'] / np.linalg.norm(plain['features'], axis=-1, keepdims=True)
        np.testing.assert_allclose(file['features'], wanted, atol=1e-5)
    model = build_model(get_config(trained.cfg, ['MODEL.NUM_CLASSES', 3]))
    images = paddle.randn([2, 3, 40, 40])
    norms = paddle.linalg.norm(extract_features(model, images), axis=-1)
    np.testing.assert_allclose(norms.numpy(), [1, 1], atol=1e-5)


def test_tokens_of_every_model(trained, tmp_path):
    with np.load(run(trained, tmp_path, '-tokens')) as file:
        assert file['features'].shape[1:] == (25, 16)
    cfg, weights = write_transformer(tmp_path, 'deit_small_patch16_224', trained.images)
    target = str(tmp_path / 't.npz')
    assert tool.main(['-cfg', cfg, '-pretrained', weights, '-tokens', '-output', target, trained.images]) == 0
    with np.load(target) as file:
        assert file['features'].ndim == 3
    config = small_config('ms_mlp_tiny_patch4_shift5_224', 'MODEL.NUM_CLASSES', 3, 'DATA.NUM_WORKERS', 0)
    write_config(config, tmp_path / 'ms.yaml')
    write_pdparams(build_model(config).state_dict(), str(tmp_path / 'ms.pdparams'))
    flags = ['-cfg', str(tmp_path / 'ms.yaml'), '-pretrained', str(tmp_path / 'ms.pdparams'), '-output', target]
    assert tool.main([*flags, trained.images]) == 0
    with np.load(target) as file:
        assert file['features'].ndim == 2


@pytest.mark.parametrize('name', ['mae_tiny_patch16_224', 'mocov3_tiny_patch16_224'])
def test_encoders_of_pretraining(trained, tmp_path, name):
    config = small_config(name, 'DATA.NUM_WORKERS', 0)
    write_config(config, tmp_path / 'pre.yaml')
    write_pdparams(build_model(config).state_dict(), str(tmp_path / 'pre.pdparams'))
    target = str(tmp_path / 'p.npz')
    flags = ['-cfg', str(tmp_path / 'pre.yaml'), '-pretrained', str(tmp_path / 'pre.pdparams'), '-output', target]
    assert tool.main([*flags, trained.images]) == 0
    with np.load(target) as file:
        assert file['features'].shape[1] == config.MODEL.TRANS.EMBED_DIM


def test_unreadable_images(trained, tmp_path, capsys):
    folder = tmp_path / 'photos'
    folder.mkdir()
    (folder / 'bad.jpg').write_bytes(b'no image')
    argv = [
        '-cfg',
        trained.cfg,
        '-pretrained',
        trained.weights,
        '-num_workers',
        '0',
        '-output',
        str(tmp_path / 'f.npz'),
    ]
    with pytest.raises(UserError, match='none of the images could be read'):
        tool.main([*argv, str(folder)])
    assert not (tmp_path / 'f.npz').exists()
    assert tool.main([*argv, str(folder), trained.images]) == 1
    assert 'bad.jpg: ' in capsys.readouterr().err
    with pytest.raises(UserError, match='leave out -tokens or -normalize'):
        tool.main([*argv, '-tokens', '-normalize', trained.images])
