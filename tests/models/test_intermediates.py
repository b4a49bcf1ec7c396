# SPDX-License-Identifier: Apache-2.0
"""Blocks from their parts, and the intermediate results of a pass."""

import inspect

import numpy as np
import paddle
import pytest
from paddle import nn

from config import get_config
from models import build_model
from models.layers import (
    Attention,
    BlockIntermediates,
    EViTSpec,
    MixerSpec,
    RemovalSpec,
    TokenState,
    ToMeSpec,
    attention,
    keep_tokens,
    register_mixer,
)
from models.layers.mixers import MIXERS
from models.vision_transformer import VisionTransformer
from tests.conftest import assert_close
from tests.models.test_vision_transformer import tiny
from utils.errors import UserError

TINY = {'img_size': 32, 'patch_size': 8, 'num_classes': 5, 'embed_dim': 24, 'depth': 3, 'num_heads': 3}
IMAGES = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype('float32'))


def evaluated(model: nn.Layer) -> nn.Layer:
    model.eval()
    return model


# ---------------------------------------------------------------------------------------------------- intermediates
def test_every_result_of_a_block():
    model = evaluated(tiny(layer_scale=0.5))
    names = [name for name in BlockIntermediates._fields if name != 'reduced']
    seen = model.forward_intermediates(IMAGES, want=names)
    assert_close(seen.features, model.forward_features(IMAGES), 1e-6)  # without attention maps: other operators
    assert list(seen.blocks) == [0, 1, 2]
    x = model.embed(IMAGES)
    for number, block in enumerate(model.blocks):
        result, before = seen.blocks[number], x
        np.testing.assert_array_equal(result.block_input[0], x)
        np.testing.assert_array_equal(result.inputs, block.norm1(x))
        np.testing.assert_array_equal(result.attn_out, block.attn(result.inputs, need_maps=True)[0])
        np.testing.assert_array_equal(result.attn, nn.functional.softmax(result.attn_logits))
        x = x + result.attn_out * block.gamma_1
        np.testing.assert_array_equal(result.mlp_out, block.mlp(block.norm2(x)))
        x = x + result.mlp_out * block.gamma_2
        np.testing.assert_array_equal(result.tokens, x)
        np.testing.assert_array_equal(result.maps[1, :, 2, 3], x[1, 1 + 2 * 4 + 3])
        assert result.maps.shape == [2, 24, 4, 4] and result.source is None and not result.reduced
        assert_close(model.run_blocks(before, result.block_input[1], number)[0], seen.features, 1e-6)


def test_chosen_blocks_and_names():
    model = evaluated(tiny(removed_layers=[1]))
    seen = model.forward_intermediates(IMAGES, indices=[2, 1], want=['attn_logits', 'inputs'])
    assert list(seen.blocks) == [1, 2]
    assert seen.blocks[1].attn_logits is None and seen.blocks[1].tokens is None
    assert seen.blocks[2].attn_logits.shape == [2, 3, 17, 17]
    before = model.forward_intermediates(IMAGES, [0]).blocks[0].tokens
    np.testing.assert_array_equal(seen.blocks[1].inputs, model.blocks[1].norm2(2 * before))
    assert model.forward_intermediates(IMAGES, want=()).blocks.keys() == {0, 1, 2}
    one_by_one = list(model.iter_intermediates(IMAGES, ['inputs']))
    for number in (1, 2):
        np.testing.assert_array_equal(one_by_one[number].inputs, seen.blocks[number].inputs)


def test_a_wide_image_has_wide_maps():
    maps = tiny(distilled=True).forward_intermediates(paddle.randn([1, 3, 16, 64]), [0], ['maps']).blocks[0].maps
    assert maps.shape == [1, 24, 2, 8]


def test_mistakes():
    model = tiny(keep_rate=[1, 0.5, 1])
    with pytest.raises(ValueError, match="no intermediates 'hidden'; choose from tokens"):
        model.forward_intermediates(IMAGES, want=['hidden'])
    with pytest.raises(ValueError, match='no block 3; indices must be 0 to 2'):
        model.forward_intermediates(IMAGES, [3])
    assert model.forward_intermediates(IMAGES, [0], ['maps']).blocks[0].maps.shape == [2, 24, 4, 4]
    with pytest.raises(ValueError, match='form no feature map'):
        model.forward_intermediates(IMAGES, [1], ['maps'])


