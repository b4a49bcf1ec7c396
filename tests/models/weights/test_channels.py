# SPDX-License-Identifier: Apache-2.0
"""Weights of another number of image channels."""

import numpy as np
import paddle
import pytest

from models import build_model
from models.weights.channels import adapted_channels
from models.weights.load import load_state
from tests.models.helpers import small_config
from utils.errors import UserError

MODELS = {
    'deit_small_patch16_224': 'patch_embed.proj.weight',
    'gmlp_s16_224': 'patch_embed.patch_embed.weight',
    'ms_mlp_tiny_patch4_shift5_224': 'patch_embed.proj.weight',
}


def built(name, channels):
    statistics = ['DATA.IMAGENET_MEAN', [0.5] * channels, 'DATA.IMAGENET_STD', [0.5] * channels]
    model = build_model(small_config(name, 'DATA.IMAGE_CHANNELS', channels, *statistics))
    model.eval()
    return model


def arrays_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def test_definition():
    weight = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype('float32')
    np.testing.assert_array_equal(adapted_channels(weight, 1), weight.sum(1, keepdims=True))
    for channels in (4, 5, 6, 9, 13):
        found = adapted_channels(weight, channels)
        expected = np.concatenate([weight] * 5, axis=1)[:, :channels] * (3 / channels)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('name', MODELS)
def test_gray_images_get_the_results_of_equal_channels(name):
    """The log states the sum; nothing but the patch embedding changes."""
    color, gray, log = built(name, 3), built(name, 1), []
    load_state(gray, arrays_of(color), log=log.append)
    assert log == [f'----- Pretrained: {MODELS[name]} adapted from 3 to 1 image channels (DATA.IMAGE_CHANNELS): summed']
    size = gray.patch_embed.img_size[0] if hasattr(gray.patch_embed, 'img_size') else 64
    x = paddle.randn([2, 1, size, size])
    np.testing.assert_allclose(gray(x), color(x.expand([-1, 3, -1, -1])), atol=1e-5)


def test_more_channels_get_the_results_of_equal_channels():
    color, log = built('deit_small_patch16_224', 3), []
    x = paddle.randn([2, 1, 32, 32])
    expected = color(x.expand([-1, 3, -1, -1]))
    for channels in (6, 9):  # multiples of three: every weight is repeated equally often
        more = built('deit_small_patch16_224', channels)
        load_state(more, arrays_of(color), log=log.append)
        assert log[-1].endswith(
            f'from 3 to {channels} image channels (DATA.IMAGE_CHANNELS): repeated in turn, times 3/{channels}'
        )
        np.testing.assert_allclose(more(x.expand([-1, channels, -1, -1])), expected, atol=1e-5)


def test_evaluation_and_fewer_channels_are_errors():
    """Only a training may start from other weights; four channels do not become three."""
    color, four = (arrays_of(built('deit_small_patch16_224', channels)) for channels in (3, 4))
    for channels, arrays, training in ((1, color, False), (4, color, False), (3, four, True)):
        with pytest.raises(UserError, match=r'patch_embed.proj.weight \[24, . ?, 8, 8\] instead of'):
            load_state(built('deit_small_patch16_224', channels), arrays, log=print, replace_head=training)


def test_half_precision_files():
    bfloat16 = built('deit_small_patch16_224', 3)
    arrays = arrays_of(bfloat16)
    name = 'patch_embed.proj.weight'
    rounded = (arrays[name].view('uint32') >> 16).astype('uint16')
    gray = built('deit_small_patch16_224', 1)
    load_state(gray, {**arrays, name: rounded}, log=lambda line: None)
    expected = (rounded.astype('uint32') << 16).view('float32').sum(1, keepdims=True)
    np.testing.assert_allclose(gray.patch_embed.proj.weight, expected, rtol=1e-6)
