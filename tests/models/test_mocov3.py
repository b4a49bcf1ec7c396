# SPDX-License-Identifier: Apache-2.0
"""MoCo-v3 against reference values of MAE-Lite."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import nn

import utils.device
from models import build_model, mocov3
from models.layers import SyncBatchNorm, moco_position_table, sincos_position_table
from models.mocov3 import MoCoV3
from models.paddle_private import average_all
from models.weights.convert import port_with_report
from models.weights.load import load_state
from tests.conftest import assert_close, golden
from tests.models.helpers import images, small_config, vision_transformer
from utils.errors import UserError
from utils.weights import METADATA, find_state_dict

TINY = {'img_size': 32, 'patch_size': 8, 'embed_dim': 24, 'depth': 2, 'num_heads': 3}


def tiny(**changes) -> MoCoV3:
    return MoCoV3(**{'dim': 8, 'mlp_dim': 16, **TINY, **changes})


def of_golden(g) -> MoCoV3:
    """The model of a reference file with its weights, which upstream's names and layouts describe."""
    config = g.meta['config']
    names = ('img_size', 'embed_dim', 'depth', 'num_heads', 'dim', 'mlp_dim')
    model = MoCoV3(**{name: config[name] for name in names}, freeze_patch=config['stop_grad_conv1'])
    state, report = port_with_report(model, g.group('sd'))
    assert set(report.dropped.values()) <= {'a counter, which Paddle does not keep'}
    model.set_state_dict(state)
    return model


def arrays(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------------- parts
def test_position_tables():
    g = golden('mocov3-sincos')
    for rows, columns, dim in ((3, 3, 8), (2, 4, 16), (5, 3, 12), (14, 14, 192)):
        table = moco_position_table(dim, (rows, columns), 1)
        assert_close(
            table.reshape(g[f'out/pos_embed_{rows}x{columns}_{dim}'].shape),
            g[f'out/pos_embed_{rows}x{columns}_{dim}'],
            1e-6,
        )
    with pytest.raises(UserError, match='30 channels do not divide by 4'):
        moco_position_table(30, (4, 4))


def test_the_table_is_that_of_mae_transposed():
    table = moco_position_table(16, (5, 5)).reshape([5, 5, 16])
    np.testing.assert_allclose(table, sincos_position_table(16, 5).reshape([5, 5, 16]).swapaxes(0, 1), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(2, 9), mean=st.floats(-5, 5), seed=st.integers(0, 99))
def test_batch_normalization(batch, mean, seed):
    """Training normalizes by the biased variance; evaluation uses running statistics with the unbiased variance."""
    rng = np.random.default_rng(seed)
    x = (mean + rng.standard_normal([2, batch, 6])).astype('float32')
    norm = SyncBatchNorm(6)
    norm.weight.set_value(rng.standard_normal(6).astype('float32'))
    running_mean, running_var = np.zeros(6), np.ones(6)
    for values in x:
        expected = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5) * norm.weight.numpy()
        np.testing.assert_allclose(norm(paddle.to_tensor(values)), expected, atol=2e-4)
        running_mean = 0.9 * running_mean + 0.1 * values.mean(0)
        running_var = 0.9 * running_var + 0.1 * values.var(0, ddof=1)
    np.testing.assert_allclose(norm._mean, running_mean, atol=1e-4)
    np.testing.assert_allclose(norm._variance, running_var, rtol=1e-4)
    norm.eval()
    expected = (x[0] - running_mean) / np.sqrt(running_var + 1e-5) * norm.weight.numpy()
    np.testing.assert_allclose(norm(paddle.to_tensor(x[0])), expected, atol=1e-3)


def test_batch_normalization_differentiates_as_paddles_does():
    x = paddle.randn([7, 5]) * 2 + 1
    weights = paddle.randn([7, 5])
    gradients = []
    for norm in (SyncBatchNorm(5), nn.BatchNorm1D(5)):
        mine = x.clone().detach()
        mine.stop_gradient = False
        (norm(mine) * weights).sum().backward()
        gradients.append([mine.grad, norm.weight.grad, norm.bias.grad])
    for ours, theirs in zip(*gradients):
        assert_close(ours, theirs, 1e-5)
    assert set(SyncBatchNorm(5).state_dict()) == set(nn.BatchNorm1D(5).state_dict())
    assert set(SyncBatchNorm(5, affine=False).state_dict()) == {'_mean', '_variance'}


def test_batch_normalization_computes_in_float32():
    norm = SyncBatchNorm(3)
    x = (paddle.randn([4, 3]) * 1e-2 + 100).astype('float16')
    assert norm(x).dtype == paddle.float16
    assert norm._mean.dtype == paddle.float32
    assert_close(norm._mean, 0.1 * x.astype('float64').mean(0).numpy(), 1e-6)
    norm(paddle.ones([1, 3]))  # a batch of one has no unbiased variance
    assert np.isfinite(norm._variance.numpy()).all()


