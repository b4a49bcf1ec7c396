# SPDX-License-Identifier: Apache-2.0
"""State dicts in checkpoints: unwrapping and finding."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from tests.utils.formats.helpers import B, W
from utils.errors import UserError
from utils.weights import find_state_dict, resolve_weights_path, state_dicts

# ---------------------------------------------------------------------------------------------------- unwrapping
STATE = {'w': W, 'b': B}


@pytest.mark.parametrize(
    'content, where',
    [
        (STATE, ''),
        (collections.OrderedDict(STATE), ''),
        ({'state_dict': STATE, 'epoch': 1, 'arch': 'vit'}, 'state_dict'),
        ({'model': STATE, 'optimizer': {'state': {0: {'exp_avg': W}}}, 'args': None}, 'model'),
        ({'net': STATE}, 'net'),
        ({'state_dict': {'model': STATE, 'epoch': 1}}, 'state_dict.model'),
        ({'model_ema': STATE}, 'model_ema'),
        ({'state_dict_ema': STATE, 'epoch': 3}, 'state_dict_ema'),
        ({'module.w': W, 'module.b': B}, ''),
        ({'model': {'module.w': W, 'module.b': B}}, 'model'),
        ({'_layers.w': W, '_layers.b': B}, ''),
        ({'module._layers.w': W, 'module._layers.b': B}, ''),
        ({'model': STATE, 'model_ema': None}, 'model'),
        ({'model': STATE, 'model_ema': {}}, 'model'),
        ({'_orig_mod.w': W, '_orig_mod.b': B}, ''),
        ({'module._orig_mod.w': W, 'module._orig_mod.b': B}, ''),
        ({'module.module.w': W, 'module.module.b': B}, ''),
        ({'backbone.w': W, 'backbone.b': B}, ''),
        ({'encoder.model.w': W, 'encoder.model.b': B}, ''),
        ({'n_averaged': np.array(3), 'module.w': W, 'module.b': B}, ''),
        ({'model_state_dict': STATE, 'epoch': 1}, 'model_state_dict'),
        ({'model_ema': {'module': STATE, 'decay': 0.9}}, 'model_ema.module'),
    ],
)
def test_wrapped_weights(content, where):
    assert list(state_dicts(content)) == [where]
    for prefer_ema in (False, True):
        found = find_state_dict(content, prefer_ema)
        assert {k: v.tolist() for k, v in found.items()} == {'w': W.tolist(), 'b': B.tolist()}


def test_averaged_weights():
    for key in ('model_ema', 'state_dict_ema'):
        content = {'model': STATE, key: {'module.w': W + 1, 'module.b': B + 1}}
        assert np.array_equal(find_state_dict(content)['w'], W)
        assert np.array_equal(find_state_dict(content, prefer_ema=True)['w'], W + 1)


def test_a_prefix_of_some_names_only_stays():
    state = {'module.w': W, 'head.b': B}
    assert set(find_state_dict(state)) == set(state)
    assert set(find_state_dict({'blocks.0._orig_mod.w': W, 'b': B})) == {'blocks.0.w', 'b'}  # a compiled part
    twice = {'_orig_mod.w': W, 'w': B}
    assert set(find_state_dict(twice)) == set(twice)


def test_ambiguous_and_missing_weights():
    with pytest.raises(UserError, match=r"f\.pth holds several sets.*'state_dict' \(2 arrays\), 'net' \(1 arrays\)"):
        find_state_dict({'state_dict': STATE, 'net': {'w': W}}, source='f.pth')
    with pytest.raises(UserError, match=r"holds no weights.*'epoch' \(int\), 'teacher' \(dict\)"):
        find_state_dict({'epoch': 3, 'teacher': STATE})
    with pytest.raises(UserError, match='holds no weights.*but one ndarray'):
        find_state_dict(W)
    with pytest.raises(UserError, match='holds no weights.*but nothing'):
        find_state_dict({})
    with pytest.raises(UserError, match='holds no weights'):
        find_state_dict({'w': W, 'epoch': 3})


# ---------------------------------------------------------------------------------------------------- finding
def test_paths(tmp_path):
    for name in ('gmlp.pdparams', 'gmlp.v2', 'run/last.pdparams', 'best_run/best.pdparams', 'best_run/last.pdparams'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'x')
    expected = {
        'gmlp.pdparams': 'gmlp.pdparams',
        'gmlp': 'gmlp.pdparams',
        'gmlp.v2': 'gmlp.v2',
        'run': 'run/last.pdparams',
        'run/': 'run/last.pdparams',
        'best_run': 'best_run/best.pdparams',
        'run/last': 'run/last.pdparams',
    }
    for given_path, found in expected.items():
        assert resolve_weights_path(f'{tmp_path}/{given_path}') == f'{tmp_path}/{found}'


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'w.pdparams').write_bytes(b'x')
    assert resolve_weights_path('~/w') == str(tmp_path / 'w.pdparams')


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / 'gmlp_s16_224.pdparams').write_bytes(b'x')
    (tmp_path / 'other.txt').write_bytes(b'x')
    with pytest.raises(
        UserError, match=r"neither '.*/gmlp_s16' nor '.*/gmlp_s16\.pdparams'; .* holds gmlp_s16_224\.pdparams"
    ):
        resolve_weights_path(str(tmp_path / 'gmlp_s16'))
    with pytest.raises(UserError, match=r"is no '.*/gmlp\.pdparams'; '.*' holds gmlp_s16_224\.pdparams"):
        resolve_weights_path(str(tmp_path / 'gmlp.pdparams'))
    with pytest.raises(
        UserError, match=r"neither '.*/best\.pdparams' nor '.*/last\.pdparams'; '.*' holds gmlp_s16_224"
    ):
        resolve_weights_path(str(tmp_path))
    with pytest.raises(UserError, match=r"the folder '.*/nowhere' does not exist"):
        resolve_weights_path(str(tmp_path / 'nowhere' / 'w'))
    with pytest.raises(UserError, match=r'holds gmlp_s16_224\.pdparams'):
        resolve_weights_path(str(tmp_path / 'GMLP_S16_224.PDPARAMS'))
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub' / 'model.safetensors').write_bytes(b'x')
    with pytest.raises(UserError, match=r'holds model\.safetensors'):
        resolve_weights_path(str(tmp_path / 'hub'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match=r'holds no \.pdparams file'):
        resolve_weights_path(str(tmp_path / 'empty'))
