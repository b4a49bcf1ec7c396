# SPDX-License-Identifier: Apache-2.0
"""The convolutional stem of "Early Convolutions Help Transformers See Better", as MoCo v3 has it."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from config import get_config
from models import build_model, create_model
from models.layers import ConvStem
from models.mae import MaskedAutoencoder
from models.vision_transformer import VisionTransformer
from models.weights.load import load_state
from tests.conftest import assert_close
from tests.models.helpers import small_config
from utils.errors import UserError

TINY = {'img_size': 32, 'patch_size': 16, 'embed_dim': 24, 'depth': 1, 'num_heads': 3, 'num_classes': 5}


def by_hand(stem: ConvStem, x: paddle.Tensor) -> paddle.Tensor:
    """The stem from its state dict, under the names of a sequence: convolution, normalization, ReLU, four times; 1 x 1."""
    state = stem.state_dict()
    for i in range(0, 12, 3):
        x = F.conv2d(x, state[f'proj.{i}.weight'], stride=2, padding=1)
        mean, variance, weight, bias = (state[f'proj.{i + 1}.{n}'] for n in ('_mean', '_variance', 'weight', 'bias'))
        if stem.training:
            mean, variance = x.mean([0, 2, 3]), x.var([0, 2, 3], unbiased=False)
        mean, variance, weight, bias = (v.reshape([-1, 1, 1]) for v in (mean, variance, weight, bias))
        x = F.relu((x - mean) / paddle.sqrt(variance + 1e-5) * weight + bias)
    return F.conv2d(x, state['proj.12.weight'], state['proj.12.bias']).flatten(2).transpose([0, 2, 1])


@pytest.mark.parametrize('training', [True, False])
def test_forward(training):
    paddle.seed(0)
    stem = ConvStem(64, 16, 3, 32, any_size=True)
    for name, value in stem.state_dict().items():
        if name.endswith(('_mean', 'bias')):
            value.set_value(paddle.randn(value.shape))
    stem.train() if training else stem.eval()
    x = paddle.randn([2, 3, 32, 64])
    expected = by_hand(stem, x).numpy()
    assert expected.shape == (2, 2 * 4, 32)
    assert_close(stem(x), expected, 1e-5)


def test_sizes():
    """Channels double up to those of a token; ViT-S has 1,021,488 parameters in the stem."""
    stem = create_model('mocov3_conv_small_patch16_224', opts=['MODEL.TRANS.DEPTH', 1]).base_encoder.patch_embed
    assert [list(conv.weight.shape) for conv in stem.convs] == [
        [48, 3, 3, 3], [96, 48, 3, 3], [192, 96, 3, 3], [384, 192, 3, 3], [384, 384, 1, 1]
    ]  # fmt: skip
    assert sum(parameter.size for parameter in stem.parameters()) == 1_021_488
    assert (stem.grid_size, stem.num_patches) == ((14, 14), 196)
    for conv in stem.convs:  # PyTorch's default
        bound = float(np.prod(conv.weight.shape[1:])) ** -0.5
        assert 0.95 * bound < conv.weight.abs().max().item() <= bound


@pytest.mark.parametrize(
    ('build', 'words'),
    [
        (lambda: ConvStem(36, 12, 3, 24), 'PATCH_SIZE that is a power of 2, not 12'),
        (lambda: ConvStem(32, 16, 3, 20), 'EMBED_DIM that is a multiple of PATCH_SIZE / 2, not 20'),
        (lambda: MaskedAutoencoder(variants=['conv_stem']), 'would mix masked and visible patches'),
        (lambda: get_config(opts=['MODEL.TYPE', 'mae', 'MODEL.TRANS.CONV_STEM', True]), 'CONV_STEM'),
        (
            lambda: build_model(small_config('mocov3_conv_small_patch16_224', 'MODEL.MOCO.FREEZE_PATCH', True)),
            'FREEZE_PATCH is for a linear patch embedding',
        ),
    ],
)
def test_mistakes(build, words):
    with pytest.raises(UserError, match=words):
        build()


def test_contrastive_pre_training_and_its_fine_tuning():
    """Each view updates the statistics; the encoder with its stem starts a classifier, but not one without the stem."""
    model = build_model(small_config('mocov3_conv_small_patch16_224'))
    model.train()
    model.set_momentum(0.9)
    views = paddle.randn([4, 2, 3, 32, 32])
    output = model(views)
    (output.q1 * output.k2 + output.q2 * output.k1).sum().backward()
    stem, momentum = model.base_encoder.patch_embed, model.momentum_encoder.patch_embed
    assert all(parameter.grad is not None for parameter in stem.parameters())
    first, second = (stem.proj[0](view).mean([0, 2, 3]) for view in views.unbind(1))
    for encoder in (stem, momentum):
        assert_close(encoder.proj[1]._mean, 0.09 * first + 0.1 * second, 1e-4)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    options = {'img_size': 32, 'patch_size': 8, 'embed_dim': 24, 'depth': 2, 'num_heads': 3, 'num_classes': 5}
    classifier = VisionTransformer(**options, variants=['conv_stem'])
    load_state(classifier, state)
    np.testing.assert_array_equal(classifier.patch_embed.proj[1]._variance, stem.proj[1]._variance)
    np.testing.assert_array_equal(classifier.patch_embed.convs[-1].bias, stem.convs[-1].bias)
    with pytest.raises(UserError, match='set MODEL.TRANS.CONV_STEM to True'):
        load_state(VisionTransformer(**options), state)


def test_the_other_parts_take_it():
    """Frozen stages, BEiT's initialization, one channel from weights for three, other image sizes."""
    model = VisionTransformer(**TINY, variants=['conv_stem', 'rescaled_init'], in_chans=1)
    assert model.patch_embed.convs[0].weight.std().item() == pytest.approx(0.02, rel=0.5)
    colors = VisionTransformer(**TINY, variants=['conv_stem'])
    load_state(model, {name: value.numpy() for name, value in colors.state_dict().items()})
    expected = colors.patch_embed.convs[0].weight.sum(1, keepdim=True)
    assert_close(model.patch_embed.convs[0].weight, expected, 1e-6)
    model.freeze_stages(0)
    model.train()
    assert not model.patch_embed.proj[1].training and model(paddle.randn([2, 1, 48, 32])).shape == [2, 5]