# ---------------------------------------------------------------------------------------------------- the model
def test_initialization():
    paddle.seed(0)
    model = tiny(embed_dim=192, mlp_dim=96)
    bounds = {'qkv.weight': (6 / 384) ** 0.5, 'patch_embed.proj.weight': (6 / (3 * 64 + 192)) ** 0.5}
    for name, parameter in model.named_parameters():
        values, last = parameter.numpy(), name.rpartition('.')[2]
        if name.endswith('pos_embed'):
            np.testing.assert_array_equal(values, moco_position_table(192, (4, 4), 1))
        elif name.endswith('cls_token'):
            assert values.std() == pytest.approx(1e-6, rel=0.3), name
        elif values.ndim == 1:
            assert np.unique(values).tolist() == [float(last == 'weight')], name
        else:
            bound = next((bound for end, bound in bounds.items() if name.endswith(end)), None)
            head = name.startswith('predictor') or '.head.' in name
            bound = bound or (values.shape[0] ** -0.5 if head else (6 / sum(values.shape)) ** 0.5)
            assert 0.97 * bound < np.abs(values).max() <= bound, name


def test_what_is_trained():
    model = tiny()
    ours, theirs = arrays(model.base_encoder), arrays(model.momentum_encoder)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    trained = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    assert not any(name.startswith('momentum_encoder.') for name in trained)
    assert {'base_encoder.cls_token', 'base_encoder.patch_embed.proj.bias', 'predictor.0.weight'} <= trained
    assert 'base_encoder.pos_embed' not in trained
    frozen = {name for name, parameter in tiny(freeze_patch=True).named_parameters() if not parameter.stop_gradient}
    assert trained - frozen == {'base_encoder.patch_embed.proj.weight', 'base_encoder.patch_embed.proj.bias'}


def test_the_momentum_encoder_of_a_gpu_takes_the_same_steps(monkeypatch):
    """Of one operation for all tensors, several of which have the same shape; the base encoder does not change."""
    paddle.seed(0)
    model, calls, results = tiny(), [], []
    for parameter in model.base_encoder.parameters():
        parameter.set_value(paddle.randn(parameter.shape))
    start, base = (
        [value.clone() for value in encoder.parameters()] for encoder in (model.momentum_encoder, model.base_encoder)
    )
    monkeypatch.setattr(mocov3, 'average_all', lambda *args: (calls.append(1), average_all(*args)))
    for on_gpu in (False, True):
        monkeypatch.setattr(utils.device, 'on_gpu', lambda on_gpu=on_gpu: on_gpu)
        for average, value in zip(model.momentum_encoder.parameters(), start):
            average.set_value(value)
        with paddle.no_grad():
            for momentum in (0.99, 0.5):
                model._update_momentum_encoder(momentum)
        results.append([average.numpy() for average in model.momentum_encoder.parameters()])
    for expected, found in zip(*results):
        np.testing.assert_allclose(found, expected, 1e-6, 1e-7)
    assert len(calls) == 2 and all(np.array_equal(*pair) for pair in zip(base, model.base_encoder.parameters()))


def test_the_momentum_encoder_takes_one_step_per_setting():
    paddle.seed(0)
    model, views = tiny(), paddle.randn([4, 2, 3, 32, 32])
    for parameter in model.base_encoder.parameters():
        parameter.set_value(parameter + 0.1)
    start = [parameter.numpy() for parameter in model.momentum_encoder.parameters()]
    statistics = model.momentum_encoder.head[1]._mean

    def moved() -> float:
        ends = [parameter.numpy() for parameter in model.momentum_encoder.parameters()]
        (share,) = {round(float((end - begin).mean()), 4) for begin, end in zip(start, ends)}
        return share

    model(views)
    assert moved() == 0
    model.set_momentum(0.75)
    model.eval()
    before = statistics.numpy()
    model(views)
    model(views[:, 0])
    assert moved() == 0 and np.array_equal(statistics.numpy(), before)
    model.train()
    for _ in range(2):
        model(views)
        assert moved() == 0.025
    assert not np.array_equal(statistics.numpy(), before)


def test_keys_have_no_gradient_and_queries_have():
    output = tiny()(paddle.randn([4, 2, 3, 32, 32]))
    assert [part.stop_gradient for part in output] == [False, False, True, True]
    assert [part.shape for part in output] == [[4, 8]] * 4


def test_recompute_changes_nothing():
    paddle.seed(0)
    plain, again = tiny(), tiny()
    again.set_grad_checkpointing()
    again.set_state_dict(plain.state_dict())
    views = paddle.randn([4, 2, 3, 32, 32])
    for model in (plain, again):
        sum(part.square().sum() for part in model(views)[:2]).backward()
    for (name, parameter), other in zip(plain.named_parameters(), again.parameters()):
        assert (parameter.grad is None) == name.startswith(('momentum_encoder.', 'base_encoder.pos_embed')), name
        if parameter.grad is not None:
            assert_close(other.grad, parameter.grad, 1e-5)
    assert all(np.array_equal(value, arrays(again)[name]) for name, value in arrays(plain).items())


