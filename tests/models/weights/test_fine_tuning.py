# SPDX-License-Identifier: Apache-2.0
"""From pre-trained weights to a classifier: what is used, what is dropped, what is re-initialized."""

import numpy as np
import paddle
import pytest

from models.mae import MaskedAutoencoder
from models.weights.convert import port_state_dict
from models.weights.load import load_pretrained, load_state
from tests.conftest import assert_close, golden
from tests.models.helpers import to_ours, vision_transformer
from utils.errors import UserError
from utils.formats import write_pdparams
from utils.weights import METADATA, find_state_dict

TINY = {'img_size': 32, 'patch_size': 8, 'embed_dim': 24, 'depth': 2, 'num_heads': 3}
DECODER = {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 2}


def arrays(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def named(g, kind: str) -> dict[str, np.ndarray]:
    return {key[len(f'sd/{kind}:') :]: value for key, value in g.items() if key.startswith(f'sd/{kind}:')}


def begin(model, g, kind: str):
    """The weights that the original had before it loaded the checkpoint."""
    state = {name: value for name, value in named(g, kind).items() if not name.endswith('relative_position_index')}
    model.set_state_dict({name: paddle.to_tensor(value) for name, value in to_ours(model, state).items()})
    model.eval()
    return model


@pytest.mark.parametrize('case', ['mae_single', 'mae_ddp', 'mae_bare', 'distill_ddp', 'transfer_from_ft'])
def test_mae_lites_checkpoints(case):
    """Converted under their own configuration, then loaded as the start of a fine-tuning."""
    g = golden('mae_lite-ckpt_remap')
    facts = next(item for item in g.meta['cases'] if item['name'] == case)
    source = 'ftm' if case == 'transfer_from_ft' else 'mae'
    weights = named(g, source)
    prefix = facts['weights_prefix'] + '.' if facts['weights_prefix'] else ''
    stored = {}
    for key in facts['ckpt_keys']:
        name = key.removeprefix('module.').removeprefix(prefix)
        stored[key] = weights.get(name, np.zeros([4, 4, 1, 1], 'float32'))
    classes = weights['head.bias'].shape[0] if source == 'ftm' else None
    if source == 'ftm':
        pretrained = vision_transformer(**{**g.meta['vit'], 'num_classes': classes})
    else:
        pretrained = MaskedAutoencoder(**g.meta['mae'])
    ported = port_state_dict(pretrained, find_state_dict({'model': stored, 'start_epoch': 400}))

    vit, lines = begin(vision_transformer(**g.meta['vit']), g, 'vit'), []
    load_state(vit, ported, log=lines.append)
    assert_close(vit(paddle.to_tensor(g['in/x'])), g[f'out/{case}_logits'], 1e-5)
    missing = {name.removeprefix('model.') for name in facts['missing']}
    report = '\n'.join(lines)
    assert 'which is re-initialized' in report
    assert ('fc_norm.weight' in missing) == (
        'keep their initial values, the file normalizes before pooling: fc_norm.bias' in report
    )
    if source == 'mae':
        assert '40 arrays of the state dict are used' in report
        assert '34 arrays of the state dict are not used' in report


def test_the_class_token_keeps_the_encoders_norm():
    mae = MaskedAutoencoder(**TINY, **DECODER)
    mae.norm.weight.set_value(paddle.full([24], 3.0))
    vit = vision_transformer(**TINY, num_classes=5)
    load_state(vit, arrays(mae))
    assert (vit.norm.weight == 3).all()


def test_a_classifier_is_not_evaluated_on_pre_trained_weights():
    vit = vision_transformer(**TINY, num_classes=5, global_pool=True)
    with pytest.raises(UserError, match='no classifier'):
        load_state(vit, arrays(MaskedAutoencoder(**TINY, **DECODER)), replace_head=False)
    with pytest.raises(UserError, match='fc_norm'):
        load_state(vit, arrays(vision_transformer(**TINY, num_classes=5)), replace_head=False)


@pytest.mark.parametrize('heads', [3, 6])
def test_the_number_of_heads_travels_with_the_weights(tmp_path, heads):
    mae = MaskedAutoencoder(**TINY, **DECODER)
    path = str(tmp_path / 'mae.pdparams')
    write_pdparams({**arrays(mae), METADATA: mae.weight_rules.metadata(mae)}, path)
    vit = vision_transformer(**{**TINY, 'num_heads': heads}, num_classes=5, global_pool=True)
    before = arrays(vit)
    if heads == 3:
        load_pretrained(vit, path)
        return
    with pytest.raises(UserError, match=r'NUM_HEADS 3, but the model has 6.*set MODEL.TRANS.NUM_HEADS to 3'):
        load_pretrained(vit, path)
    for name, value in arrays(vit).items():
        np.testing.assert_array_equal(value, before[name])


def test_paddle_reads_weights_with_facts(tmp_path):
    vit = vision_transformer(**TINY, num_classes=5)
    path = str(tmp_path / 'vit.pdparams')
    write_pdparams({**arrays(vit), METADATA: vit.weight_rules.metadata(vit)}, path)
    other = vision_transformer(**TINY, num_classes=5)
    other.set_state_dict(paddle.load(path))
    for name, value in arrays(vit).items():
        np.testing.assert_array_equal(arrays(other)[name], value)
