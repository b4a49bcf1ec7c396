# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoders against MAE-Lite's numbers."""

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import get_config
from datasets.batch import Batch
from models import build_model
from models.layers import MixerSpec, sincos_position_table, take_tokens
from models.mae import MaskedAutoencoder, num_visible, patchify, unpatchify
from tasks.mae import MAETask
from tests.conftest import assert_close, golden
from tests.models.helpers import linear_weights, load, small_config
from utils.errors import UserError


def build(ctor: dict, **changes) -> MaskedAutoencoder:
    ctor = {'norm_pix_loss': False, **{name: value for name, value in ctor.items() if name != 'norm_eps'}}
    return MaskedAutoencoder(**{**ctor, **changes})


def tiny(**changes) -> MaskedAutoencoder:
    sizes = {'img_size': 32, 'patch_size': 8, 'embed_dim': 24, 'depth': 2, 'num_heads': 3}
    decoder = {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 2, 'norm_pix_loss': False}
    return MaskedAutoencoder(**{**sizes, **decoder, **changes})


def test_position_tables():
    g = golden('mae_lite-sincos')
    for case in g.meta['cases']:
        table = sincos_position_table(case['embed_dim'], case['grid_size'], int(case['cls_token']))
        assert_close(table[0], g[f'out/{case["out"]}'], 1e-6)
    with pytest.raises(UserError, match='30 channels do not divide by 4'):
        sincos_position_table(30, 4)


def test_patches():
    g = golden('mae_lite-masking')
    for case in g.meta['patchify']:
        i, side, size = case['i'], case['img_size'], case['patch_size']
        np.testing.assert_array_equal(patchify(paddle.to_tensor(g[f'in/imgs{i}']), size), g[f'out/patches{i}'])
        pictures = unpatchify(paddle.to_tensor(g[f'in/tokens{i}']), size, (side // size,) * 2)
        np.testing.assert_array_equal(pictures, g[f'out/unpatch{i}'])


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]))
def test_unpatchify_is_the_inverse(batch, rows, columns, size, channels):
    images = paddle.arange(batch * channels * rows * columns * size**2).astype('float32')
    images = images.reshape([batch, channels, rows * size, columns * size])
    np.testing.assert_array_equal(unpatchify(patchify(images, size), size, (rows, columns)), images)


def test_masking():
    g = golden('mae_lite-masking')
    for case in g.meta['masking']:
        i = case['i']
        order = paddle.argsort(paddle.to_tensor(g[f'in/noise{i}']), axis=-1)
        seen = num_visible(order.shape[1], case['mask_ratio'])
        np.testing.assert_array_equal(order, g[f'out/ids_shuffle{i}'])
        np.testing.assert_array_equal(paddle.argsort(order, axis=-1), g[f'out/ids_restore{i}'])
        np.testing.assert_array_equal(
            take_tokens(paddle.to_tensor(g[f'in/x{i}']), order[:, :seen]), g[f'out/x_masked{i}']
        )
    table = g.meta['len_keep']
    counts = [[num_visible(patches, ratio) for ratio in table['mask_ratio']] for patches in table['L']]
    np.testing.assert_array_equal(counts, g['out/len_keep'])


@pytest.mark.parametrize('name', ['mae_fwd', 'mae_fwd_p16', 'mae_fwd_eps'])
def test_forward_and_gradients(name):
    g = golden(f'mae_lite-{name}')
    model = load(build(g.meta['ctor'], mask_ratio=g.meta['mask_ratio'], norm_pix_loss=False), g.group('sd'))
    images, noise = paddle.to_tensor(g['in/imgs']), paddle.to_tensor(g['in/noise'])
    output = model(images, noise)
    np.testing.assert_array_equal(output.mask, g['out/mask'])
    np.testing.assert_array_equal(output.ids_shuffle, g['out/ids_shuffle'])
    latent = model.encode(images, output.ids_shuffle[:, : g['out/latent'].shape[1] - 1])
    assert_close(latent, g['out/latent'])
    assert_close(output.pred, g['out/pred'])
    assert_close(output.loss.item(), g['out/loss'], 1e-5)
    model.norm_pix_loss = True
    loss = model(images, noise).loss
    assert_close(loss.item(), g['out/loss_normpix'], 1e-5)
    loss.backward()
    parameters, linear = dict(model.named_parameters()), linear_weights(model)
    for key, gradient in g.group('out/grad_normpix').items():
        assert_close(parameters[key].grad, gradient.T if key in linear else gradient, 1e-3)


def test_fixed_tables_are_in_the_state_but_not_trained():
    g = golden('mae_lite-mae_fwd')
    model = build(g.meta['ctor'])
    frozen = {name for name, parameter in model.named_parameters() if parameter.stop_gradient}
    assert frozen == set(g.meta['frozen']) <= set(model.state_dict())
    np.testing.assert_array_equal(model.pos_embed, sincos_position_table(48, 6, 1))
    np.testing.assert_array_equal(model.decoder_pos_embed, sincos_position_table(32, 6, 1))


