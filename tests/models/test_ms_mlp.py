# SPDX-License-Identifier: Apache-2.0
"""MS-MLP against the published code's numbers."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import get_config
from engine.learning_rate import lr_scale, lr_schedule
from engine.optim import parameter_groups
from engine.precision import Precision
from engine.update import Updater
from models import build_model, create_model
from models.ms_mlp import MSMLP, MixShiftBlock, shifted_conv, shifted_conv_as_products, split_channels
from models.profile import profile
from models.registry import config_file
from models.weights.convert import port_with_report
from tests.conftest import assert_close, golden
from tests.models.helpers import check_recompute, load, to_ours
from tests.tasks.helpers import ALONE
from utils.errors import UserError
from utils.weights import find_state_dict


def name_of(variant: str) -> str:
    return f'ms_mlp_{variant}_patch4_shift5_224'


ORIGINAL = {'drop_path_rate': 0.0, 'drop_path_ramp': True}  # defaults of the original program


def build(kwargs: dict) -> MSMLP:
    """From upstream's arguments: its image size is only checked, its number of groups is that of the distances."""
    kwargs = {key: value for key, value in kwargs.items() if key not in ('img_size', 'shift_size')}
    return MSMLP(**{**ORIGINAL, **kwargs})


def toy(**changes) -> MSMLP:
    groups = {'shift_dist': [-1, 0, 2], 'mix_size': [[1, 3, 5], [3, 1, 7]]}
    return MSMLP(**{**ORIGINAL, 'num_classes': 5, 'embed_dim': 8, 'depths': [1, 2], **groups, **changes})


def to_nchw(x: paddle.Tensor) -> np.ndarray:
    return x.transpose([0, 3, 1, 2]).numpy()


def convolve(way: str, x: np.ndarray, weight: np.ndarray, shift: tuple) -> np.ndarray:
    """[B, C, H, W] through one of the two formulations."""
    x, weight = paddle.to_tensor(x.astype('float32')), paddle.to_tensor(weight)
    if way == 'convolution':
        return shifted_conv(x, weight, shift).numpy()
    x = x.transpose([1, 0, 2, 3])
    return shifted_conv_as_products(x, weight, shift).transpose([1, 0, 2, 3]).numpy()


# ---------------------------------------------------------------------------------------------------- mixing
@pytest.mark.parametrize('way', ['convolution', 'products'])
def test_shifts_and_kernels(way):
    g = golden('ms_mlp-shift')
    one = np.ones((1, 1, 1, 1), 'float32')
    checked = 0
    for height, width in g.meta['sizes']:
        for s in g.meta['shifts']:
            x = g[f'in/x_{height}x{width}']
            np.testing.assert_array_equal(convolve(way, x, one, (0, s)), g[f'out/rollW_{height}x{width}_{s}'])
            np.testing.assert_array_equal(convolve(way, x, one, (s, 0)), g[f'out/rollH_{height}x{width}_{s}'])
            checked += 1
    for name, expected in g.group('out').items():
        if name.startswith('dw_k'):
            kernel, _, s = name[len('dw_k') :].partition('_roll')
            shift = (0, int(s[1:])) if s[0] == 'W' else (int(s[1:]), 0)
            actual = convolve(way, g['in/dw_x'], g[f'in/dw_w{kernel}'], shift)
            np.testing.assert_allclose(
                actual + g[f'in/dw_b{kernel}'].reshape(-1, 1, 1), expected, 0, 1e-5, err_msg=name
            )
            checked += 1
    assert checked > 40


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3, 5, 7]), st.integers(-9, 9),
    st.integers(-9, 9), st.integers(0, 99),
)  # fmt: skip
def test_both_formulations_are_one_function(dim, height, width, kernel, down, right, seed):
    rng = np.random.default_rng(seed)
    x = paddle.to_tensor(rng.standard_normal((2, dim, height, width)), stop_gradient=False)
    weight = paddle.to_tensor(rng.standard_normal((dim, 1, kernel, kernel)), stop_gradient=False)
    dy = paddle.to_tensor(rng.standard_normal(x.shape))
    results = []
    for products in (False, True):
        if products:
            y = shifted_conv_as_products(x.transpose([1, 0, 2, 3]), weight, (down, right)).transpose([1, 0, 2, 3])
        else:
            y = shifted_conv(x, weight, (down, right))
        y.backward(dy)
        results.append([y.numpy(), x.grad.numpy(), weight.grad.numpy()])
        x.clear_gradient()
        weight.clear_gradient()
    for convolved, multiplied in zip(*results):
        np.testing.assert_allclose(multiplied, convolved, 1e-10, 1e-10)


