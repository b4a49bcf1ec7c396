# SPDX-License-Identifier: Apache-2.0
"""Defaults of the constructors are those of the configuration: a model is the same, whichever way it is built."""

import importlib
import inspect
from unittest.mock import Mock

import pytest

from config import get_config
from models import build_model
from models.vision_transformer import VisionTransformer

CONSTRUCTORS = {
    'gmlp': ('models.gmlp', 'GMLP'),
    'ms_mlp': ('models.ms_mlp', 'MSMLP'),
    'vit': ('models.vision_transformer', 'VisionTransformer'),
    'mae': ('models.mae', 'MaskedAutoencoder'),
    'mocov3': ('models.mocov3', 'MoCoV3'),
    'upernet': ('models.segmentation.upernet', 'UPerNet'),
    'segmenter': ('models.segmentation.segmenter', 'Segmenter'),
}


def plain(value):
    """Lists as tuples; a value per block as one value where all are equal."""
    if not isinstance(value, (list, tuple)):
        return value
    values = tuple(plain(element) for element in value)
    return values[0] if len(values) == get_config().MODEL.TRANS.DEPTH and len(set(values)) == 1 else values


@pytest.mark.parametrize('kind', CONSTRUCTORS)
def test_constructors_and_configuration_agree(kind, monkeypatch):
    module, name = CONSTRUCTORS[kind]
    module = importlib.import_module(module)
    signatures = [inspect.signature(cls).parameters for cls in (VisionTransformer, getattr(module, name))]
    constructor = Mock()
    monkeypatch.setattr(module, name, constructor)
    build_model(get_config(opts=['MODEL.TYPE', kind]))
    (call,) = constructor.call_args_list
    expected = signatures[1] if 'encoder' not in signatures[1] else {**signatures[0], **signatures[1]}
    assert not call.args and len(call.kwargs) >= 10
    assert {key: plain(expected[key].default) for key in call.kwargs} == {k: plain(v) for k, v in call.kwargs.items()}
