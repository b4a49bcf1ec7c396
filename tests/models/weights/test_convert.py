# SPDX-License-Identifier: Apache-2.0
"""Published PyTorch weights in our models: complete, correctly transposed, and no array dropped silently."""

from __future__ import annotations

import os

import numpy as np
import paddle
import pytest
from paddle import nn

from models.base import Classifier
from models.gmlp import GMLP
from models.vision_transformer import VisionTransformer
from models.weights.convert import port_state_dict, port_with_report
from models.weights.rules import WeightRules
from tests.conftest import HERE, assert_close, golden
from tests.models.helpers import vision_transformer
from utils.errors import UserError
from utils.formats import read_file
from utils.weights import find_state_dict


def gmlp(name: str, **changes) -> tuple[GMLP, dict, dict]:
    """A fresh model of a golden's sizes, the golden, and its published weights."""
    reference = golden(name)
    sizes = {key: value for key, value in reference.meta['ctor'].items() if key != 'num_blocks'}
    model = GMLP(**{**sizes, 'depth': reference.meta['ctor']['num_blocks'], **changes})
    model.eval()
    return model, reference, reference.group('sd')


def logits(model: nn.Layer, state: dict, images: np.ndarray) -> np.ndarray:
    assert model.set_state_dict(state) == ([], [])
    with paddle.no_grad():
        return model(paddle.to_tensor(images)).numpy()


# ---------------------------------------------------------------------------------------------------- gMLP
@pytest.mark.parametrize('name', ['gmlp-fwd_a', 'gmlp-fwd_b'])
def test_the_ported_model_computes_what_the_original_did(name):
    model, reference, arrays = gmlp(name)
    state, report = port_with_report(model, arrays)
    assert set(report.used) == set(arrays)
    assert not report.dropped
    assert_close(logits(model, state, reference['in/x']), reference['out/logits'])


def test_square_weights_are_transposed_too():
    model, reference, arrays = gmlp('gmlp-fwd_a')
    state = port_state_dict(model, arrays)
    ours, theirs = 'mixer_layers.0.mlp_channels.gate.proj.weight', 'blocks.0.mlp_channels.gate.proj.weight'
    assert np.array_equal(state[ours], arrays[theirs].T)
    forgotten = {**state, ours: np.ascontiguousarray(arrays[theirs])}
    with pytest.raises(AssertionError, match='relative difference'):
        assert_close(logits(model, forgotten, reference['in/x']), reference['out/logits'])


def test_the_model_is_left_alone_and_arrays_are_contiguous():
    model, _, arrays = gmlp('gmlp-fwd_a')
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    state = port_state_dict(model, arrays)
    assert all(np.array_equal(value.numpy(), before[name]) for name, value in model.state_dict().items())
    assert all(array.flags.c_contiguous and array.dtype == np.float32 for array in state.values())


@pytest.mark.parametrize('wrapper', ['module.', '_layers.'])
def test_wrapped_checkpoints(wrapper):
    model, _, arrays = gmlp('gmlp-fwd_a')
    content = {'epoch': 3, 'state_dict': {wrapper + name: array for name, array in arrays.items()}}
    state = port_state_dict(model, find_state_dict(content))
    assert all(np.array_equal(state[name], array) for name, array in port_state_dict(model, arrays).items())


def test_arrays_of_paddle_keep_names_and_layout():
    model, _, arrays = gmlp('gmlp-fwd_a')
    ours = port_state_dict(model, arrays)
    again = port_state_dict(model, ours, own_names=True)
    assert list(again) == list(model.state_dict())
    assert all(np.array_equal(again[name], ours[name]) for name in ours)
    with pytest.raises(UserError, match=r'stem\.proj\.weight \[32, 3, 16, 16\]'):
        port_state_dict(model, arrays, own_names=True)
    with pytest.raises(UserError, match=r'fc1\.weight \[192, 32\] instead of \[32, 192\]'):
        port_state_dict(model, ours)  # Paddle's weights taken for PyTorch's