def test_channel_groups():
    g = golden('ms_mlp-shift')
    for i, dim in enumerate(g.meta['dims']):
        for j, groups in enumerate(g.meta['groups']):
            if g['out/group_count_ok'][i, j]:
                assert split_channels(dim, groups) == [c for c in g['out/group_channels'][i, j] if c >= 0]
            else:
                with pytest.raises(UserError, match=f'{dim} channels .* has {groups} shifts'):
                    split_channels(dim, groups)


def test_block():
    g = golden('ms_mlp-block')
    kwargs = g.meta['kwargs']
    block = MixShiftBlock(kwargs['dim'], kwargs['shift_dist'], kwargs['mix_size'], kwargs['mlp_ratio'])
    load(block, g.group('sd')).eval()
    assert block.group_dims == g.meta['group_channels']
    for i in range(len(g.meta['sizes'])):
        x = paddle.to_tensor(g[f'in/s{i}_x'].transpose(0, 2, 3, 1))
        mixed = block.mix(x)
        np.testing.assert_allclose(mixed, g[f'out/s{i}_sum_nhwc'], 1e-4, 1e-5)
        z = block.norm(mixed)
        np.testing.assert_allclose(z, g[f'out/s{i}_norm_nhwc'], 1e-4, 1e-5)
        z = block.pwconv2(block.act(block.pwconv1(z)))
        np.testing.assert_allclose(z, g[f'out/s{i}_mlp_nhwc'], 1e-4, 1e-5)
        np.testing.assert_allclose(to_nchw(block(x)), g[f'out/s{i}_y'], 1e-4, 1e-5)


# ---------------------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize('name', ['fwd_odd', 'fwd_alt'])
def test_forward(name):
    g = golden(f'ms_mlp-{name}')
    model = load(build(g.meta['kwargs']), g.group('sd'))
    model.eval()
    x = model.patch_embed(paddle.to_tensor(g['in/x']))
    np.testing.assert_allclose(to_nchw(x), g['out/patch_embed'], 1e-5, 3e-5)
    for i, stage in enumerate(model.layers):
        x = stage(x)
        np.testing.assert_allclose(to_nchw(x), g[f'out/stage{i}'], 1e-5, 3e-5)
    np.testing.assert_allclose(x.mean([1, 2]), g['out/pooled'], 1e-5, 3e-5)
    np.testing.assert_allclose(model.forward_head(x, pre_logits=True), g['out/features'], 1e-5, 3e-5)
    np.testing.assert_allclose(model(paddle.to_tensor(g['in/x'])), g['out/logits'], 1e-5, 3e-5)


# What weight decay takes and what it leaves: tensors, parameters.
DECAYED = {'tiny': (221, 28_583_136), 'small': (437, 50_161_536), 'base': (437, 88_507_504)}
EXEMPT = {'tiny': (285, 73_096), 'small': (555, 142_216), 'base': (555, 189_288)}


@pytest.mark.parametrize('variant', ['tiny', 'small', 'base'])
def test_published_models(variant):
    g = golden('ms_mlp-names')
    parameters = [(name, tuple(shape)) for name, shape in g.meta['variants'][variant]['params']]
    model = create_model(name_of(variant))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert [(name, array.shape) for name, array in to_ours(model, state).items()] == parameters
    rates = [block.drop_path.rate for stage in model.layers for block in stage.blocks]
    np.testing.assert_allclose(rates, g[f'out/drop_path_{variant}'], 1e-6)
    groups = {group['weight_decay']: group['params'] for group in parameter_groups(model, 0.05)}
    sizes = {decay: (len(members), sum(p.size for p in members)) for decay, members in groups.items()}
    assert sizes == {0.05: DECAYED[variant], 0.0: EXEMPT[variant]}
    if variant != 'small':
        check_outputs(model, parameters, variant)