def test_sources_follow_every_reduction():
    model = evaluated(tiny(keep_rate=[1, 0.5, 1]))
    model.merge_tokens([0, 0, 3])
    seen = model.forward_intermediates(IMAGES, want=['tokens', 'source'])
    assert [block.reduced for block in seen.blocks.values()] == [False, True, True]
    assert seen.blocks[0].source is None
    assert [seen.blocks[i].source.shape for i in (1, 2)] == [[2, 9, 17], [2, 6, 17]]
    assert [block.tokens.shape[1] for block in seen.blocks.values()] == [17, 9, 6]
    np.testing.assert_array_equal(seen.blocks[2].source, model.forward_tokens(IMAGES, trace=True)[1].source)


def test_a_pass_that_asks_for_nothing_uses_the_fused_kernel(monkeypatch):
    calls = []
    fused = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention, '_fused_kernel', lambda x: True)
    monkeypatch.setattr(
        attention.F, 'scaled_dot_product_attention', lambda *a, **k: (calls.append(1), fused(*a, **k))[1]
    )
    model = evaluated(tiny())
    model.forward_intermediates(IMAGES, want=['tokens', 'inputs', 'attn_out', 'maps'])
    assert len(calls) == 3
    model.forward_intermediates(IMAGES, [1], ['attn'])
    assert len(calls) == 5


def test_gradients_flow_through_intermediates_with_checkpointing():
    model, gradients = tiny(drop_path_rate=0.3), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        paddle.seed(1)
        seen = model.forward_intermediates(IMAGES, want=['inputs', 'attn_logits'])
        sum(block.inputs.sin().sum() + block.attn_logits.cos().sum() for block in seen.blocks.values()).backward()
        gradients.append([p.grad.numpy() for p in model.parameters() if p.grad is not None])
        model.clear_gradients(set_to_zero=False)
    assert len(gradients[0]) == len(gradients[1]) > 30
    for plain, again in zip(*gradients):
        np.testing.assert_array_equal(plain, again)


class FourMaps(nn.Layer):
    """A backbone of a dense head."""

    def __init__(self, model: VisionTransformer):
        super().__init__()
        self.model = model

    def forward(self, x):
        seen = self.model.forward_intermediates(x, [0, 2], ['maps'])
        return seen.blocks[0].maps + seen.blocks[2].maps


def test_maps_are_exported(tmp_path):
    dense = evaluated(FourMaps(tiny(removed_layers=[1])))
    spec = paddle.static.InputSpec([None, 3, 32, 32], 'float32')
    expected = [dense(paddle.concat([IMAGES] * n)) for n in (1, 2)]
    paddle.jit.save(paddle.jit.to_static(dense, input_spec=[spec], full_graph=True), str(tmp_path / 'maps'))
    loaded = paddle.jit.load(str(tmp_path / 'maps'))
    for n, maps in enumerate(expected, 1):
        np.testing.assert_allclose(loaded(paddle.concat([IMAGES] * n)), maps, 1e-5, 1e-5)


# ---------------------------------------------------------------------------------------------------- parts
class Windows(Attention):
    """Attention within each row of patches; the class token does not change."""

    def forward(self, x, need_maps=False, need_keys=False, key_bias=None, bias=None, grid=None):
        rows, columns = grid
        patches = x[:, 1:].reshape([-1, columns, x.shape[2]])
        mixed, maps = super().forward(patches, need_maps, need_keys)
        return paddle.concat([x[:, :1], mixed.reshape([-1, rows * columns, x.shape[2]])], axis=1), maps


@pytest.fixture
def windows(monkeypatch):
    """The name of a mixer that is registered for one test."""
    monkeypatch.setattr(MIXERS, '_entries', dict(MIXERS._entries))
    monkeypatch.setattr(MIXERS, '_aliases', dict(MIXERS._aliases))
    register_mixer('windows')(lambda spec, dim, num_heads, grid, drop_rate: Windows(dim, num_heads))
    return 'windows'


def test_a_new_mixer_plugs_in(windows):
    mixers = [MixerSpec(windows), MixerSpec('relative'), MixerSpec(windows)]
    model = evaluated(VisionTransformer(**TINY, mixer=mixers))
    assert [type(block.attn).__name__ for block in model.blocks] == ['Windows', 'RelativeAttention', 'Windows']
    x = paddle.randn([2, 3, 32, 32])
    changed = x.clone()
    changed[:, :, 8:16] = 0.0  # the second row of patches
    first = [model.forward_intermediates(images, [0], ['tokens']).blocks[0].tokens for images in (x, changed)]
    same = np.isclose(*first).all((0, 2))
    assert same.tolist() == [True] * 5 + [False] * 4 + [True] * 8
    with pytest.raises(UserError, match="unknown token mixer .* .window.. Did you mean 'windows'"):
        VisionTransformer(**TINY, mixer=MixerSpec('window'))
    with pytest.raises(UserError, match='mixer has 2 values for 3 blocks'):
        VisionTransformer(**TINY, mixer=mixers[:2])