def test_initialization():
    paddle.seed(0)
    model = tiny(embed_dim=192, decoder_embed_dim=96)
    for name, parameter in model.named_parameters():
        values = parameter.numpy()
        if name.startswith('patch_embed.proj'):
            fan_in = 3 * 8 * 8
            bound = (6 / (fan_in + 192)) ** 0.5 if values.ndim > 1 else fan_in**-0.5
            assert 0.9 * bound < np.abs(values).max() <= bound, name
        elif 'token' in name:
            assert values.std() == pytest.approx(0.02, rel=0.2), name
        elif values.ndim == 2:  # qkv is one matrix
            bound = (6 / sum(values.shape)) ** 0.5
            assert 0.99 * bound < np.abs(values).max() <= bound, name
        elif 'pos_embed' not in name:
            assert np.unique(values).tolist() == [float('norm' in name and name.endswith('weight'))], name


def test_masked_patches_have_no_influence():
    """The encoder output does not depend on masked patches, nor the loss on visible ones."""
    paddle.seed(0)
    model = tiny(mask_ratio=0.5)
    images, noise = paddle.randn([2, 3, 32, 32]), paddle.rand([2, 16])
    output = model(images, noise)
    seen, _ = model.to_images(images, output)
    kept = output.ids_shuffle[:, :8]
    assert_close(model.encode(seen, kept), model.encode(images, kept), 1e-6)
    other_pred = output.pred + paddle.randn(output.pred.shape) * (1 - output.mask.unsqueeze(-1))
    assert model.loss(images, other_pred, output.mask).item() == pytest.approx(output.loss.item(), rel=1e-6)


@pytest.mark.parametrize('norm_pix', [False, True])
def test_pictures_of_a_perfect_reconstruction(norm_pix):
    model = tiny(norm_pix_loss=norm_pix)
    images = paddle.randn([2, 3, 32, 32])
    output = model(images)
    target = patchify(images, 8)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / paddle.sqrt(target.var(-1, keepdim=True) + 1e-6)
    seen, rebuilt = model.to_images(images, output._replace(pred=target))
    assert_close(rebuilt, images, 1e-5)
    assert (seen == 0).astype('float32').mean().item() == pytest.approx(0.75)


def test_other_image_sizes():
    """A wide image, and weights of a smaller model, whose tables are computed again."""
    model = tiny()
    assert model(paddle.randn([1, 3, 16, 64])).pred.shape == [1, 16, 192]
    larger = tiny(img_size=48)
    for name in ('pos_embed', 'decoder_pos_embed'):
        table = larger.weight_rules.resize(larger, name, model.state_dict()[name].numpy())
        np.testing.assert_array_equal(table, larger.state_dict()[name])


def test_the_encoder_alone():
    model = tiny(decoder_depth=0)
    full = tiny()
    assert set(full.state_dict()) - set(model.state_dict()) == set(
        model.weight_rules.unused(model, {name: value.numpy() for name, value in full.state_dict().items()}, 'x')
    )
    assert tiny(mixer=MixerSpec(qkv_bias=False))(paddle.randn([1, 3, 32, 32])).pred.shape == [1, 16, 192]
    assert model.encode(paddle.randn([2, 3, 32, 32]), paddle.to_tensor([[3, 1], [0, 2]])).shape == [2, 3, 24]


class MeanColors(MaskedAutoencoder):
    """Predict the mean color of each patch."""

    def targets(self, x):
        return paddle.nn.functional.avg_pool2d(x, self.patch_size).flatten(2).transpose([0, 2, 1])


def test_other_targets():
    """`decoder_pred_dim` with a subclass: the loss is that of its targets, and falls; there are no pictures."""
    sizes = {'img_size': 32, 'patch_size': 8, 'embed_dim': 24, 'depth': 1, 'num_heads': 3, 'decoder_num_heads': 2}
    paddle.seed(0)
    model = MeanColors(**sizes, decoder_embed_dim=16, decoder_depth=1, decoder_pred_dim=3)
    images, noise = paddle.rand([2, 3, 32, 32]), paddle.rand([2, 16])
    assert model.decoder_pred.weight.shape == [16, 3]
    optimizer = paddle.optimizer.Adam(0.01, parameters=model.parameters())
    losses = []
    for _ in range(10):
        output = model(images, noise)
        output.loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(output.loss.item())
    colors = images.numpy().reshape(2, 3, 4, 8, 4, 8).mean((3, 5)).transpose(0, 2, 3, 1).reshape(2, 16, 3)
    masked = output.mask.numpy() == 1
    assert losses[-1] == pytest.approx(np.square(output.pred.numpy() - colors)[masked].mean(), rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    evaluator = MAETask(get_config(opts=['MODEL.TYPE', 'mae', 'TRAIN.TASK', 'mae'])).evaluator()
    evaluator.sums(Batch(images, {}, paddle.arange(2)), (noise, output))
    assert evaluator.pictures(model) == {}
    with pytest.raises(UserError, match='MeanColors does not predict pixels'):
        model.to_images(images, output)


def test_targets_of_another_size():
    config = small_config('mae_tiny_patch16_224', 'MODEL.MAE.DECODER_PRED_DIM', 8)
    with pytest.raises(
        UserError, match=r'predicts 8 values of each patch .*DECODER_PRED_DIM\), but the target has 192'
    ):
        build_model(config)(paddle.rand([1, 3, 32, 32]))


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'mask_ratio': 1.0}, 'leaves no visible or no masked patch'),
        ({'mask_ratio': 0.0}, 'leaves no visible or no masked patch'),
        ({'decoder_num_heads': 3}, 'DECODER_NUM_HEADS'),
        ({'decoder_embed_dim': 18}, 'do not divide by 4'),
    ],
)
def test_mistakes(changes, words):
    with pytest.raises(UserError, match=words):
        tiny(**changes)