def check_outputs(model: MSMLP, parameters: list, variant: str) -> None:
    """Outputs at 224 x 224 with the weights that the reference drew."""
    g = golden('ms_mlp-full')
    seed = g.meta['seed0']

    def draw(number, name, shape):
        r = np.random.RandomState(seed + number).standard_normal(shape)
        if name.endswith('gamma'):
            return 0.2 + 0.05 * r
        if name.endswith('norm.weight'):
            return 1 + 0.1 * r
        if name.endswith('bias'):
            return 0.1 * r
        return r / shape[-1] if 'dwconv' in name else 0.04 * r

    load(model, {name: draw(k, name, shape).astype('float32') for k, (name, shape) in enumerate(parameters)})
    model.eval()
    x = np.random.RandomState(seed - 1).standard_normal((1, 3, 224, 224)).astype('float32')
    with paddle.no_grad():
        x = model.patch_embed(paddle.to_tensor(x))
        for i, stage in enumerate(model.layers):
            x = stage(x)
            maps = to_nchw(x)
            assert_close(maps.mean((2, 3)), g[f'out/{variant}_stage{i}_channel_mean'])
            assert_close(maps[:, :8, :3, :3], g[f'out/{variant}_stage{i}_corner'])
        assert_close(model.forward_head(x, pre_logits=True), g[f'out/{variant}_features'])
        np.testing.assert_allclose(model.forward_head(x), g[f'out/{variant}_logits'], 0, 1e-4)


def test_initialization_and_cost():
    paddle.seed(0)
    model = create_model(name_of('tiny'))
    values = {name: value.numpy().astype('float64') for name, value in model.state_dict().items()}
    for name, rule in golden('ms_mlp-names').meta['init'].items():
        value = values.pop(name)
        if rule['kind'] == 'constant':
            assert (value == np.float32(rule['value'])).all(), name
        elif rule['kind'] == 'uniform':
            assert np.abs(value).max() <= rule['bound'] * (1 + 1e-6), name
            deviation = rule['bound'] / 3**0.5
            assert value.std() == pytest.approx(deviation, rel=6 * value.size**-0.5), name
        else:
            assert value.std() == pytest.approx(rule['std'], rel=6 * value.size**-0.5), name
            assert abs(value.mean()) < 5 * rule['std'] * value.size**-0.5, name
    assert not values
    stem, depthwise, perceptrons, downsampling, head = 14_450_688, 87_343_872, 4_161_798_144, 173_408_256, 768_000
    cost = profile(model)
    assert cost.params == 28_656_232
    assert cost.by_kind == {'conv': stem + depthwise + downsampling, 'linear': perceptrons + head, 'matmul': 0}


def test_published_checkpoints_port():
    g = golden('ms_mlp-fwd_alt')
    weights = {f'module.{name}': array for name, array in g.group('sd').items()}
    checkpoint = {'model': weights, 'optimizer': {}, 'max_accuracy': 82.1, 'epoch': 299, 'config': {'SEED': 0}}
    model = build(g.meta['kwargs'])
    state, report = port_with_report(model, find_state_dict(checkpoint))
    assert len(report.used) == len(weights)
    assert not report.dropped
    model.set_state_dict(state)
    model.eval()
    np.testing.assert_allclose(model(paddle.to_tensor(g['in/x'])), g['out/logits'], 1e-5, 3e-5)


# ---------------------------------------------------------------------------------------------------- training
def test_drop_path(monkeypatch):
    g = golden('ms_mlp-droppath')
    model = load(build(g.meta['kwargs']), g.group('sd'))
    x = paddle.to_tensor(g['in/x'])
    model.eval()
    np.testing.assert_allclose(model(x), g['out/logits_eval'], 1e-5, 3e-5)
    draws = iter(g['in/u'])
    monkeypatch.setattr(paddle, 'rand', lambda shape, dtype: paddle.to_tensor(next(draws).reshape(shape)))
    model.train()
    np.testing.assert_allclose(model(x), g['out/logits'], 1e-5, 3e-5)
    assert not list(draws)


def test_dropout_follows_the_patch_embedding():
    model = toy(drop_rate=1.0)
    x = paddle.randn([2, 3, 16, 16])
    np.testing.assert_array_equal(model(x)[0], model(x)[1])  # nothing of the image is left
    model.eval()
    assert not np.allclose(model(x)[0], model(x)[1])


def test_weight_decay_groups():
    g = golden('ms_mlp-wd')
    model = build(g.meta['kwargs'])
    (decayed,) = (group['params'] for group in parameter_groups(model, 0.05) if group['weight_decay'])
    decayed = {id(parameter) for parameter in decayed}
    flags = {name: int(id(parameter) in decayed) for name, parameter in model.named_parameters()}
    assert flags == dict(zip(g.meta['names'], g['out/flag'].tolist()))