def test_reducers_need_what_the_mixer_offers(windows, monkeypatch):
    monkeypatch.setattr(Windows, 'offers', ())
    mixer = MixerSpec(windows)
    model = VisionTransformer(**TINY, mixer=[mixer, MixerSpec(), mixer], reducers=[EViTSpec([1, 0.5, 1])])
    assert model.attention_layers() == [1]
    with pytest.raises(UserError, match='EViTReducer needs the weights of attention, which Windows '):
        VisionTransformer(**TINY, mixer=mixer, reducers=[EViTSpec([1, 0.5, 1])])
    with pytest.raises(UserError, match='ToMeReducer needs the keys of attention, which Windows '):
        model.merge_tokens(2)


def test_mixers_are_named_in_the_configuration(windows):
    opts = ['MODEL.TYPE', 'vit', 'MODEL.TRANS.DEPTH', 3, 'MODEL.TRANS.EMBED_DIM', 24, 'MODEL.TRANS.NUM_HEADS', 3]
    each = ['MODEL.TRANS.MIXER', [windows, 'attention', 'attention'], 'MODEL.TRANS.REL_POS', ['block']]
    names = [type(block.attn).__name__ for block in build_model(get_config(opts=[*opts, *each])).blocks]
    assert names == ['Windows', 'RelativeAttention', 'RelativeAttention']
    for wrong, message in (
        (
            ['MODEL.TRANS.MIXER', [windows, 'attention']],
            'MODEL.TRANS.MIXER names 2 mixers, but must name one, or one for',
        ),
        (['MODEL.TRANS.MIXER', windows, 'MODEL.TRANS.REL_POS', ['block']], 'MODEL.TRANS.REL_POS block needs attention'),
    ):
        with pytest.raises(UserError, match=message):
            build_model(get_config(opts=[*opts, *wrong]))


@pytest.mark.parametrize('prefix', [1, 2])
def test_dropped_tokens_leave_the_state_too(prefix):
    x = paddle.arange(10.0).reshape([1, 10, 1]).expand([2, -1, 3])
    state = TokenState(prefix, 10 - prefix, size=x[:, :, :1], class_attention=x[:, :, 0], grid=(3, 3))
    y, after = keep_tokens(x, state, paddle.to_tensor([[5, 0], [2, 3]]))
    expected = [[*range(prefix), 5 + prefix, prefix], [*range(prefix), 2 + prefix, 3 + prefix]]
    for tokens in (y[:, :, 1], after.size[:, :, 0], after.class_attention):
        assert tokens.tolist() == expected
    assert (after.num_body, after.grid, after.source, after.is_reduced) == (2, None, None, True)


@pytest.mark.parametrize('tome_first', [False, True])
def test_reducers_run_in_order(tome_first):
    specs = [EViTSpec([1, 0.5, 1]), ToMeSpec([0, 4, 0])]
    model = evaluated(VisionTransformer(**TINY, reducers=specs[::-1] if tome_first else specs))
    _, state = model.forward_tokens(IMAGES, trace=True)
    assert state.counts == ((16, 6, 6) if tome_first else (16, 4, 4))
    assert state.indices[0].shape == [2, 6 if tome_first else 8]
    np.testing.assert_array_equal(state.source.sum(-1, keepdim=True), state.size)
    if tome_first:  # a merged token has the attention of its parts
        attn = model.forward_intermediates(IMAGES, [1], ['attn']).blocks[1].attn
        np.testing.assert_allclose(state.scores[0].sum(-1), attn[:, :, 0, 1:].mean(1).sum(-1), 1e-4)
        assert state.scores[0].shape == [2, 12]


def test_the_constructor_takes_plain_data():
    parameters = inspect.signature(VisionTransformer).parameters
    assert len(parameters) <= 20
    model = VisionTransformer(**TINY, removal=RemovalSpec(removed_layers=[0]), reducers=())
    assert model.blocks[0].attn is None and not any(len(block.reducers) for block in model.blocks)
