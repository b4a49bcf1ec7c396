# SPDX-License-Identifier: Apache-2.0
"""The shared parts."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import nn

from config import get_config
from models import build_model
from models.layers import DropPath, PatchEmbed, lecun_normal_, take_tokens, trunc_normal_
from utils.errors import UserError


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.9])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(rate):
    paddle.seed(0)
    drop_path = DropPath(rate)
    x = paddle.rand([4000, 3, 2]) + 1
    y = drop_path(x).numpy() / x.numpy()
    per_sample = y.reshape(4000, -1)
    kept = per_sample[:, 0] > 0
    np.testing.assert_allclose(per_sample[kept], 1 / (1 - rate), rtol=1e-5)
    assert (per_sample[~kept] == 0).all()
    assert kept.mean() == pytest.approx(1 - rate, abs=0.03)
    drop_path.eval()
    assert drop_path(x) is x


def test_drop_path_is_drawn_in_single_precision():
    paddle.seed(0)
    x = paddle.ones([3000, 1], 'float64')
    y = DropPath(0.25)(x)
    assert y.dtype == paddle.float64
    assert set(np.unique(y.numpy().round(4))) == {0, 1.3333}


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_take_tokens(data):
    batch, tokens, channels = (data.draw(st.integers(1, 5)) for _ in range(3))
    k = data.draw(st.integers(1, 4))
    index = np.array(
        data.draw(
            st.lists(st.lists(st.integers(0, tokens - 1), min_size=k, max_size=k), min_size=batch, max_size=batch)
        )
    )
    x = np.random.default_rng(0).standard_normal((batch, tokens, channels)).astype('float32')
    expected = np.take_along_axis(x, index[:, :, None], axis=1)
    np.testing.assert_array_equal(take_tokens(paddle.to_tensor(x), paddle.to_tensor(index)), expected)


def test_patches_run_from_left_to_right_and_top_to_bottom():
    embed = PatchEmbed(4, 2, 1, 1)
    embed.conv.weight.set_value(paddle.full([1, 1, 2, 2], 0.25))
    embed.conv.bias.set_value(paddle.zeros([1]))
    image = paddle.to_tensor(np.kron([[1.0, 2.0], [3.0, 4.0]], np.ones((2, 2))).astype('float32'))
    assert embed(image.reshape([1, 1, 4, 4])).flatten().tolist() == [1, 2, 3, 4]


def test_patch_embed_refuses_images_of_the_wrong_size():
    with pytest.raises(UserError, match='36 pixels does not divide into patches of 8'):
        PatchEmbed(36, 8)
    with pytest.raises(UserError, match='32x32 pixels, not 24x32'):
        PatchEmbed(32, 8)(paddle.randn([1, 3, 24, 32]))
    assert PatchEmbed(32, 8, embed_dim=4, any_size=True)(paddle.randn([1, 3, 24, 40])).shape == [1, 15, 4]


@pytest.mark.parametrize(
    'options', [{'TYPE': 'gmlp'}, {'TYPE': 'vit'}, {'TYPE': 'vit', 'TRANS.ABS_POS': False}], ids=str
)
def test_the_residual_stream_is_in_the_type_of_the_weights(options):
    """Under autocast the convolution of the patches returns half precision; the blocks get float32 all the same."""
    small = {'MIXER.EMBED_DIM': 8, 'MIXER.DEPTH': 2, 'TRANS.EMBED_DIM': 8, 'TRANS.DEPTH': 2, 'TRANS.NUM_HEADS': 2}
    chosen = {key: value for key, value in small.items() if key.startswith('MIXER') == (options['TYPE'] == 'gmlp')}
    pairs = [('DATA.IMAGE_SIZE', 32), *((f'MODEL.{key}', value) for key, value in {**chosen, **options}.items())]
    model = build_model(get_config(opts=[item for pair in pairs for item in pair]))
    model.eval()
    images, types = paddle.randn([2, 3, 32, 32]), []
    expected = model(images)
    model.patch_embed.conv.register_forward_post_hook(lambda layer, inputs, output: output.astype('bfloat16'))
    for block in getattr(model, model.blocks_name):
        block.register_forward_pre_hook(lambda layer, inputs: types.append(inputs[0].dtype))
    np.testing.assert_allclose(model(images), expected, atol=2e-2)
    assert types == [paddle.float32] * 2


def test_initializers():
    paddle.seed(0)
    conv = nn.Conv2D(3, 256, 8)
    lecun_normal_(conv)
    std = 192**-0.5
    assert conv.weight.numpy().std() == pytest.approx(std, rel=0.02)
    assert np.abs(conv.weight.numpy()).max() <= 2 * std / 0.8796 * 1.001
    assert not conv.bias.numpy().any()
    linear = nn.Linear(256, 256)
    trunc_normal_(linear.weight, std=0.02)
    assert linear.weight.numpy().std() == pytest.approx(0.02, rel=0.02)
    assert np.abs(linear.weight.numpy()).max() > 0.06, 'not cut at two sigma'