@pytest.mark.parametrize('run', range(3))
def test_training_runs(run):
    """Upstream's loop: the rate is set after a step for the next one; micro-batch gradients are clipped as they add up."""
    g = golden('ms_mlp-train')
    case, n_iter = g.meta['settings'][run], g.meta['n_iter']
    end = case['base_lr'] / 100 if case['sched'] == 'linear' else case['min_lr']
    config = get_config(
        opts=[
            *('TRAIN.BASE_LR', case['base_lr'], 'TRAIN.WARMUP_START_LR', case['warmup_lr'], 'TRAIN.END_LR', end),
            *('TRAIN.LR_SCHEDULER.NAME', {'cosine': 'timmcosine'}.get(case['sched'], case['sched'])),
            *('TRAIN.LR_SCHEDULER.UPDATE', 'step', 'TRAIN.LINEAR_SCALED_LR', None),
            *('TRAIN.NUM_EPOCHS', case['epochs'], 'TRAIN.WARMUP_EPOCHS', case['warmup_epochs']),
            *('TRAIN.OPTIMIZER.NAME', case['opt'], 'TRAIN.OPTIMIZER.NESTEROV', g.meta['nesterov']),
            *('TRAIN.OPTIMIZER.EPS', case['eps'], 'TRAIN.WEIGHT_DECAY', case['weight_decay']),
            *(
                'TRAIN.GRAD_CLIP',
                case['clip_grad'],
                'TRAIN.MODEL_EMA',
                True,
                'TRAIN.MODEL_EMA_DECAY',
                case['ema_decay'],
            ),
        ]
    )
    model = load(build(g.meta['kwargs']), g.group('sd'))
    model.train()
    updater = Updater(config, model, Precision(config, on_gpu=False))
    rate, accumulate = lr_schedule(config, 1), max(case['accumulation_steps'], 1)
    if case['targets'] == 'soft':
        targets = paddle.to_tensor(g['in/y_soft'])
    else:
        smoothing = case['label_smoothing']
        targets = F.one_hot(paddle.to_tensor(g['in/y_hard']), 6) * (1 - smoothing) + smoothing / 6
    losses, norms, rates = [], [], []
    lr = rate(1, 0.0)
    for epoch in range(1, case['epochs'] + 1):
        updater.clear_gradients()
        for i in range(n_iter):
            loss = F.cross_entropy(model(paddle.to_tensor(g['in/x'][i])), targets[i], soft_label=True)
            updater.backward(loss / accumulate)
            losses.append(loss.item())
            last = (i + 1) % accumulate == 0
            norms.append((updater.clip if last else updater.clip_sum)(ALONE).item())
            if last:
                rates.append(lr)
                updater.step(lr)
                updater.clear_gradients()
                lr = rate(epoch, i / n_iter)
    np.testing.assert_allclose(losses, g[f'out/{run}_loss'], 1e-5)
    np.testing.assert_allclose(norms, g[f'out/{run}_grad_norm'], 2e-5)
    np.testing.assert_allclose(rates, g[f'out/{run}_step_lr'], 1e-6)
    state = model.state_dict()
    for name, expected in to_ours(model, g.group(f'out/{run}_final')).items():
        np.testing.assert_allclose(state[name], expected, 0, 5e-6, err_msg=name)
    for name, expected in to_ours(model, g.group(f'out/{run}_ema')).items():
        np.testing.assert_allclose(updater.ema.average[name], expected, 0, 5e-6, err_msg=name)