def test_every_kind_of_misfit_is_listed_with_shapes():
    model, _, arrays = gmlp('gmlp-fwd_a')
    arrays['extra.weight'] = np.ones((3, 4), 'float32')
    arrays['norm.bias'] = np.ones(5, 'float32')
    arrays['blocks.0.norm.weight'] = arrays['blocks.0.norm.weight'].astype('int64')
    del arrays['stem.proj.bias']
    with pytest.raises(UserError) as info:
        port_state_dict(model, arrays, source="'x.pth'")
    assert str(info.value) == (
        "'x.pth' does not fit GMLP: 1 in the file without a place in the model (extra.weight [3, 4]); "
        '1 in the model without weights in the file (patch_embed.patch_embed.bias [32]); '
        '2 of another shape or type (mixer_layers.0.norm.weight int64 instead of float32, norm.bias [5] instead of [32]).'
    )


def test_long_lists_are_cut():
    model, _, arrays = gmlp('gmlp-fwd_a')
    with pytest.raises(UserError, match=r'36 in the file without a place .*, and 28 more\)') as info:
        port_state_dict(model, {f'x.{name}': array for name, array in arrays.items()})
    assert len(str(info.value)) < 2000


def test_another_image_size_or_class_count_is_an_error():
    model, _, arrays = gmlp('gmlp-fwd_a', img_size=48)
    with pytest.raises(UserError, match=r'gate\.proj\.weight \[16, 16\] instead of \[9, 9\]'):
        port_state_dict(model, arrays)
    model, _, arrays = gmlp('gmlp-fwd_a', num_classes=7)
    with pytest.raises(UserError, match='has 10 classes, but the model 7; set MODEL.NUM_CLASSES to 10'):
        port_state_dict(model, arrays)


def test_two_names_for_one_parameter():
    model, _, arrays = gmlp('gmlp-fwd_a')
    arrays['patch_embed.patch_embed.bias'] = arrays['stem.proj.bias']
    with pytest.raises(UserError, match=r"twice, as 'stem\.proj\.bias' and as 'patch_embed\.patch_embed\.bias'"):
        port_state_dict(model, arrays)


# ---------------------------------------------------------------------------------------------------- ViT
@pytest.mark.parametrize('size', [64, 96, 48])
def test_positions_follow_the_image_size(size):
    reference = golden('evit-deit')
    sizes = {key: value for key, value in reference.meta['ctor'].items() if key != 'ln_eps'}
    model = vision_transformer(**{**sizes, 'img_size': size})
    model.eval()
    state, report = port_with_report(model, find_state_dict({'model': reference.group('sd')}))
    suffix = '' if size == 64 else str(size)
    if suffix:
        assert list(report.matched.resized) == ['pos_embed']
        assert_close(state['pos_embed'], reference[f'out/pos_embed{suffix}'])
    assert_close(logits(model, state, reference[f'in/x{suffix}']), reference[f'out/logits{suffix}'])


# ---------------------------------------------------------------------------------------------------- other layers
class ToyWeights(WeightRules):
    def rename(self, name: str) -> str | None:
        return None if name.startswith('decoder.') else name

    def resize(self, model, name: str, array: np.ndarray) -> np.ndarray:
        return np.repeat(array, model.pos_embed.shape[1] // array.shape[1], axis=1) if name == 'pos_embed' else array


class Toy(Classifier):
    """One of each kind of parameter and buffer."""

    weight_rules = ToyWeights()

    def __init__(self, grid: int = 4):
        super().__init__()
        self.patch_embed = nn.Conv2D(3, 8, 2, 2)
        self.table = nn.Embedding(5, 5)
        self.relative_table = self.create_parameter([6, 6])
        self.pos_embed = self.create_parameter([1, grid, 8])
        self.bn = nn.BatchNorm1D(8)
        self.register_buffer('index', paddle.arange(grid))
        self.register_buffer('attn_relative_position_index', paddle.arange(3))
        self.head = nn.Linear(8, 8)


def toy_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        'patch_embed.weight': (8, 3, 2, 2), 'patch_embed.bias': (8,), 'table.weight': (5, 5), 'relative_table': (6, 6),
        'pos_embed': (1, 4, 8), 'bn.weight': (8,), 'bn.bias': (8,), 'bn.running_mean': (8,), 'bn.running_var': (8,),
        'head.weight': (8, 8), 'head.bias': (8,),
    }  # fmt: skip
    arrays = {name: rng.random(shape).astype('float32') for name, shape in shapes.items()}
    return {**arrays, 'bn.num_batches_tracked': np.array(7), 'decoder.weight': np.ones((2, 2), 'float32')}


