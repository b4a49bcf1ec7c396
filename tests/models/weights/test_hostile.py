# SPDX-License-Identifier: Apache-2.0
"""Weights that announce more than they hold: one sentence, and nothing of that size is allocated."""

from __future__ import annotations

import contextlib
import tracemalloc

import numpy as np
import pytest

from config import get_config
from models import build_model
from models.gmlp import GMLP
from models.vision_transformer import VisionTransformer
from models.weights.classes import match_classes, stored_classes
from models.weights.convert import port_state_dict
from models.weights.load import load_pretrained, load_state
from models.weights.paddlevit import from_paddlevit
from tests.models.weights.test_load import SIZES, random_state
from utils.errors import UserError
from utils.formats import write_pdparams
from utils.weights import METADATA, find_state_dict

VIT = {**SIZES, 'num_heads': 2}


def load_quietly(model, arrays: dict) -> None:
    load_state(model, arrays, log=str)


def repeated(*shape: int) -> np.ndarray:
    """An array of one stored number, as PyTorch's files can hold it."""
    return np.lib.stride_tricks.as_strided(np.ones(1, 'float32'), shape, (0,) * len(shape))


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'model.', 'module.model.'])
def test_prefixes_without_end(prefix):
    """No recursion, no work per prefix."""
    names = {f'{prefix * 5000}{name}': np.ones(2, 'float32') for name in 'ab'}
    assert len(find_state_dict(names)) == 2


CLASSIFIERS = {
    'no numbers': {'head.weight': np.empty((0, 1 << 40), 'float32'), 'head.bias': np.empty((0, 1 << 40), 'float32')},
    'many classes without numbers': {
        'head.weight': np.empty((0, 50_000_000), 'float32'), 'head.bias': np.empty((0, 50_000_000), 'float32'),
    },
    'a bias alone': {'head.bias': repeated(50_000_000)},
    'another width': {'head.weight': repeated(1, 50_000_000), 'head.bias': repeated(50_000_000)},
    'more dimensions': {'head.weight': repeated(8, 1, 50_000_000), 'head.bias': repeated(50_000_000)},
}  # fmt: skip


@pytest.mark.parametrize('name', CLASSIFIERS)
@pytest.mark.parametrize('kind', [GMLP, VisionTransformer])
def test_classifiers_that_are_none(name, kind):
    model = kind(**(VIT if kind is VisionTransformer else SIZES))
    arrays = {**random_state(model), **CLASSIFIERS[name]}
    assert stored_classes(model, arrays) is None
    match_classes(model, arrays)
    assert model.num_classes == 10
    with pytest.raises(UserError, match=r'head\.|has a classifier of'):
        load_state(model, arrays, replace_head=False)


def test_true_classifiers_are_taken():
    model = VisionTransformer(**VIT)
    match_classes(model, random_state(VisionTransformer(**{**VIT, 'num_classes': 17})))
    assert model.num_classes == 17


def test_true_classifiers_of_detectors_are_taken():
    """Scores have one class more, the background, and boxes four numbers per class."""
    options = [item for pair in DETECTION.items() for item in pair]
    model, other = (build_model(get_config(opts=[*options, 'MODEL.NUM_CLASSES', count])) for count in (5, 7))
    arrays = {name: repeated(*value.shape) for name, value in other.state_dict().items()}
    assert stored_classes(model, arrays) == 7
    name = 'roi_heads.box_predictor.cls_score.bias'
    for array in (np.float32(1), np.ones((8, 1), 'f4'), np.empty((1 << 40, 0), 'f4'), repeated(1 << 24)):
        assert not stored_classes(model, {**arrays, name: np.asarray(array)})


@pytest.mark.parametrize('port', [False, True])
def test_sizes_are_checked_before_anything_is_copied(port):
    """Many large arrays of one repeated number each."""
    model = VisionTransformer(**VIT)
    state = random_state(model)
    arrays = {name: array.T if 'head' in name else repeated(1 << 12, 1 << 12) for name, array in state.items()}
    tracemalloc.start()
    with pytest.raises(UserError, match='instead of'):
        port_state_dict(model, arrays) if port else load_state(model, arrays)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


@pytest.mark.parametrize('shape', [(1, 0, 8), (1, 1 << 40, 0), (0, 5, 8), (2, 17, 8), (1, 17, 16), (17, 8)])
def test_position_embeddings_that_cannot_be_resized(shape):
    model = VisionTransformer(**VIT)
    with pytest.raises(UserError, match='pos_embed'):
        load_state(model, {**random_state(model), 'pos_embed': np.empty(shape, 'float32')})


@pytest.mark.parametrize(
    'value',
    [np.ones(3), np.zeros(0), [2], {'a': 1}, 'x' * 10**6, '\x1b[2J', None, 3, [np.ones(2)], ['x' * 10**6] * 50_000],
)
def test_metadata_of_any_kind(tmp_path, value):
    model = VisionTransformer(**VIT)
    path = str(tmp_path / 'w.pdparams')
    write_pdparams({**random_state(model), METADATA: {'MODEL.TRANS.NUM_HEADS': value}}, path)
    with pytest.raises(UserError, match=r'was trained with MODEL\.TRANS\.NUM_HEADS') as info:
        load_pretrained(model, path, log=str)
    assert len(str(info.value)) < 800 and '\x1b' not in str(info.value)


@pytest.mark.parametrize('dtype', ['complex64', 'bool', 'int64', 'uint8'])
def test_numbers_of_another_kind(dtype):
    model = VisionTransformer(**VIT)
    for name in ('head.weight', 'pos_embed'):
        arrays = random_state(model)
        arrays[name] = arrays[name].astype(dtype)
        with pytest.raises(UserError, match=f'{name} {dtype} instead of float32'):
            load_state(model, arrays)


