# SPDX-License-Identifier: Apache-2.0
"""Encoders that this suite pre-trains start the published recipes of segmentation: DeiT, MAE, MoCo v3, with relative positions,
with removed attention.
"""

import numpy as np
import paddle
import pytest

from config import get_config
from models import build_model
from models.registry import config_file
from models.weights.load import load_pretrained
from tests.models.helpers import SMALL, small_config
from utils.errors import UserError
from utils.formats import write_pdparams

DEPTH = ['MODEL.TRANS.DEPTH', 4]
RELATIVE = 'vit_tiny_patch16_224_mae_finetune_rpe'
# Source: (configuration, recipe that starts from it, its further settings).
STARTS = {
    'DeiT': ('deit_tiny_patch16_224', 'upernet_mln_tiny_512', []),
    'DeiT, pyramid': ('deit_tiny_patch16_224', 'upernet_tiny_512', []),
    'DeiT, Segmenter': ('deit_tiny_patch16_224', 'segmenter_tiny_mask_512', []),
    'MAE': ('mae_tiny_patch16_224', 'upernet_tiny_512', []),
    'MoCo v3': ('mocov3_tiny_patch16_224', 'upernet_tiny_512', []),
    'relative positions': (RELATIVE, 'upernet_tiny_512', ['MODEL.TRANS.KEY_BIAS', False]),
    'removed attention': ('lambda_tiny_024', 'upernet_tiny_024_512', []),
    'removed attention, multi-level neck': ('lambda_tiny_024', 'upernet_mln_tiny_024_512', []),
    'removed attention, Segmenter': ('lambda_tiny_024', 'segmenter_tiny_024_linear_512', []),
}


def segmentor(name: str, *opts):
    """The model of a recipe, as small as the encoders of the tests."""
    config = get_config(config_file(name))
    small = [*SMALL['vit'], 'MODEL.NUM_CLASSES', 4, *opts]
    if config.MODEL.TYPE == 'upernet':
        small += ['MODEL.UPERNET.OUT_INDICES', (0, 1, 2, 3), 'MODEL.UPERNET.CHANNELS', 8]
        small += ['MODEL.UPERNET.AUX_CHANNELS', 8]
    if config.MODEL.LAMBDA.REMOVED:
        small += ['MODEL.LAMBDA.PRUNE_LAYERS', (0, 2)]
    return build_model(get_config(config_file(name), small))


def arrays(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def encoder_of(config) -> tuple[dict, dict[str, np.ndarray]]:
    """State dict of a model with random weights, and the arrays of its encoder by their names in a Vision Transformer."""
    paddle.seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        parameter.set_value(paddle.randn(parameter.shape))
    state = arrays(model)
    prefix = 'base_encoder.' if any(name.startswith('base_encoder.') for name in state) else ''
    return state, {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize('case', STARTS)
def test_an_encoder_of_this_suite_starts_a_recipe(case, tmp_path):
    """Every array of the backbone that the source has is taken from it; the report says what else keeps its initial values, and why."""
    source, recipe, opts = STARTS[case]
    config = small_config(source, *(DEPTH if source.startswith(('mae_', 'mocov3_')) else []))
    state, encoder = encoder_of(config)
    model, path, lines = segmentor(recipe, *opts), str(tmp_path / 'encoder.pdparams'), []
    write_pdparams(state, path)
    before = arrays(model)
    load_pretrained(model, path, log=lines.append)
    after = arrays(model)
    inner = {name: name.removeprefix('backbone.') for name in after if name.startswith('backbone.')}
    taken = {name for name, ours in inner.items() if ours in encoder}
    for name in taken:
        np.testing.assert_array_equal(after[name], encoder[inner[name]], err_msg=name)
    for name in after.keys() - taken:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    new = {ours.rpartition('.')[2] for name, ours in inner.items() if name not in taken}
    has_relative = recipe.startswith('upernet_tiny') and source != RELATIVE
    assert new == ({'gamma_1', 'gamma_2', 'relative_position_bias_table'} if has_relative else set())
    report = '\n'.join(lines)
    assert f"{len(taken)} arrays of '{path}' are used" in report
    assert 'the file has no decoder' in report
    model.eval()
    assert np.isfinite(model(paddle.randn([1, 3, 32, 32])).numpy()).all()


def test_what_does_not_fit_is_an_error(tmp_path):
    """All attention cannot come from a file without some, and gMLP is no encoder."""
    path = str(tmp_path / 'source.pdparams')
    for source, text in (('lambda_tiny_024', r'blocks\.0\.'), ('gmlp_s16_224', 'without')):
        write_pdparams(encoder_of(small_config(source))[0], path)
        model = segmentor('upernet_mln_tiny_512')
        before = arrays(model)
        with pytest.raises(UserError, match=text):
            load_pretrained(model, path)
        for name, array in arrays(model).items():
            np.testing.assert_array_equal(array, before[name])
