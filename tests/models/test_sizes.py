# SPDX-License-Identifier: Apache-2.0
"""Models for images that are not square, and weights of other grids of patches."""

import functools

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import get_config
from models import build_model
from models.layers import resize_relative_table
from models.profile import profile
from models.registry import config_file
from models.weights.load import load_pretrained, load_state
from models.weights.rules import GRID, rules_of
from tests.models.helpers import small_config
from utils.errors import UserError
from utils.formats import write_pdparams
from utils.sizes import image_shape
from utils.weights import METADATA

VIT = 'deit_small_patch16_224'
WIDE = ('DATA.IMAGE_SIZE', (16, 40))  # 2 x 5 patches of 8 pixels


def built(name, *options, seed=0):
    paddle.seed(seed)
    model = build_model(small_config(name, *options))
    model.eval()
    return model


def randomized(model):
    """Random weights everywhere: many tables start with zeros."""
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.set_value(rng.standard_normal(parameter.shape, 'float32') * 0.3)
    return model


def arrays_of(model):
    metadata = rules_of(model).metadata(model)
    return {**{name: value.numpy() for name, value in model.state_dict().items()}, METADATA: metadata}


def quiet(_):
    pass


# ---------------------------------------------------------------------------------------------------- by hand
def cubic_matrix(old, new):
    """[new, old]: bicubic interpolation of one axis (a = -0.75, half-pixel centers, clamped at the ends)."""
    a, matrix = -0.75, np.zeros((new, old))
    for row in range(new):
        center = (row + 0.5) * old / new - 0.5
        first = int(np.floor(center)) - 1
        for tap in range(first, first + 4):
            x = abs(center - tap)
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, min(max(tap, 0), old - 1)] += near if x <= 1 else far if x < 2 else 0
    return matrix


def by_hand(table, old, new):
    """[rows * columns, C] of a grid -> another grid."""
    grid = table.reshape(*old, -1).astype('float64')
    resized = np.einsum('ia,jb,abc->ijc', cubic_matrix(old[0], new[0]), cubic_matrix(old[1], new[1]), grid)
    return resized.reshape(-1, table.shape[1])