def test_only_linear_weights_are_transposed():
    arrays = toy_arrays()
    state = port_state_dict(Toy(), arrays)
    assert np.array_equal(state['head.weight'], arrays['head.weight'].T)
    for name in ('table.weight', 'relative_table', 'patch_embed.weight', 'pos_embed'):
        assert np.array_equal(state[name], arrays[name])


def test_statistics_get_their_paddle_names_and_are_needed():
    arrays = toy_arrays()
    state = port_state_dict(Toy(), arrays)
    assert np.array_equal(state['bn._mean'], arrays['bn.running_mean'])
    assert np.array_equal(state['bn._variance'], arrays['bn.running_var'])
    del arrays['bn.running_mean']
    with pytest.raises(UserError, match=r'without weights in the file \(bn\._mean \[8\]\)'):
        port_state_dict(Toy(), arrays)


def test_the_report_tells_what_was_dropped_resized_and_built():
    arrays = {**toy_arrays(), 'blocks.0.relative_position_index': np.arange(4)}
    model = Toy(grid=8)
    state, report = port_with_report(model, arrays)
    assert report.dropped == {
        'bn.num_batches_tracked': 'a counter, which Paddle does not keep',
        'decoder.weight': 'Toy does not use it',
        'blocks.0.relative_position_index': 'an index table, which the model builds',
    }
    assert report.matched.resized == {'pos_embed': ((1, 4, 8), (1, 8, 8))}
    assert report.matched.kept == ['index', 'attn_relative_position_index']
    text = str(report)
    assert 'dropped decoder.weight: Toy does not use it' in text
    assert 'resized pos_embed: [1, 4, 8] -> [1, 8, 8]' in text
    assert text.startswith('11 arrays used, ')
    assert np.array_equal(state['pos_embed'], np.repeat(arrays['pos_embed'], 2, axis=1))


def test_very_old_patch_embeddings_are_matrices():
    arrays = toy_arrays()
    expected = arrays['patch_embed.weight']
    state = port_state_dict(Toy(), {**arrays, 'patch_embed.weight': expected.reshape(8, -1)})
    assert np.array_equal(state['patch_embed.weight'], expected)
    with pytest.raises(UserError, match=r'patch_embed\.weight \[8, 11\] instead of \[8, 3, 2, 2\]'):
        port_state_dict(Toy(), {**arrays, 'patch_embed.weight': np.ones((8, 11), 'float32')})


@pytest.mark.parametrize('dtype', ['float16', 'float64'])
def test_precision_is_the_models(dtype):
    arrays = {name: array.astype(dtype) if array.dtype.kind == 'f' else array for name, array in toy_arrays().items()}
    state = port_state_dict(Toy(), arrays)
    assert all(array.dtype == np.float32 for array in state.values())


def test_a_file_of_pytorch():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1D(4))
    checkpoint = read_file(os.path.join(HERE, 'fixtures', 'weights', 'checkpoint.pth'))
    model.set_state_dict(port_state_dict(model, checkpoint['layers']))
    with np.load(os.path.join(HERE, 'fixtures', 'weights', 'expected.npz')) as expected:
        assert np.array_equal(model[0].weight.numpy(), expected['layers/0.weight'].T)
        assert np.array_equal(model[1]._variance.numpy(), expected['layers/1.running_var'])


def test_layer_scale_of_timm():
    model = VisionTransformer(img_size=32, embed_dim=8, depth=1, num_heads=2, num_classes=3, layer_scale=0.1)
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    scales = {f'blocks.0.gamma_{i}': np.full(8, i, 'float32') for i in (1, 2)}
    for i in (1, 2):
        del arrays[f'blocks.0.gamma_{i}']
        arrays[f'blocks.0.ls{i}.gamma'] = scales[f'blocks.0.gamma_{i}']
    linear = {f'{path}.weight' for path, layer in model.named_sublayers() if isinstance(layer, nn.Linear)}
    arrays = {name: array.T if name in linear else array for name, array in arrays.items()}
    state = port_state_dict(model, arrays)
    assert all(np.array_equal(state[name], scale) for name, scale in scales.items())
