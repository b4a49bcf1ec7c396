# SPDX-License-Identifier: Apache-2.0
"""Loading .pdparams: all weights or an error, except for a classifier of another size, which is reported."""

from __future__ import annotations

import os

import numpy as np
import paddle
import pytest

from models import create_model
from models.gmlp import GMLP
from models.vision_transformer import VisionTransformer
from models.weights.convert import port_state_dict
from models.weights.load import load_frozen, load_pretrained, load_state
from tests.conftest import HERE
from tests.models.weights.test_convert import Toy
from utils.errors import UserError
from utils.formats import write_pdparams

SIZES = {'img_size': 32, 'patch_size': 16, 'embed_dim': 8, 'depth': 2, 'num_classes': 10}


def fresh(**changes) -> GMLP:
    return GMLP(**{**SIZES, **changes})


def values(model) -> dict[str, np.ndarray]:
    return {name: value.astype('float32').numpy().copy() for name, value in model.state_dict().items()}


def random_state(model, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(value.shape).astype('float32') for name, value in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return set(first) == set(second) and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.fixture
def model():
    return fresh()


@pytest.fixture
def lines():
    return []


# ---------------------------------------------------------------------------------------------------- what is accepted
@pytest.mark.parametrize('name', ['w.pdparams', 'w'])
def test_flat_weights_with_and_without_the_suffix(tmp_path, model, lines, name):
    state = random_state(model)
    write_pdparams(state, str(tmp_path / 'w.pdparams'))
    load_pretrained(model, str(tmp_path / name), log=lines.append)
    assert same(values(model), state)
    assert lines == [f'----- Pretrained: Load model state from {tmp_path}/w.pdparams']


def test_files_of_paddle_save(tmp_path, model):
    other = fresh()
    other.set_state_dict(random_state(other))
    for content in (
        other.state_dict(),
        {'model': other.state_dict(), 'epoch': 3, 'optimizer': {'w_moment1_0': paddle.ones([2])}},
    ):
        paddle.save(content, str(tmp_path / 'w.pdparams'))
        target = fresh()
        load_pretrained(target, str(tmp_path / 'w'), log=lambda line: None)
        assert same(values(target), values(other))


def test_a_run_folder_gives_its_best_weights(tmp_path, model, lines):
    best, last = random_state(model, 1), random_state(model, 2)
    write_pdparams({'model': last, 'epoch': 4}, str(tmp_path / 'last.pdparams'))
    load_pretrained(model, str(tmp_path), log=lines.append)
    assert same(values(model), last)
    write_pdparams(best, str(tmp_path / 'best.pdparams'))
    load_pretrained(model, str(tmp_path), log=lines.append)
    assert same(values(model), best)


def test_averaged_weights_are_preferred_and_the_log_says_so(tmp_path, model, lines):
    plain, averaged = random_state(model, 1), random_state(model, 2)
    write_pdparams({'model': plain, 'model_ema': averaged, 'epoch': 4}, str(tmp_path / 'w.pdparams'))
    load_pretrained(model, str(tmp_path / 'w'), log=lines.append)
    assert same(values(model), averaged)
    assert lines == [f'----- Pretrained: Load model state from {tmp_path}/w.pdparams (averaged weights, model_ema)']


def test_names_of_a_data_parallel_wrapper(tmp_path, model):
    state = random_state(model)
    write_pdparams({f'_layers.{name}': array for name, array in state.items()}, str(tmp_path / 'w.pdparams'))
    load_pretrained(model, str(tmp_path / 'w'), log=lambda line: None)
    assert same(values(model), state)


def test_create_model(tmp_path, capsys):
    state = random_state(create_model('gmlp_digits', num_classes=10))
    write_pdparams(state, str(tmp_path / 'w.pdparams'))
    assert same(values(create_model('gmlp_digits', num_classes=10, pretrained=str(tmp_path / 'w'))), state)
    assert 'Load model state from' in capsys.readouterr().out
    with_new_head = values(create_model('gmlp_digits', num_classes=3, pretrained=str(tmp_path / 'w')))
    assert (
        'a classifier of 10 classes and the model a classifier of 3 classes, which is re-initialized'
        in capsys.readouterr().out
    )
    assert all(np.array_equal(with_new_head[name], state[name]) for name in state if not name.startswith('head.'))


# ---------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize('dtype', ['float16', 'float64', 'bfloat16'])
def test_other_precisions_of_the_file(model, dtype):
    state = {name: np.round(array * 8) / 8 for name, array in random_state(model).items()}
    if dtype == 'bfloat16':
        stored = {name: (array.view('uint32') >> 16).astype('uint16') for name, array in state.items()}
    else:
        stored = {name: array.astype(dtype) for name, array in state.items()}
    load_state(model, stored)
    assert same(values(model), state)
    assert model.head.weight.dtype == paddle.float32


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_a_model_in_half_precision(dtype):
    model = fresh()
    model.to(dtype=dtype)
    state = {name: np.round(array * 8) / 8 for name, array in random_state(model).items()}
    load_state(model, state)
    assert same(values(model), state)
    assert str(model.head.weight.dtype) == f'paddle.{dtype}'


def test_buffers(lines):
    model = Toy()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    state['bn._mean'] = np.arange(8, dtype='float32')
    state['index'] = np.array([3.0, 2, 1, 0], 'float32')  # averages are stored as float32
    load_state(model, state)
    assert model.bn._mean.numpy().tolist() == list(range(8))
    assert model.index.numpy().tolist() == [3, 2, 1, 0]
    state['index'] = np.array([0.5, 2, 1, 0], 'float32')
    with pytest.raises(UserError, match='index float32 instead of int64'):
        load_state(model, state)
    del state['index']
    load_state(model, state)
    assert model.index.numpy().tolist() == [3, 2, 1, 0]


def test_positional_tables_are_interpolated_and_the_log_says_so(lines):
    source, target = Toy(grid=4), Toy(grid=8)
    state = {name: value.numpy() for name, value in source.state_dict().items() if name != 'index'}
    load_state(target, state, log=lines.append)
    assert np.array_equal(target.pos_embed.numpy(), np.repeat(state['pos_embed'], 2, axis=1))
    assert lines == ['----- Pretrained: pos_embed interpolated from [1, 4, 8] to [1, 8, 8]']


# ---------------------------------------------------------------------------------------------------- the classifier
def test_a_classifier_of_another_size_starts_anew(tmp_path, lines):
    state = random_state(fresh())
    write_pdparams(state, str(tmp_path / 'w.pdparams'))
    model = fresh(num_classes=3)
    before = values(model)
    load_pretrained(model, str(tmp_path / 'w'), log=lines.append)
    after = values(model)
    assert all(np.array_equal(after[n], before[n] if n.startswith('head.') else state[n]) for n in after)
    assert lines[1] == (
        f"----- Pretrained: '{tmp_path}/w.pdparams' has a classifier of 10 classes and the model a classifier of "
        '3 classes, which is re-initialized'
    )


def test_models_and_files_without_classifier(lines):
    with_head, features = random_state(fresh()), random_state(fresh(num_classes=0))
    model = fresh(num_classes=0)
    load_state(model, with_head, log=lines.append)
    assert same(values(model), {n: a for n, a in with_head.items() if not n.startswith('head.')})
    model = fresh()
    load_state(model, features, log=lines.append)
    assert np.array_equal(values(model)['norm.weight'], features['norm.weight'])
    assert lines == [
        '----- Pretrained: the state dict has a classifier of 10 classes and the model no classifier',
        '----- Pretrained: the state dict has no classifier and the model a classifier of 10 classes, which is re-initialized',
    ]


def test_an_evaluation_wants_the_right_classifier(tmp_path):
    for name, classes, text in (
        ('w', 10, 'set MODEL.NUM_CLASSES to 10'),
        ('f', 0, 'weights that were trained with one'),
    ):
        write_pdparams(random_state(fresh(num_classes=classes)), str(tmp_path / f'{name}.pdparams'))
        model = fresh(num_classes=3)
        before = values(model)
        with pytest.raises(UserError, match=text):
            load_pretrained(model, str(tmp_path / name), log=lambda line: None, replace_head=False)
        assert same(values(model), before)


# ---------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    'change, text',
    [
        (lambda s: s.pop('norm.bias'), r'1 in the model without weights in the file \(norm\.bias \[8\]\)'),
        (lambda s: s.update(extra=np.ones((2, 3), 'float32')), r'1 in the file without a place.*\(extra \[2, 3\]\)'),
        (lambda s: s.update({'norm.bias': np.ones(9, 'float32')}), r'norm\.bias \[9\] instead of \[8\]'),
        (lambda s: s.update({'norm.bias': np.ones(8, 'int64')}), r'norm\.bias int64 instead of float32'),
        (lambda s: s.update({'norm.bias': np.ones(8, 'complex64')}), r'norm\.bias complex64 instead of float32'),
        (
            lambda s: s.update({'head.weight': np.ones((9, 10), 'float32')}),
            r'head\.weight \[9, 10\] instead of \[8, 10\]',
        ),
        (
            lambda s: s.update({'head.weight': np.ones((8, 9), 'float32')}),
            r'head\.weight \[8, 9\] instead of \[8, 10\]',
        ),
        (lambda s: s.pop('head.bias'), r'head\.bias \[10\]'),
        (lambda s: s.update({'head.scale': np.array(1.0)}), r'head\.scale \[\]'),
    ],
)
def test_any_other_difference_is_refused_and_the_model_unchanged(model, change, text):
    before, state = values(model), random_state(model)
    change(state)
    with pytest.raises(UserError, match=f'the state dict does not fit GMLP: .*{text}'):
        load_state(model, state)
    assert same(values(model), before)