def test_the_contract_of_all_models():
    config = small_config('mocov3_tiny_patch16_224')
    model, x = build_model(config), images(config)
    model.eval()
    np.testing.assert_array_equal(model(x), model.forward_head(model.forward_features(x)))
    assert model(x).shape == [2, 8]
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == [2, 24]
    assert {model.layer_id(name) for name in model.state_dict()} == set(range(model.num_layers + 1))
    assert model.num_classes == 0
    with pytest.raises(UserError, match='fine-tune a MODEL.TYPE vit from its weights'):
        model.reset_classifier(10)
    with pytest.raises(UserError, match='MODEL.TOME.R is 2, but has no effect for MODEL.TYPE mocov3'):
        small_config('mocov3_tiny_patch16_224', 'MODEL.TOME.R', 2)


def test_other_image_sizes():
    small, large = tiny(), tiny(img_size=48)
    state = arrays(small)
    load_state(large, state)
    np.testing.assert_array_equal(large.momentum_encoder.pos_embed, moco_position_table(24, (6, 6), 1))


# ---------------------------------------------------------------------------------------------------- fine-tuning
CASES = [(pooled, parallel) for pooled in (False, True) for parallel in (False, True)]


@pytest.mark.parametrize('pooled, parallel', CASES)
def test_mae_lites_checkpoints_start_a_classifier(pooled, parallel):
    """Convert the file under its own configuration, then load the same arrays as the original."""
    g = golden('mocov3-ckptmap')
    config, expected = g.meta['config'], g.meta['result'][f'global_pool={pooled},ddp={parallel}']
    rng, prefix = np.random.default_rng(0), 'module.' if parallel else ''
    stored = {
        prefix + name: np.array(7) if not shape else rng.standard_normal(shape).astype('float32')
        for name, shape in zip(g.meta['pretrain_keys'], g.meta['pretrain_shapes'])
    }
    sizes = {name: config[name] for name in ('img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads')}
    moco = MoCoV3(config['dim'], config['mlp_dim'], **sizes)
    ported, _ = port_with_report(moco, find_state_dict({'model': stored, 'start_epoch': 3}))
    assert set(ported) == set(moco.state_dict())

    vit, lines = vision_transformer(**sizes, num_classes=5, global_pool=pooled), []
    before = arrays(vit)
    load_state(vit, ported, log=lines.append)
    after = arrays(vit)
    missing = {name.removeprefix('model.') for name in expected['missing']}
    assert {name for name in after if np.array_equal(after[name], before[name])} == missing
    for name in set(after) - missing:
        np.testing.assert_array_equal(after[name], ported[f'base_encoder.{name}'])
    report = '\n'.join(lines)
    assert f'{expected["loaded"]} arrays of the state dict are used' in report
    assert 'only pre-training uses them' in report
    assert ('the model normalizes after pooling' in report) == pooled
    assert not vit.pos_embed.stop_gradient


def test_upstream_files_become_an_encoder_too():
    """Converted for a Vision Transformer without classifier, they give the features of the trained encoder."""
    g = golden('mocov3-tworank')
    moco = of_golden(g)
    config = g.meta['config']
    sizes = {name: config[name] for name in ('img_size', 'embed_dim', 'depth', 'num_heads')}
    vit = vision_transformer(**sizes, num_classes=0)
    state, report = port_with_report(
        vit, find_state_dict({'state_dict': {f'module.{n}': a for n, a in g.group('sd').items()}})
    )
    vit.set_state_dict(state)
    vit.eval()
    moco.eval()
    x = paddle.to_tensor(g['in/x1_rank0'])
    np.testing.assert_array_equal(vit(x), moco.forward_head(moco.forward_features(x), pre_logits=True))
    assert {name.partition('.')[0] for name in report.used} == {'base_encoder'}
    assert 'momentum_encoder.cls_token' in report.dropped and 'predictor.0.weight' in report.dropped


def test_the_number_of_heads_must_be_that_of_the_pre_training():
    moco = tiny()
    vit = vision_transformer(**{**TINY, 'num_heads': 6}, num_classes=5)
    with pytest.raises(UserError, match='trained with MODEL.TRANS.NUM_HEADS 3, but the model has 6'):
        load_state(vit, {**arrays(moco), METADATA: moco.weight_rules.metadata(moco)})


def test_a_classifier_is_not_evaluated_on_pre_trained_weights():
    with pytest.raises(UserError, match='no classifier'):
        load_state(vision_transformer(**TINY, num_classes=5), arrays(tiny()), replace_head=False)
