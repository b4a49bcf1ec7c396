# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer with BEiT's parts, as MAE-Lite fine-tunes it."""

import numpy as np
import paddle
import pytest

from models import create_model
from models.layers import RelativePositionBias, relative_position_index, resize_relative_table
from models.mae import MaskedAutoencoder
from models.vision_transformer import VisionTransformer
from models.weights.convert import port_state_dict
from models.weights.load import load_state
from tests.conftest import assert_close, golden
from tests.models.helpers import load, vision_transformer
from tests.models.weights.test_fine_tuning import DECODER, TINY, arrays, begin, named
from utils.errors import UserError

BEIT = {'key_bias': False, 'layer_scale': 0.1, 'variants': ['rescaled_init']}


def build(ctor: dict, **changes) -> VisionTransformer:
    """A model from upstream's arguments."""
    ctor = dict(ctor)
    ctor.pop('norm_eps', None)
    kinds = {'block': ctor.pop('use_rel_pos_bias', False), 'shared': ctor.pop('use_shared_rel_pos_bias', False)}
    return vision_transformer(
        absolute_positions=ctor.pop('use_abs_pos_emb'),
        relative_positions=[kind for kind, used in kinds.items() if used],
        layer_scale=ctor.pop('init_values'),
        global_pool=ctor.pop('use_mean_pooling', True),
        key_bias=False,
        variants=['rescaled_init'],
        **{**ctor, **changes},
    )


def weights(g) -> dict[str, np.ndarray]:
    return {name: array for name, array in g.group('sd').items() if not name.endswith('relative_position_index')}


def test_index_and_bias():
    g = golden('mae_lite-rpe_index')
    for case in g.meta['cases']:
        index = relative_position_index(*case['window'])
        np.testing.assert_array_equal(index, g[f'out/index{case["i"]}'])
        assert index.max() + 1 == case['num_relative_distance']
        if case['with_bias']:
            layer = RelativePositionBias(tuple(case['window']), case['num_heads'])
            layer.relative_position_bias_table.set_value(g[f'in/table{case["i"]}'])
            np.testing.assert_array_equal(layer(), g[f'out/bias{case["i"]}'])


@pytest.mark.parametrize('name', ['rpe_layer', 'rpe_shared'])
def test_forward(name):
    g = golden(f'mae_lite-{name}')
    model = load(build(g.meta['ctor']), weights(g))
    model.eval()
    x = paddle.to_tensor(g['in/x'])
    assert_close(model(x), g['out/logits'])
    seen = model.forward_intermediates(x, (0, 1), ('inputs', 'attn_logits'))
    assert_close(model.forward_head(seen.features, pre_logits=True), g['out/features'])
    assert_close(seen.blocks[0].inputs, g['out/hidden_first'])
    assert_close(seen.blocks[1].attn_logits, g['out/attn_last'])
    if not model.global_pool:
        assert_close(seen.features, g['out/hidden_last'])


def test_mae_weights_start_the_fine_tuning():
    g = golden('mae_lite-ckpt_remap')
    facts = next(case for case in g.meta['cases'] if case['name'] == 'mae_to_rpe')
    ported = port_state_dict(MaskedAutoencoder(**g.meta['mae']), named(g, 'mae'))
    model, lines = begin(build(g.meta['rpe']), g, 'rpe'), []
    load_state(model, ported, log=lines.append)
    assert_close(model(paddle.to_tensor(g['in/x'])), g['out/mae_to_rpe_logits'], 1e-5)
    assert '37 arrays of the state dict are used' in '\n'.join(lines)
    assert len(facts['loaded']) == 37


def test_initialization():
    paddle.seed(0)
    plain = vision_transformer(**TINY, num_classes=50)
    paddle.seed(0)
    model = vision_transformer(**TINY, num_classes=50, relative_positions=('block', 'shared'), **BEIT)
    for number, block in enumerate(model.blocks, 1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.15)
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert not block.attn.relative_position_bias_table.any()
        assert block.gamma_1.unique().tolist() == [pytest.approx(0.1)]
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.15)
    model.reset_classifier(40)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.15)
    assert plain.head.weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_gradients_reach_every_part():
    model = vision_transformer(**TINY, num_classes=5, relative_positions=('block', 'shared'), global_pool=True, **BEIT)
    model(paddle.randn([2, 3, 32, 32])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('hidden', [False, True])
def test_place_of_the_dropout_in_the_mlp(hidden):
    """BEiT has dropout after the last layer of an MLP only: with it, each output is 0 or that of evaluation / (1 - p)."""
    paddle.seed(0)
    sizes = ['DATA.IMAGE_SIZE', 32, 'MODEL.TRANS.DEPTH', 1, 'MODEL.DROPOUT', 0.5]
    place = ['MODEL.TRANS.HIDDEN_DROPOUT', True] if hidden else []  # the recipe's is False
    model = create_model('vit_tiny_patch16_224_mae_finetune_rpe', num_classes=5, opts=[*sizes, *place])
    mlp, x = model.blocks[0].mlp, paddle.randn([4, 5, 192])
    mlp.fc2.bias.set_value(paddle.ones([192]))
    mlp.eval()
    expected = 2 * mlp(x).numpy()
    mlp.train()
    output = mlp(x).numpy()
    assert 0.4 < (output == 0).mean() < 0.6
    exact = np.isclose(output, expected, rtol=1e-5)[output != 0]
    assert exact.mean() < 0.1 if hidden else exact.all()


def test_tables_follow_the_image_size():
    small = vision_transformer(**TINY, num_classes=5, relative_positions=('block',))
    large = vision_transformer(**{**TINY, 'img_size': 64}, num_classes=5, relative_positions=('block',))
    load_state(large, arrays(small))
    table = np.arange(52 * 3, dtype='float32').reshape(52, 3)
    table[:49] = 2.0
    resized = resize_relative_table(table, (8, 8))
    assert resized.shape == (15 * 15 + 3, 3)
    assert_close(resized[:225], np.full([225, 3], 2.0), 1e-5)
    np.testing.assert_array_equal(resized[225:], table[49:])


def test_mistakes():
    relative = {**TINY, 'relative_positions': ('block',)}
    with pytest.raises(UserError, match='DATA.IMAGE_SIZE'):
        vision_transformer(**relative)(paddle.randn([1, 3, 64, 64]))
    with pytest.raises(UserError, match='REL_POS'):
        vision_transformer(**relative, keep_rate=0.5)
    with pytest.raises(UserError, match='MODEL.TOME merges'):
        vision_transformer(**relative).merge_tokens(2)
    with pytest.raises(UserError, match=r"MODEL.TRANS.REL_POS is \('blok',\), but must be .* one of: block, shared"):
        create_model('deit_tiny_patch16_224', opts=['MODEL.TRANS.REL_POS', ('blok',)])


def test_the_class_token_pools_too():
    mae = MaskedAutoencoder(**TINY, **DECODER)
    model = vision_transformer(**TINY, num_classes=5, absolute_positions=False, relative_positions=('shared',), **BEIT)
    load_state(model, arrays(mae))
    assert 'pos_embed' not in model.state_dict()
    np.testing.assert_array_equal(model.norm.weight, mae.norm.weight)