def test_files_of_another_kind(tmp_path, model):
    foreign = os.path.join(HERE, 'fixtures', 'weights', 'checkpoint.pth')
    with pytest.raises(
        UserError, match=r'is a PyTorch file; convert it first: python tools/port_weights\.py .*checkpoint\.pth'
    ):
        load_pretrained(model, foreign)
    with pytest.raises(UserError, match="neither '.*/none' nor '.*/none.pdparams'"):
        load_pretrained(model, str(tmp_path / 'none'))
    (tmp_path / 'cut.pdparams').write_bytes(b'\x80\x04\x95')
    with pytest.raises(UserError, match=r"cut\.pdparams' is damaged"):
        load_pretrained(model, str(tmp_path / 'cut'))
    write_pdparams({'epoch': 3}, str(tmp_path / 'empty.pdparams'))
    with pytest.raises(UserError, match=r"empty\.pdparams' holds no weights.*'epoch' \(int\)"):
        load_pretrained(model, str(tmp_path / 'empty'))


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused(tmp_path, model, value):
    before, state = values(model), random_state(model)
    state['norm.bias'] = state['norm.bias'].astype('float64')
    state['norm.bias'][3] = value
    write_pdparams(state, str(tmp_path / 'w.pdparams'))
    for load in (load_pretrained, load_frozen):
        with pytest.raises(UserError, match=r"w\.pdparams' has NaN or infinite values in norm\.bias;"):
            load(model, str(tmp_path / 'w'))
    with pytest.raises(UserError, match=r'NaN or infinite values in norm\.bias'):
        port_state_dict(model, state, own_names=True)
    assert same(values(model), before)


