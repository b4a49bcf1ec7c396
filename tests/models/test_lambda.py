# SPDX-License-Identifier: Apache-2.0
"""Decaying and removed attention against reference values."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from models import create_model
from models.layers import Attention, Block, TokenState
from models.layers.intermediates import Recorder
from models.vision_transformer import VisionTransformer
from models.weights.convert import port_state_dict, port_with_report
from models.weights.load import load_state
from tests.conftest import assert_close, golden
from tests.models.helpers import load, small_config, to_ours
from tests.models.test_vision_transformer import build, tiny
from utils.errors import UserError

FADING = ['v4_prune', 'timm3_prune', 'v4_prune_done', 'timm3_prune_done', 'v4_overlap']
IMAGES = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype('float32'))


def fading(g, **changes) -> VisionTransformer:
    """The model of a golden that trains, with its weights; λ is no part of those."""
    model = build(g.meta['ctor'], prune_layers=g.meta['prune_layer'], done_layers=g.meta['done_layer'], **changes)
    model.set_state_dict(port_state_dict(model, g.group('sd')))
    return model


def numpy_state(model) -> dict:
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize('name', FADING)
def test_fading_models(name):
    g = golden(f'lambda_vit-{name}')
    model = fading(g)
    model.eval()
    x = paddle.to_tensor(g['in/x'])
    assert_close(model(x), g['out/logits_default_call'])
    for epoch, weight in zip(g['in/epochs'].tolist(), g['out/lambda_of_epoch'].tolist()):
        model.set_attn_lambda(weight)
        assert_close(model(x), g[f'out/logits_epoch{epoch}'])
    outputs = []
    hooks = [block.register_forward_post_hook(lambda _, __, out: outputs.append(out[0])) for block in model.blocks]
    for weight in (1.0, 0.0, 0.5):
        outputs.clear()
        model.set_attn_lambda(weight)
        features = model.forward_features(x)
        assert_close(model.forward_head(features), g[f'out/logits_lambda{weight}'])
        assert_close(model.forward_head(features, pre_logits=True), g[f'out/feat_lambda{weight}'])
    for i, output in enumerate(outputs):
        assert_close(output, g[f'out/tokens_lambda0.5_block{i}'])
    for hook in hooks:
        hook.remove()


def test_removed_attention():
    g = golden('lambda_vit-shrink')
    full, layers = g.group('sd'), g.meta['done_layer']
    small = build(g.meta['ctor'], removed_layers=layers)
    state, report = port_with_report(small, full)
    assert sorted(report.dropped) == g.meta['removed_keys']
    assert set(report.dropped.values()) == {f'block {i} has no attention' for i in layers}
    assert len(report.used) + len(report.dropped) == len(full)
    assert sum(p.size for p in small.parameters()) == g.meta['n_params_shrunk']
    small.set_state_dict(state)
    whole = load(build(g.meta['ctor'], done_layers=layers), {**full, 'attn_lambda': np.float32([0, 0, 1, 0])})
    assert sum(p.size for p in whole.parameters()) == g.meta['n_params_full']
    x = paddle.to_tensor(g['in/x'])
    outputs = []
    for model in (small, whole):
        model.eval()
        outputs.clear()
        hooks = [block.register_forward_post_hook(lambda _, __, out: outputs.append(out[0])) for block in model.blocks]
        features = model.forward_features(x)
        for hook in hooks:
            hook.remove()
        assert_close(model.forward_head(features), g['out/logits'])
        assert_close(model.forward_head(features), g['out/logits_full_model_lambda0'])
        assert_close(model.forward_head(features, pre_logits=True), g['out/feat'])
        for i, output in enumerate(outputs):
            assert_close(output, g[f'out/tokens_block{i}'])


@pytest.mark.parametrize('flavour', ['v4', 'timm3'])
@pytest.mark.parametrize('recompute', [False, True])
def test_gradients(flavour, recompute):
    g = golden(f'lambda_vit-train_grad_{flavour}')
    model = fading(g)
    model.set_grad_checkpointing(recompute)
    model.train()
    for weight in g['in/lambdas'].tolist():
        model.clear_gradients(set_to_zero=False)
        model.set_attn_lambda(weight)
        log_probabilities = F.log_softmax(model(paddle.to_tensor(g['in/x'])), axis=-1)
        loss = -(paddle.to_tensor(g['in/soft_targets']) * log_probabilities).sum(-1).mean()
        loss.backward()
        assert_close(loss, g[f'out/loss_lambda{weight:g}'].item(), 1e-5)
        parameters = dict(model.named_parameters())
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        expected = to_ours(model, g.group(f'out/grad_lambda{weight:g}'))
        largest = max(np.abs(value).max() for value in expected.values())
        for name, value in expected.items():
            if gradients[name] is None:  # attention that is not computed
                assert not value.any()
            else:
                np.testing.assert_allclose(gradients[name], value, 1e-3, 1e-4 * largest, err_msg=name)
        skipped = {name for name, p in parameters.items() if p.grad is None and not p.stop_gradient}
        assert bool(skipped) == (weight == 0) and model.has_unused_parameters
        assert len(skipped) in (0, 6 * len(model.removal.prune_layers))


def test_stochastic_depth_of_both_flavours():
    expected = golden('lambda_vit-schedules')
    rates = {
        ramp: [b.drop_path.rate for b in tiny(depth=12, drop_path_rate=0.1, drop_path_ramp=ramp).blocks]
        for ramp in (0, 1)
    }
    assert_close(rates[0], expected['out/drop_path_v4'], 1e-6)
    assert_close(rates[1], expected['out/drop_path_timm3'], 1e-6)


def test_the_kept_part_of_the_input_is_never_dropped():
    """With all branches dropped, (2 - λ) x is left."""
    block = Block(8, Attention(8, 2), drop_path_rate=0.999)
    block.train()
    x = paddle.randn([4, 3, 8])
    paddle.seed(0)
    for weight in (1.0, 0.25, 0.0):
        block.set_attn_weight(weight)
        state = TokenState(1, x.shape[1] - 1)
        y = block._mix(x, state, Recorder(()))[0] if weight else block.identity_weight * x
        np.testing.assert_allclose(y, (2 - weight) * x)


def test_dropout_of_both_flavours():
    timm3, v4 = tiny(drop_rate=0.5), tiny(head_drop_rate=0.5)
    for model in (timm3, v4):
        model.train()
    features = v4.forward_features(IMAGES)
    np.testing.assert_array_equal(features, v4.forward_features(IMAGES))
    assert not np.array_equal(v4.forward_head(features), v4.forward_head(features))
    np.testing.assert_array_equal(timm3.forward_head(features), timm3.forward_head(features))
    assert not np.array_equal(timm3.embed(IMAGES), timm3.embed(IMAGES))
    v4.eval()
    np.testing.assert_array_equal(v4.forward_head(features), v4.forward_head(features))


def test_positions_of_another_resolution():
    g = golden('lambda_vit-pos_interp')
    for grid in (4, 6):
        model = tiny(img_size=8 * grid, embed_dim=8, num_heads=1, depth=1)
        assert_close(model.weight_rules.resize(model, 'pos_embed', g['in/pos_embed']), g[f'out/pos_{grid}'], 1e-5)


# ---------------------------------------------------------------------------------------------------- λ and weights
def test_weights_bring_their_lambda():
    trained, fresh = tiny(prune_layers=[0, 2]), tiny(prune_layers=[0, 2])
    trained.set_attn_lambda(0.25)
    state = numpy_state(trained)
    assert state['attn_lambda'].tolist() == [0.25, 1, 0.25]
    for method in (fresh.set_state_dict, fresh.load_dict, fresh.set_dict):
        fresh.set_attn_lambda(1.0)
        method(state)
        np.testing.assert_array_equal(fresh(IMAGES), trained(IMAGES))
    lines = []
    load_state(fresh, {name: array for name, array in state.items() if name != 'attn_lambda'}, log=lines.append)
    assert any('has no attn_lambda' in line for line in lines)
    half = tiny(prune_layers=[0]).to(dtype='float16')  # as AMP_LEVEL O2 does
    half.set_attn_lambda(0.5)
    assert half.attn_lambda.tolist() == [0.5, 1, 1]
    assert 'attn_lambda' not in tiny().state_dict() and 'attn_lambda' not in tiny(removed_layers=[0]).state_dict()


def test_finished_weights_lose_their_attention():
    trained = tiny(prune_layers=[0, 2])
    trained.set_attn_lambda(0.0)
    small, lines = tiny(removed_layers=[0, 2]), []
    load_state(small, numpy_state(trained), log=lines.append)
    assert any('13 arrays' in line and 'block 0 has no attention' in line for line in lines)
    for model in (trained, small):
        model.eval()
    np.testing.assert_array_equal(small(IMAGES), trained(IMAGES))


def test_layer_scale_goes_with_its_attention():
    trained, small = tiny(prune_layers=[0], layer_scale=0.5), tiny(removed_layers=[0], layer_scale=0.5)
    trained.set_attn_lambda(0.0)
    load_state(small, numpy_state(trained), log=lambda line: None)
    assert set(numpy_state(trained)) - set(numpy_state(small)) >= {'blocks.0.gamma_1', 'blocks.0.norm1.bias'}
    small(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    for model in (trained, small):
        model.eval()
    np.testing.assert_array_equal(small(IMAGES), trained(IMAGES))


@pytest.mark.parametrize(
    ('target', 'weight', 'words'),
    [
        ({'removed_layers': [0, 2]}, 0.5, r'block 0 has the weight 0.5, but in the model 0; .* finish it'),
        ({'removed_layers': [0]}, 0.0, 'block 2 has the weight 0, but in the model 1'),
        ({'removed_layers': [0, 1, 2]}, 0.0, 'block 1 has the weight 1, but in the model 0'),
        ({}, 0.0, 'block 0 has the weight 0, but in the model 1'),
        ({'prune_layers': [0]}, 0.0, 'block 2 has the weight 0, but in the model 1'),
        ({'done_layers': [0, 2]}, 0.5, 'block 0 has the weight 0.5'),
    ],
)
def test_a_wrong_list_of_layers_is_noticed(target, weight, words):
    trained = tiny(prune_layers=[0, 2])
    trained.set_attn_lambda(weight)
    model = tiny(**target)
    before = numpy_state(model)
    with pytest.raises(UserError, match=words):
        load_state(model, numpy_state(trained), source='the file')
    for name, value in numpy_state(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_training_in_stages():
    """Blocks whose λ decayed to 0 are `done` in the next training, with or without their unused weights."""
    first = tiny(prune_layers=[0])
    first.set_attn_lambda(0.0)
    state = numpy_state(first)
    outputs = []
    for second in (tiny(prune_layers=[2], done_layers=[0]), tiny(prune_layers=[2], removed_layers=[0])):
        load_state(second, state, log=lambda line: None)
        second.set_attn_lambda(0.5)
        second.eval()
        outputs.append(second(IMAGES).numpy())
    np.testing.assert_array_equal(*outputs)
    dead = [name for name, parameter in tiny(done_layers=[1]).named_parameters() if parameter.stop_gradient]
    assert len(dead) == 6 and all(name.startswith(('blocks.1.norm1.', 'blocks.1.attn.')) for name in dead)


def test_mistakes():
    with pytest.raises(UserError, match='block 3, but there are blocks 0 to 2'):
        tiny(prune_layers=[3])
    with pytest.raises(UserError, match='block 1 is built without attention'):
        tiny(prune_layers=[0, 1], removed_layers=[1])
    with pytest.raises(UserError, match='names block 1, whose attention MODEL.LAMBDA removes'):
        create_model(
            'deit_tiny_patch16_224',
            opts=['MODEL.LAMBDA.PRUNE_LAYERS', (1,), 'MODEL.EVIT.DROP_LOC', (1,), 'MODEL.EVIT.KEEP_RATE', 0.5],
        )
    with pytest.raises(UserError, match='block 12 .FROZEN_STAGES'):
        create_model('deit_tiny_patch16_224', opts=['MODEL.TRANS.FROZEN_STAGES', 12])


# ---------------------------------------------------------------------------------------------------- frozen stages
@pytest.mark.parametrize('recompute', [False, True])
def test_frozen_stages(recompute):
    model = tiny(drop_rate=0.5, drop_path_rate=0.5)
    model.freeze_stages(1)
    model.set_grad_checkpointing(recompute)
    for _ in range(2):
        model.train()
        frozen = {name for name, layer in model.named_sublayers() if not layer.training}
        assert {'patch_embed', 'pos_drop', 'blocks.0', 'blocks.1', 'blocks.1.mlp.drop'} <= frozen
        assert model.training and model.blocks[2].training and model.blocks[2].mlp.drop.training
    model(IMAGES).sum().backward()
    learnt = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learnt == {name for name in model.state_dict() if name.startswith(('blocks.2.', 'norm.', 'head.'))}
    assert all(not layer.training for layer in (model.eval(), model)[1].sublayers())


# ---------------------------------------------------------------------------------------------------- combinations
def test_evit_tome_and_removal_in_one_model():
    """λ = 0 and no attention layer give the same outputs, also with other token reducers."""
    options = {'depth': 5, 'keep_rate': [1, 1, 0.75, 1, 1], 'fuse_token': True}
    trained, small = tiny(prune_layers=[0, 3], **options), tiny(removed_layers=[0, 3], **options)
    trained.set_attn_lambda(0.0)
    load_state(small, numpy_state(trained), log=lambda line: None)
    for model in (trained, small):
        model.merge_tokens([2, 3, 1], start=1)
        model.eval()
    np.testing.assert_array_equal(trained(IMAGES), small(IMAGES))
    assert small.forward_tokens(IMAGES)[1].counts == (16, 16, 12 + 1 - 2, 11, 11 - 3)
    trained.set_attn_lambda(0.5)
    assert trained.forward_tokens(IMAGES)[1].counts == (16, 16, 11, 11, 8)
    small.merge_tokens(0)
    assert small.forward_tokens(IMAGES, tokens=6)[1].counts == (16, 7, 7, 7, 7)  # without attention none can be chosen


def test_configuration():
    options = ['MODEL.LAMBDA.PRUNE_LAYERS', (1, 3), 'MODEL.LAMBDA.DONE_LAYERS', (0,)]
    from models import build_model

    trained = build_model(small_config('deit_tiny_patch16_224', *options)).removal
    assert (trained.prune_layers, trained.done_layers, trained.removed_layers) == ((1, 3), (0,), ())
    small = build_model(small_config('deit_tiny_patch16_224', *options, 'MODEL.LAMBDA.REMOVED', True)).removal
    assert (small.prune_layers, small.done_layers, small.removed_layers) == ((), (), (0, 1, 3))