TRANS = {
    'MODEL.TRANS.EMBED_DIM': 8, 'MODEL.TRANS.NUM_HEADS': 2, 'MODEL.TRANS.DEPTH': 4, 'MODEL.TRANS.PATCH_SIZE': 8,
    'DATA.IMAGE_SIZE': 32, 'MODEL.NUM_CLASSES': 5,
}  # fmt: skip
SEGMENTATION = {**TRANS, 'TRAIN.TASK': 'segmentation'}
DETECTION = {**TRANS, 'MODEL.TYPE': 'mask_rcnn', 'TRAIN.TASK': 'detection', 'DATA.IMAGE_SIZE': 64}
MODELS = {
    'distilled': {**TRANS, 'MODEL.TYPE': 'vit', 'MODEL.TRANS.DISTILLED': True},
    'relative': {**TRANS, 'MODEL.TYPE': 'vit', 'MODEL.TRANS.REL_POS': ('block', 'shared')},
    'removal': {**TRANS, 'MODEL.TYPE': 'vit', 'MODEL.LAMBDA.PRUNE_LAYERS': (1,)},
    'mae': {**TRANS, 'MODEL.TYPE': 'mae', 'TRAIN.TASK': 'mae', 'MODEL.MAE.DECODER_DEPTH': 1},
    'mocov3': {**TRANS, 'MODEL.TYPE': 'mocov3', 'TRAIN.TASK': 'mocov3', 'MODEL.MOCO.DIM': 8, 'MODEL.MOCO.MLP_DIM': 8},
    'upernet': {
        **SEGMENTATION, 'MODEL.TYPE': 'upernet', 'MODEL.UPERNET.OUT_INDICES': (0, 1, 2, 3), 'MODEL.UPERNET.CHANNELS': 8,
        'MODEL.TRANS.REL_POS': ('shared',),
    },
    'segmenter': {**SEGMENTATION, 'MODEL.TYPE': 'segmenter', 'MODEL.SEGMENTER.NUM_LAYERS': 1},
}  # fmt: skip
ARRAYS = [
    np.array(1, 'f4'), np.zeros(0, 'f4'), np.empty((0, 1 << 40), 'f4'), np.empty((1, 1 << 40, 0), 'f4'), repeated(1 << 12, 1 << 12),
    repeated(1 << 24), repeated(1, 1 << 20, 8), repeated(8, 1 << 20), repeated(1 << 20, 8, 1, 1), np.ones((1,) * 32, 'f4'),
    np.ones(5, 'c8'), np.float32(3), np.full((1, 17, 8), np.nan, 'f4'), np.ones((1, 1, 8), 'f4'), np.ones((1, 2, 8), 'f4'),
    np.ones((4, 2), 'f4'), np.ones((3, 2), 'f4'), np.ones((7, 2), 'f4'), np.ones((1, 5, 8), 'f4'), np.full(4, 2, 'f4'),
]  # fmt: skip


@pytest.mark.parametrize('name', MODELS)
def test_any_array_in_the_place_of_any_other(name):
    """Loaded, or refused by a sentence, through each way of loading."""
    config = get_config(opts=[item for pair in MODELS[name].items() for item in pair])
    model = build_model(config)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    special = ('head', 'pos', 'norm', 'seg', 'emb', 'cls', 'table', 'attn_weight')
    keys = list({key.rpartition('.')[2] + str(value.shape): key for key, value in state.items()}.values())
    keys += [key for key in state if any(part in key for part in special) and 'blocks.1' not in key and key not in keys]
    for key in [
        *keys[:24],
        'pos_embed',
        'base_encoder.pos_embed',
        'decode_head.conv_seg.weight',
        'auxiliary_head.conv_seg.bias',
    ]:
        for array in ARRAYS:
            arrays = {**state, key: array}
            for load in (load_quietly, port_state_dict, match_classes):
                with contextlib.suppress(UserError):
                    load(model, arrays)
            if model.num_classes not in (0, 5):
                model = build_model(config)


def test_names_of_any_length():
    model = GMLP(**SIZES)
    arrays = {f'{"x" * 900}{number}': np.ones(1, 'float32') for number in range(2000)}
    with pytest.raises(UserError, match='without a place in the model') as info:
        load_state(model, arrays)
    assert len(str(info.value)) <= 4000


@pytest.mark.parametrize('other', [(), (0,), (3, 2), (2, 3, 1), (0, 3)])
def test_queries_of_paddlevit_that_cannot_be_joined(other):
    """Other shapes than those of keys and values, or numbers that are repeated a million times."""
    sign = {'patch_embedding.patch_embedding.weight': np.ones((2, 2), 'float32')}
    names = [f'encoder.layers.0.attn.{part}.weight' for part in ('query', 'key', 'value')]
    for shapes in ([other, (2, 3), (2, 3)], [(2, 3), (2, 3), other]):
        arrays = {name: np.ones(shape, 'float32') for name, shape in zip(names, shapes)}
        assert 'blocks.0.attn.qkv.weight' not in from_paddlevit({**sign, **arrays})
    assert 'blocks.0.attn.qkv.weight' not in from_paddlevit(
        {**sign, **dict.fromkeys(names, repeated(1 << 12, 1 << 12))}
    )
    assert from_paddlevit({**sign, **dict.fromkeys(names, np.ones((2, 3)))})['blocks.0.attn.qkv.weight'].shape == (2, 9)