def transformer(**changes) -> VisionTransformer:
    sizes = {'img_size': 32, 'patch_size': 16, 'embed_dim': 8, 'depth': 1, 'num_heads': 2, 'num_classes': 3}
    return VisionTransformer(**{**sizes, **changes})


@pytest.mark.parametrize(
    ('theirs', 'ours', 'words'),
    [
        ({'distilled': True}, {}, 'set MODEL.TRANS.DISTILLED to True'),
        ({}, {'distilled': True}, 'set MODEL.TRANS.DISTILLED to False'),
        ({'layer_scale': 0.1}, {}, 'set MODEL.TRANS.LAYER_SCALE to a number'),
        ({'representation_size': 4}, {}, 'set MODEL.TRANS.REPRESENTATION_SIZE to their size'),
    ],
)
def test_a_part_too_many_or_too_few_names_its_key(theirs, ours, words):
    state = random_state(transformer(**theirs))
    for replace_head in (True, False):
        with pytest.raises(UserError, match=f'; {words}'):
            load_state(transformer(**ours), state, replace_head=replace_head)


def test_facts_of_a_nested_file_are_found(tmp_path):
    state = random_state(transformer())
    facts = {'MODEL.TRANS.NUM_HEADS': 4}
    write_pdparams({'state_dict': {**state, 'Facts@@': facts}}, str(tmp_path / 'w.pdparams'))
    with pytest.raises(UserError, match='set MODEL.TRANS.NUM_HEADS to 4'):
        load_pretrained(transformer(), str(tmp_path / 'w'))
    write_pdparams({**state, 'Facts@@': [1]}, str(tmp_path / 'w.pdparams'))
    with pytest.raises(UserError, match="holds a list as 'Facts@@'"):
        load_pretrained(transformer(), str(tmp_path / 'w'))