# Keys of the published program and what they are here.
KEYS = {
    'DATA.IMG_SIZE': 'DATA.IMAGE_SIZE', 'DATA.BATCH_SIZE': 'DATA.BATCH_SIZE', 'DATA.INTERPOLATION': 'DATA.INTERPOLATION',
    'MODEL.TYPE': 'MODEL.TYPE', 'MODEL.NAME': 'MODEL.NAME', 'MODEL.DROP_RATE': 'MODEL.DROPOUT',
    'MODEL.DROP_PATH_RATE': 'MODEL.DROPPATH', 'MODEL.LABEL_SMOOTHING': 'TRAIN.SMOOTHING',
    **{key: key for key in (f'MODEL.MSMLP.{name}' for name in (
        'PATCH_SIZE', 'EMBED_DIM', 'DEPTHS', 'SHIFT_DIST', 'MIX_SIZE', 'MLP_RATIO', 'PATCH_NORM'))},
    'MODEL.MSMLP.IN_CHANS': 'DATA.IMAGE_CHANNELS', 'TRAIN.EPOCHS': 'TRAIN.NUM_EPOCHS',
    'TRAIN.WARMUP_EPOCHS': 'TRAIN.WARMUP_EPOCHS', 'TRAIN.WEIGHT_DECAY': 'TRAIN.WEIGHT_DECAY',
    'TRAIN.BASE_LR': 'TRAIN.BASE_LR', 'TRAIN.WARMUP_LR': 'TRAIN.WARMUP_START_LR', 'TRAIN.MIN_LR': 'TRAIN.END_LR',
    'TRAIN.CLIP_GRAD': 'TRAIN.GRAD_CLIP', 'TRAIN.USE_CHECKPOINT': 'TRAIN.RECOMPUTE', 'model_ema': 'TRAIN.MODEL_EMA',
    'TRAIN.LR_SCHEDULER.DECAY_EPOCHS': 'TRAIN.LR_SCHEDULER.DECAY_EPOCHS',
    'TRAIN.LR_SCHEDULER.DECAY_RATE': 'TRAIN.LR_SCHEDULER.DECAY_RATE', 'TRAIN.OPTIMIZER.EPS': 'TRAIN.OPTIMIZER.EPS',
    'TRAIN.OPTIMIZER.BETAS': 'TRAIN.OPTIMIZER.BETAS', 'TRAIN.OPTIMIZER.MOMENTUM': 'TRAIN.OPTIMIZER.MOMENTUM',
    'AUG.COLOR_JITTER': 'TRAIN.COLOR_JITTER', 'AUG.REPROB': 'TRAIN.RANDOM_ERASE_PROB',
    'AUG.REMODE': 'TRAIN.RANDOM_ERASE_MODE', 'AUG.RECOUNT': 'TRAIN.RANDOM_ERASE_COUNT',
    'AUG.MIXUP': 'TRAIN.MIXUP_ALPHA', 'AUG.CUTMIX': 'TRAIN.CUTMIX_ALPHA', 'AUG.CUTMIX_MINMAX': 'TRAIN.CUTMIX_MINMAX',
    'AUG.MIXUP_PROB': 'TRAIN.MIXUP_PROB', 'AUG.MIXUP_SWITCH_PROB': 'TRAIN.MIXUP_SWITCH_PROB',
    'AUG.MIXUP_MODE': 'TRAIN.MIXUP_MODE',
}  # fmt: skip


@pytest.mark.parametrize('run', range(3))
def test_published_recipe(run):
    case = golden('ms_mlp-config').meta['runs'][run]
    theirs = case['effective']

    def look_up(tree, key):
        for part in key.split('.'):
            tree = tree[part]
        return list(tree) if isinstance(tree, tuple) else tree

    flags = [  # what the command line of this run changes
        [],
        [],
        [
            *('DATA.BATCH_SIZE', 32, 'TRAIN.NUM_EPOCHS', 100, 'TRAIN.WARMUP_EPOCHS', 5, 'TRAIN.GRAD_CLIP', None),
            *('TRAIN.RECOMPUTE', True),
        ],
    ]
    config = get_config(config_file(theirs['MODEL']['NAME']), flags[run])
    assert {ours: look_up(config, ours) for ours in KEYS.values()} == {
        ours: look_up(theirs, key) for key, ours in KEYS.items()
    }
    train = config.TRAIN
    assert max(theirs['TRAIN']['ACCUMULATION_STEPS'], 1) == train.ACCUM_ITER
    assert theirs['TEST']['CROP'] == (config.DATA.EVAL_CROP == 'center')
    assert train.RAND_AUGMENT and train.RAND_AUGMENT_SPACE == 'timm'
    assert (train.LR_SCHEDULER.NAME, train.LR_SCHEDULER.UPDATE) == ('timmcosine', 'step')
    scale = lr_scale(config, config.DATA.BATCH_SIZE * case['world'] * train.ACCUM_ITER)
    scaled = [value * scale for value in (train.BASE_LR, train.WARMUP_START_LR, train.END_LR)]
    np.testing.assert_allclose(scaled, [case['scaled'][key] for key in ('BASE_LR', 'WARMUP_LR', 'MIN_LR')], 1e-6)


