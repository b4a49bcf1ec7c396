# SPDX-License-Identifier: Apache-2.0
"""A trained checkpoint becomes a small model with the same answers."""

import os

import numpy as np
import paddle
import pytest

from config import get_config
from models import build_model
from models.weights.load import load_pretrained
from tests.models.helpers import small_config
from tests.tools.conftest import write_config
from tools import prune
from utils.errors import UserError
from utils.formats import read_file, write_pdparams


@pytest.fixture
def trained(tmp_path):
    """Path of a configuration whose attention fades in blocks 0 and 2, a function that saves weights at λ, the folder."""
    config = small_config('deit_tiny_patch16_224', 'MODEL.LAMBDA.PRUNE_LAYERS', (0, 2), 'MODEL.NUM_CLASSES', None)
    cfg = tmp_path / 'fading.yaml'
    write_config(config, cfg)

    def save(weight: float, classes: int = 5, name: str = 'trained.pdparams') -> str:
        paddle.seed(0)
        model = build_model(get_config(str(cfg), ['MODEL.NUM_CLASSES', classes]))
        model.set_attn_lambda(weight)
        write_pdparams(model.state_dict(), str(tmp_path / name))
        return str(tmp_path / name)

    return str(cfg), save, tmp_path


def test_the_small_model_answers_alike(trained, capsys):
    cfg, save, folder = trained
    source = save(0.0)
    prune.main(['-cfg', cfg, '-pretrained', source, '-output', str(folder / 'small')])
    out = capsys.readouterr().out
    assert 'removed from blocks 0, 2' in out and 'difference of a logit: 0.0e+00' in out
    whole = build_model(get_config(cfg, ['MODEL.NUM_CLASSES', 5]))
    small = build_model(get_config(cfg, ['MODEL.NUM_CLASSES', 5, 'MODEL.LAMBDA.REMOVED', True]))
    load_pretrained(whole, source)
    load_pretrained(small, str(folder / 'small.pdparams'), replace_head=False)
    gone = set(whole.state_dict()) - set(small.state_dict())
    assert len(gone) == 2 * 6 + 1 and set(small.state_dict()) <= set(whole.state_dict())
    content = read_file(str(folder / 'small.pdparams'))
    assert not gone & set(content)
    images = paddle.randn([3, 3, 32, 32])
    for model in (whole, small):
        model.eval()
    np.testing.assert_array_equal(whole(images), small(images))
    bare = build_model(get_config(cfg, ['MODEL.NUM_CLASSES', 5, 'MODEL.LAMBDA.REMOVED', True]))
    bare.set_state_dict(paddle.load(str(folder / 'small.pdparams')))
    bare.eval()
    np.testing.assert_array_equal(bare(images), small(images))


@pytest.mark.parametrize(
    ('weight', 'options', 'words'),
    [
        (0.25, [], 'block 0 still has the weight 0.25'),
        (0.0, ['MODEL.LAMBDA.PRUNE_LAYERS', '[]'], 'names no blocks'),
        (0.0, ['MODEL.LAMBDA.PRUNE_LAYERS', '[0]'], 'block 2 has the weight 0, but in the model 1'),
    ],
)
def test_mistakes_leave_nothing_behind(trained, weight, options, words):
    cfg, save, folder = trained
    arguments = ['-cfg', cfg, '-pretrained', save(weight), '-output', str(folder / 'small.pdparams')]
    with pytest.raises(UserError, match=words):
        prune.main([*arguments, '-opts', *options])
    assert sorted(os.listdir(folder)) == ['fading.yaml', 'trained.pdparams']


def test_weights_that_do_not_say_how_far_they_are(trained):
    """Those of a DeiT, say: all of its attention is in use."""
    cfg, save, folder = trained
    state = {name: value for name, value in read_file(save(1.0)).items() if 'blocks' in name or 'lambda' not in name}
    write_pdparams(state, str(folder / 'deit.pdparams'))
    with pytest.raises(UserError, match='block 0 still has the weight 1 in'):
        prune.main(
            ['-cfg', cfg, '-pretrained', str(folder / 'deit.pdparams'), '-output', str(folder / 'small.pdparams')]
        )


def test_models_that_disagree_are_not_written(trained, monkeypatch):
    cfg, save, folder = trained
    build = prune.without_attention

    def spoilt(*arguments):
        model = build(*arguments)
        model.blocks[0].set_attn_weight(0.0, identity=1.0)  # y = x instead of 2x
        return model

    monkeypatch.setattr(prune, 'without_attention', spoilt)
    with pytest.raises(UserError, match='without these layers differs'):
        prune.main(['-cfg', cfg, '-pretrained', save(0.0), '-output', str(folder / 'small.pdparams')])
    assert not (folder / 'small.pdparams').exists()