@pytest.mark.parametrize('size', [(16, 40), (40, 16), (32, 8), (8, 64)])
def test_square_weights_in_a_model_that_is_not_square(size):
    """It equals a model whose position embedding is interpolated by hand."""
    square, wide = built(VIT), built(VIT, 'DATA.IMAGE_SIZE', size, seed=1)
    grid, arrays = (size[0] // 8, size[1] // 8), arrays_of(square)
    load_state(wide, arrays, log=quiet)
    expected = built(VIT, 'DATA.IMAGE_SIZE', size, seed=2)
    table = arrays['pos_embed'][0]
    own = {**arrays, 'pos_embed': np.concatenate([table[:1], by_hand(table[1:], (4, 4), grid)])[None].astype('float32')}
    expected.set_state_dict({name: paddle.to_tensor(value) for name, value in own.items() if name != METADATA})
    x = paddle.randn([2, 3, *size])
    np.testing.assert_allclose(wide(x), expected(x), atol=1e-5)
    square.eval()
    np.testing.assert_allclose(square(x), expected(x), atol=1e-5)  # positions are interpolated in the forward pass too


@settings(deadline=None, max_examples=25)
@given(old=st.tuples(st.integers(1, 6), st.integers(1, 6)), new=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_tables_of_any_grids(old, new):
    """Absolute tables by their metadata, and relative ones, against the interpolation by hand."""
    model, file = (
        built(VIT, 'DATA.IMAGE_SIZE', (8 * rows, 8 * columns), 'MODEL.TRANS.DEPTH', 1, 'MODEL.EVIT.DROP_LOC', [0])
        for rows, columns in (new, old)
    )
    arrays = arrays_of(file)
    assert (GRID in arrays[METADATA]) == (old[0] != old[1])
    load_state(model, arrays, log=quiet)
    table = arrays['pos_embed'][0]
    expected = np.concatenate([table[:1], by_hand(table[1:], old, new)])
    np.testing.assert_allclose(model.pos_embed[0], expected, atol=1e-5)
    sides, wanted = ([2 * length - 1 for length in grid] for grid in (old, new))
    relative = np.random.default_rng(0).standard_normal((sides[0] * sides[1] + 3, 2)).astype('float32')
    count = len(relative) - 3
    expected = np.concatenate([by_hand(relative[:count], sides, wanted), relative[count:]])
    np.testing.assert_allclose(resize_relative_table(relative, new, old), expected, atol=1e-5)


def test_there_and_back(tmp_path):
    """A file of another grid says so: equal numbers of patches do not hide it, and square files stay as they were."""
    wide, square = built(VIT, 'DATA.IMAGE_SIZE', (16, 72)), built(VIT, 'DATA.IMAGE_SIZE', (48, 48), seed=1)
    assert arrays_of(wide)[METADATA] == {'MODEL.TRANS.NUM_HEADS': 3, GRID: [2, 9]}
    assert arrays_of(square)[METADATA] == {'MODEL.TRANS.NUM_HEADS': 3}, 'as in files of earlier versions'
    path, log = str(tmp_path / 'wide.pdparams'), []
    write_pdparams(arrays_of(wide), path)
    load_pretrained(built(VIT, 'DATA.IMAGE_SIZE', (16, 72), seed=2), path, log=log.append, replace_head=False)
    assert not any('interpolated' in line for line in log)
    load_pretrained(square, path, log=log.append, replace_head=False)
    assert log[-1] == '----- Pretrained: pos_embed interpolated from [1, 19, 24] to [1, 37, 24]'
    old, new = wide.pos_embed.numpy()[0], square.pos_embed.numpy()[0]
    np.testing.assert_allclose(new[1:], by_hand(old[1:], (2, 9), (6, 6)), atol=1e-5)
    narrow = built(VIT, 'DATA.IMAGE_SIZE', (72, 16), seed=3)
    load_pretrained(narrow, path, log=log.append, replace_head=False)
    assert log[-1] == '----- Pretrained: pos_embed interpolated from [1, 19, 24] to [1, 19, 24]'
    np.testing.assert_allclose(narrow.pos_embed[0, 1:], by_hand(old[1:], (2, 9), (9, 2)), atol=1e-5)


@pytest.mark.parametrize('grid', [[2], [2, 'x'], [0, 4], [-1, -16], 'xy', [True, 4], [2, 1 << 40]])
def test_a_damaged_grid_is_refused(grid):
    model = built(VIT)
    arrays = arrays_of(model)
    arrays[METADATA] = {**arrays[METADATA], GRID: grid}
    with pytest.raises(UserError, match='grid of patches that is no pair'):
        load_state(model, arrays, log=quiet)


def test_a_grid_that_does_not_fit_its_table_is_refused():
    model, arrays = built(VIT, *WIDE), arrays_of(built(VIT))
    arrays[METADATA] = {**arrays[METADATA], GRID: [3, 7]}
    with pytest.raises(UserError, match='pos_embed'):
        load_state(model, arrays, log=quiet)


# ---------------------------------------------------------------------------------------------------- parts
REL = ('MODEL.TRANS.REL_POS', ['block', 'shared'])
PARTS = {
    'plain': (VIT,),
    'distilled': ('deit_small_distilled_patch16_224',),
    'relative': (VIT, *REL),
    'beit': (VIT, *REL, 'MODEL.TRANS.KEY_BIAS', False, 'MODEL.TRANS.LAYER_SCALE', 0.1),
    'evit': (VIT, 'MODEL.EVIT.KEEP_RATE', 0.6, 'MODEL.EVIT.DROP_LOC', [1, 2]),
    'fused': (VIT, 'MODEL.EVIT.KEEP_RATE', 0.6, 'MODEL.EVIT.DROP_LOC', [1, 2], 'MODEL.EVIT.FUSE_TOKEN', True),
    'tome': (VIT, 'MODEL.TOME.R', 2),
    'lambda': (VIT, 'MODEL.LAMBDA.PRUNE_LAYERS', [0, 2], 'MODEL.LAMBDA.REMOVED', True),
    'decaying': (VIT, 'MODEL.LAMBDA.PRUNE_LAYERS', [0, 2]),
    'together': ('deit_small_evit_lambda_tome',),
    'mocov3': ('mocov3_small_patch16_224',),
    'ms_mlp': ('ms_mlp_tiny_patch4_shift5_224', 'DATA.IMAGE_SIZE', (32, 64), 'MODEL.MSMLP.DEPTHS', [1, 1, 1, 1]),
}


@functools.cache
def config_of(part):
    name, *options = PARTS[part]
    return small_config(name, *WIDE, *options)


@pytest.mark.parametrize('part', PARTS)
def test_every_architecture_is_built_for_the_size(part):
    """The rows of patches are rows of the image, not columns."""
    model = randomized(build_model(config_of(part)))
    shape = [2, *image_shape(config_of(part))]
    model.eval()
    x = paddle.randn(shape)
    outputs = model(x)
    assert outputs.shape[0] == 2 and np.isfinite(outputs.numpy()).all()
    turned = model(x.transpose([0, 1, 3, 2])) if part in ('plain', 'evit', 'tome', 'lambda', 'ms_mlp') else None
    assert turned is None or np.abs(turned.numpy() - outputs.numpy()).max() > 1e-4


def test_costs_follow_the_number_of_patches():
    wide, square = (profile(built(VIT, 'DATA.IMAGE_SIZE', size), [1, 3, *size]) for size in ((16, 72), (24, 48)))
    assert wide == square


def test_relative_positions_refuse_the_turned_image():
    model = build_model(config_of('relative'))
    with pytest.raises(UserError, match='need images of 16x40 pixels'):
        model(paddle.zeros([1, 3, 40, 16]))


def test_rows_and_columns_of_relative_positions():
    """The biases of a 2 x 5 model are those of its grid: a transposed grid exchanges them."""
    wide = randomized(build_model(config_of('relative')))
    bias = wide.rel_pos_bias()
    assert bias.shape == [3, 11, 11]
    right = bias[:, 1 + np.arange(4), 2 + np.arange(4)]  # patch to its right neighbor, in the first row
    assert np.ptp(right.numpy(), axis=1).max() == 0
    below = bias[:, 1 + np.arange(5), 6 + np.arange(5)]
    assert np.ptp(below.numpy(), axis=1).max() == 0 and not np.allclose(below[:, 0], right[:, 0])


def test_kept_tokens_are_numbered_by_the_grid():
    model = randomized(build_model(config_of('evit')))
    model.eval()
    seen = model.forward_intermediates(paddle.randn([1, 3, 16, 40]), want=('source',))
    assert [indices.shape[1] for indices in seen.state.indices] == [6, 4]
    assert seen.blocks[1].source.shape == [1, 7, 11]


def test_masked_autoencoders():
    """Sine-cosine tables of the grid, and reconstructions in the shape of the image."""
    config = small_config('mae_small_patch16_224', *WIDE)
    model = build_model(config)
    table = model.pos_embed.numpy()[0, 1:].reshape(2, 5, 24)
    np.testing.assert_array_equal(table[0, :, :12], table[1, :, :12])  # the first half encodes the column
    np.testing.assert_array_equal(table[:, 0, 12:], table[:, 4, 12:])  # the second half encodes the row
    assert not np.allclose(table[:, 0, :12], table[:, 1, :12]) and not np.allclose(table[0, 0, 12:], table[1, 0, 12:])
    x = paddle.randn([2, 3, 16, 40])
    output = model(x)
    assert output.mask.shape == [2, 10] and np.isfinite(output.loss.item())
    assert [image.shape for image in model.to_images(x, output)] == [[2, 3, 16, 40]] * 2
    classifier = built(VIT, 'DATA.IMAGE_SIZE', (40, 16), 'MODEL.TRANS.DEPTH', 2)
    load_state(classifier, arrays_of(model), log=quiet)
    expected = by_hand(model.pos_embed.numpy()[0, 1:], (2, 5), (5, 2))
    np.testing.assert_allclose(classifier.pos_embed[0, 1:], expected, atol=1e-5)


def test_a_checkpoint_of_mae_fits_another_grid():
    """Fixed tables are computed for the grid, not interpolated."""
    wide = small_config('mae_small_patch16_224', *WIDE)
    model, square = build_model(wide), build_model(small_config('mae_small_patch16_224'))
    expected = model.pos_embed.numpy()
    load_state(model, arrays_of(square), log=quiet)
    np.testing.assert_array_equal(model.pos_embed, expected)


# ---------------------------------------------------------------------------------------------------- refused
def test_gmlp_is_refused_with_its_reason():
    with pytest.raises(UserError, match='gMLP takes square images only, not 16x32: its gates have one weight per pair'):
        build_model(small_config('gmlp_s16_224', 'DATA.IMAGE_SIZE', (16, 32)))


def test_detectors_are_refused_with_their_reason():
    options = ['DATA.IMAGE_SIZE', (64, 96), 'MODEL.NUM_CLASSES', 3]
    with pytest.raises(UserError, match='takes square images, to which all others are padded.*such as 96'):
        build_model(get_config(config_file('mask_rcnn_vitdet_tiny_640'), options))


@pytest.mark.parametrize(('size', 'named'), [((20, 40), '20x40'), ((40, 20), '40x20')])
def test_sides_must_be_multiples_of_the_patch_size(size, named):
    with pytest.raises(UserError, match=f'an image of {named} pixels does not divide into patches of 8'):
        build_model(small_config(VIT, 'DATA.IMAGE_SIZE', size))