def test_recompute_changes_nothing():
    x = paddle.randn([4, 3, 16, 16])
    model = toy(drop_path_rate=0.5)
    check_recompute(model, x)


# ---------------------------------------------------------------------------------------------------- uses and mistakes
def test_intermediates():
    """Maps of a stage are those before its projection."""
    model, x = toy(), paddle.randn([2, 3, 16, 24])
    model.eval()
    seen = model.forward_intermediates(x)
    np.testing.assert_array_equal(seen.features, model.forward_features(x))
    assert [maps.maps.shape for maps in seen.blocks.values()] == [[2, 8, 4, 6], [2, 16, 2, 3]]
    np.testing.assert_array_equal(to_nchw(seen.features), seen.blocks[1].maps)
    first = model.layers[0].blocks[0](model.patch_embed(x))
    np.testing.assert_array_equal(to_nchw(first), seen.blocks[0].maps)
    with pytest.raises(ValueError, match="no intermediates 'tokens'; choose from maps"):
        model.forward_intermediates(x, want=['tokens'])


def test_export_for_any_size(tmp_path):
    g = golden('ms_mlp-fwd_odd')
    model = load(build(g.meta['kwargs']), g.group('sd'))
    model.eval()
    spec = [paddle.static.InputSpec([None, 3, None, None], 'float32')]
    paddle.jit.save(paddle.jit.to_static(model, input_spec=spec, full_graph=True), str(tmp_path / 'model'))
    loaded = paddle.jit.load(str(tmp_path / 'model'))
    for batch in (1, 3):
        np.testing.assert_allclose(loaded(paddle.to_tensor(g['in/x'][:batch])), g['out/logits'][:batch], 1e-5, 3e-5)


def test_image_sizes():
    model = toy()
    model.eval()
    x = paddle.randn([1, 3, 19, 25])
    np.testing.assert_array_equal(model(x), model(x[:, :, :16, :24]))  # half a patch is no patch
    with pytest.raises(UserError, match='7x24 pixels is too small for 2 stages.*at least 8'):
        model(paddle.randn([1, 3, 7, 24]))
    with pytest.raises(UserError, match='16x16 pixels is too small for 4 stages'):
        build_model(get_config(config_file(name_of('tiny')), ['DATA.IMAGE_SIZE', 16]))


def test_stages_double_the_channels():
    model = toy(depths=[1, 1, 1], mix_size=[[1, 3, 5]] * 3, mlp_ratio=1.3)
    assert [stage.blocks[0].norm.weight.shape[0] for stage in model.layers] == [8, 16, 32]
    assert model.layers[1].blocks[0].pwconv1.weight.shape == [16, 20]  # int(1.3 * 16)
    assert model.layers[2].downsample is None
    assert model.forward_features(paddle.randn([2, 3, 32, 16])).shape == [2, 2, 1, 32]


def test_layer_ids():
    model = toy()
    ids = {name: model.layer_id(name) for name in model.state_dict()}
    assert ids['patch_embed.norm.bias'] == 0
    assert ids['layers.0.blocks.0.gamma'] == ids['layers.0.downsample.proj.weight'] == 1
    assert ids['layers.1.blocks.0.dwconv_td.2.weight'] == 2
    assert ids['layers.1.blocks.1.pwconv2.bias'] == 3
    assert ids['norm.weight'] == ids['head.bias'] == model.num_layers == 4


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'depths': [1, 2, 1]}, 'MIX_SIZE has 2 stages'),
        ({'depths': [1, 0]}, 'each stage needs a block'),
        ({'depths': []}, 'DEPTHS must be a list of whole numbers'),
        ({'shift_dist': [0, 1]}, 'stage 0 has 3 kernels for the 2 groups'),
        ({'mix_size': [[1, 3, 5], [1, 2, 5]]}, 'stage 1 is .* must be odd'),
        ({'mix_size': [1, 3]}, 'stage 0 must be a list of whole numbers, not 1'),
        ({'embed_dim': 4, 'shift_dist': [-1, 0, 1], 'mix_size': [[1, 1, 3]] * 2}, '4 channels .* make 2 groups'),
    ],
)
def test_groups_that_do_not_fit(changes, words):
    with pytest.raises(UserError, match=words):
        toy(**changes)
