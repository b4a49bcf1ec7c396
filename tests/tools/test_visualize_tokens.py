# SPDX-License-Identifier: Apache-2.0
"""tools/visualize_tokens.py: where the patches are, against the original code, and the pictures a user gets."""

import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config import get_config
from datasets.transforms import build_transform
from models import build_model
from tests.conftest import ROOT, golden
from tools.visualize_tokens import (
    DROPPED,
    DROPPED_OUTLINE,
    GAP,
    MARGIN,
    PALETTE,
    Reduction,
    draw_owners,
    draw_strip,
    main,
    merged_counts,
    merged_owners,
    reductions,
    shorten,
    strip_paths,
    tile,
    trace_tokens,
)
from utils.errors import UserError
from utils.formats import write_pdparams

CONFIG = """
DATA: {{IMAGE_SIZE: 32, CROP_PCT: 1.0, CROP: resized}}
MODEL:
  TYPE: vit
  NAME: tiny
  NUM_CLASSES: 3
  TRANS: {{PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 3, NUM_HEADS: 2, MLP_RATIO: 2, DISTILLED: {distilled}}}
  EVIT: {{KEEP_RATE: {rate}, DROP_LOC: [0, 1, 2], FUSE_TOKEN: {fuse}}}
  TOME: {{R: {r}}}
"""


def configuration(tmp_path, rate=0.6, fuse=True, distilled=False, r=0):
    path = tmp_path / 'tiny.yaml'
    path.write_text(CONFIG.format(rate=rate, fuse=fuse, distilled=distilled, r=r))
    return str(path)


def random_model(config):
    paddle.seed(0)
    model = build_model(config)
    model.eval()
    return model


def weights(tmp_path, cfg):
    path = str(tmp_path / 'tiny.pdparams')
    state = random_model(get_config(cfg)).state_dict()
    write_pdparams({name: value.numpy() for name, value in state.items()}, path)
    return path


def pixels(seed=0, size=(32, 32), channels=3):
    shape = (*size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape).astype('uint8')


def save(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(**options)).save(path)
    return str(path)


# ---------------------------------------------------------------------------------------------------- bookkeeping
@pytest.mark.parametrize('mode', ['fuse', 'drop'])
@pytest.mark.parametrize('sample', [0, 1])
def test_positions_and_masks_are_those_of_the_original(mode, sample):
    """The original shows a kept fused token as patch 0, at the top left; here it is no patch."""
    reference = golden('evit-mask')
    image = np.rint(reference['in/img'][sample] * 255).astype('uint8')
    if sample == 0:
        np.testing.assert_array_equal(image, reference['out/uint8_example'])
    stages = trace_tokens([reference[f'in/{mode}/idx{j}'][sample] for j in range(3)], 64, fuse=mode == 'fuse')
    for j, stage in enumerate(stages):
        theirs = reference[f'out/{mode}/real_idx{j}'][sample]
        kept_row = stage.row[: len(theirs)]
        np.testing.assert_array_equal(np.where(kept_row < 64, kept_row, 0), theirs)
        kept = stage.owners == np.arange(64)
        np.testing.assert_array_equal(kept, reference[f'out/{mode}/kept_mask{j}'][sample])

        drawn = np.asarray(draw_owners(image.transpose(1, 2, 0), stage.owners)).transpose(2, 0, 1)
        masked = np.rint(reference[f'out/{mode}/masked{j}'][sample] * 255)
        if not kept[0]:
            masked[:, :8, :8] = 0
        visible = kept.reshape(8, 8).repeat(8, 0).repeat(8, 1)
        np.testing.assert_array_equal(np.where(visible, drawn, 0), masked)


@st.composite
def reduced_rows(draw):
    """(number of patches, fuse, positions kept by each reduction)."""
    count = total = draw(st.integers(2, 25))
    fuse = draw(st.booleans())
    kept = []
    while count > 1 and len(kept) < 5 and draw(st.booleans()):
        positions = draw(st.permutations(range(count)))[: draw(st.integers(1, count - 1))]
        kept.append(np.array(positions))
        count = len(positions) + fuse
    return total, fuse, kept


@settings(deadline=None, derandomize=True)
@given(reduced_rows())
def test_every_patch_is_where_its_set_is(case):
    """Tokens as sets of patches: a reduction keeps sets and unites the others."""
    total, fuse, kept = case
    row = [({patch}, False) for patch in range(total)]
    stages = trace_tokens(kept, total, fuse)
    assert len(stages) == len(kept)
    for positions, stage in zip(kept, stages):
        rest = [row[i][0] for i in range(len(row)) if i not in positions]
        row = [row[i] for i in positions] + ([(set().union(*rest), True)] if fuse else [])
        assert len(stage.row) == len(row)
        for token, (patches, is_fused) in zip(stage.row, row):
            assert set(np.flatnonzero(stage.owners == token)) == patches
            assert (token >= total) == is_fused
        held = set().union(*(patches for patches, _ in row))
        assert set(np.flatnonzero(stage.owners == DROPPED)) == set(range(total)) - held


@pytest.mark.parametrize('distilled', [False, True])
@pytest.mark.parametrize(
    ('rate', 'fuse', 'expected'),
    [
        (0.6, True, {0: 11, 1: 8, 2: 6}),
        (0.6, False, {0: 10, 1: 6, 2: 4}),
        (0.93, False, {0: 15, 1: 14}),
        (0.93, True, {0: 16, 1: 16, 2: 16}),  # 15 kept and one token fused of one: their number is the same
    ],
)
def test_blocks_and_numbers_are_those_of_the_model(tmp_path, rate, fuse, expected, distilled):
    config = get_config(configuration(tmp_path, rate, fuse, distilled))
    found = reductions(random_model(config), config, pixels())
    assert {block: len(set(owners.tolist()) - {DROPPED}) for block, owners, *_ in found} == expected
    assert any((owners == DROPPED).any() for _, owners, *_ in found) != fuse


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=25), st.randoms())
def test_merged_holders_are_the_sets(groups, random):
    """Whatever the order of the tokens; set 0 was dropped."""
    groups = np.array(groups)
    tokens = sorted(set(groups.tolist()) - {0}, key=lambda _: random.random())
    source = np.array([groups == token for token in tokens], 'float32').reshape(-1, len(groups))
    if not tokens:
        return
    owners = merged_owners(source)
    np.testing.assert_array_equal(owners == DROPPED, groups == 0)
    for token in tokens:
        patches = np.flatnonzero(groups == token)
        number = patches[0] if len(patches) == 1 else len(groups) + patches[0]
        assert set(np.flatnonzero(owners == number)) == set(patches)


def input_of(config, image):
    mean, std = (np.array(config.DATA[key]) for key in ('IMAGENET_MEAN', 'IMAGENET_STD'))
    return paddle.to_tensor(((image / 255 - mean) / std).transpose(2, 0, 1)[np.newaxis].astype('float32'))


@pytest.mark.parametrize('distilled', [False, True])
def test_merged_groups_are_those_of_the_model(tmp_path, distilled):
    """Every patch is in one group, groups only grow, and are as large as the sizes that the attention uses."""
    config = get_config(configuration(tmp_path, rate=1.0, distilled=distilled, r=3))
    model, image = random_model(config), pixels(5)
    found = reductions(model, config, image)
    state = model.forward_tokens(input_of(config, image))[1]
    assert [step.block for step in found] == [0, 1, 2] and all(step.merged for step in found)
    assert [len(set(step.owners)) for step in found] == list(state.counts) == [13, 10, 7]
    assert all((owners != DROPPED).all() for _, owners, *_ in found)
    _, sizes = np.unique(found[-1].owners, return_counts=True)
    prefix = 1 + distilled
    assert sorted(sizes) == sorted(state.size[0, prefix:, 0].numpy()) and sizes.sum() == 16
    for (_, before, *_), (_, after, *_) in zip(found, found[1:]):
        assert all(len(set(after[before == token])) == 1 for token in set(before))


@pytest.mark.parametrize('distilled', [False, True])
def test_equal_patches_are_merged(tmp_path, distilled):
    """Patches 0 and 1, 2 and 3, ... are the same, and the model has no positions of them."""
    config = get_config(configuration(tmp_path, rate=1.0, distilled=distilled, r=8))
    model = random_model(config)
    model.pos_embed.set_value(paddle.zeros_like(model.pos_embed))
    twins = pixels(6, size=(32, 16)).reshape(32, 2, 1, 8, 3).repeat(2, 2).reshape(32, 32, 3)
    owners = reductions(model, config, twins)[0].owners
    np.testing.assert_array_equal(owners, 16 + np.arange(16) // 2 * 2)


@pytest.mark.parametrize('fuse', [False, True])
def test_both_at_once(tmp_path, fuse):
    """EViT's tokens, fused or not, are merged as any other; what it drops is dropped."""
    config = get_config(configuration(tmp_path, rate=0.8, fuse=fuse, r=1))
    model, image = random_model(config), pixels(7)
    found = reductions(model, config, image)
    counts = model.forward_tokens(input_of(config, image))[1].counts
    assert [len(set(owners) - {DROPPED}) for _, owners, *_ in found] == list(counts)
    assert all((owners == DROPPED).any() != fuse for _, owners, *_ in found)


def test_kept_are_the_patches_the_class_token_attends_to(tmp_path):
    config = get_config(configuration(tmp_path, rate=0.5))
    model, image = random_model(config), pixels(3)
    scores = model.forward_tokens(input_of(config, image))[1].scores[0][0].numpy()
    kept = np.flatnonzero(reductions(model, config, image)[0].owners == np.arange(16))
    assert set(kept) == set(np.argsort(-scores)[:8])


# ---------------------------------------------------------------------------------------------------- drawing
def test_colors_distinguish_tokens():
    """A kept patch is untouched, a dropped one pale and gray, a fused one tinted; outlines follow the tokens."""
    image = np.full((36, 36, 3), (200, 40, 40), 'uint8')
    owners = np.array([0, 9, 9, DROPPED, 4, 10, DROPPED, 7, 8])
    drawn = np.asarray(draw_owners(image, owners, scale=2)).astype(int)
    assert drawn.shape == (72, 72, 3)
    np.testing.assert_array_equal(drawn[:24, :24], np.broadcast_to(image[0, 0], (24, 24, 3)))
    pale = drawn[36, 12]
    assert np.ptp(pale) == 0 and pale[0] > 200
    assert tuple(drawn[12, 24]) == PALETTE[0] == tuple(drawn[23, 60]), 'its left and lower edge'
    assert tuple(drawn[24, 60]) == PALETTE[1], 'its upper edge'
    assert tuple(drawn[36, 23]) == DROPPED_OUTLINE, 'its right edge'
    inside = drawn[12, 46:50]
    assert (inside == inside[0]).all() and tuple(inside[0]) != PALETTE[0], 'no line inside a fused token'


def test_merged_patches_take_their_mean_color():
    """Patches on their own are untouched; others have the color of all of their token, and an outline around it."""
    image = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], 'uint8').repeat(12, 0).repeat(12, 1)[..., np.newaxis]
    owners = np.array([9, 1, 2, 9, 4, DROPPED, 6, 16, 16])
    drawn = np.asarray(draw_owners(image, owners, merged=True)).astype(int)
    assert (drawn[:12, 12:] == image[:12, 12:]).all() and (drawn[12:24, 12:24] == 50).all()
    assert (drawn[1:23, 1:11] == 25).all(), 'the mean of 10 and 40'
    assert (drawn[25:35, 13:35] == 85).all(), 'the mean of 80 and 90'
    outlines = {tuple(drawn[y, x]) for y, x in ((5, 11), (23, 5))}, {tuple(drawn[24, 15]), tuple(drawn[30, 12])}
    assert [len(colors) for colors in outlines] == [1, 1] and outlines[0] != outlines[1]
    assert all(max(color) == 255 and min(color) == 0 for colors in outlines for color in colors)
    assert drawn[18, 30].min() > 200, 'a dropped patch is pale'
    assert merged_counts(owners) == '4 alone, 4 in 2, 1 dropped'
    assert merged_counts(np.array([0, 5, 5, 3])) == '2 alone, 2 merged into 1'


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('side', [8, 16, 224])
def test_a_strip_of_any_size(side, channels):
    """Small images are enlarged; many fused tokens still fit the width of their panel."""
    image = pixels(size=(side, side), channels=channels)
    many = np.arange(16) // 2 + 16
    for owners in (np.where(np.arange(16) < 5, np.arange(16), DROPPED), many):
        strip = np.asarray(draw_strip('photos/' + 'long ' * 40 + '\udcff.png', image, [Reduction(3, owners)]))
        assert strip.shape[1] == 2 * MARGIN + 2 * 224 + GAP
        assert (strip[:, -MARGIN:] == 255).all() and (strip[:, MARGIN + 224 : MARGIN + 224 + GAP] == 255).all()
        original = strip[MARGIN : MARGIN + 224, MARGIN : MARGIN + 224]
        np.testing.assert_array_equal(original[:: 224 // side, :: 224 // side], np.broadcast_to(image, (side, side, 3)))


def test_long_paths_lose_their_beginning():
    assert shorten('a/cat.png', 200) == 'a/cat.png'
    short = shorten('a' * 99 + '/cat.png', 200)
    assert short.startswith('…aaa') and short.endswith('aaa/cat.png')


def test_tile():
    strips = [Image.new('RGB', (3, 2), (n, n, n)) for n in range(5)]
    grid = np.asarray(tile(strips, 2))
    assert grid.shape == (6, 6, 3)
    assert grid[::2, ::3, 0].tolist() == [[0, 1], [2, 3], [4, 255]]
    assert tile(strips, 9).size == (15, 2)


def test_no_picture_replaces_another(tmp_path):
    names = ['a/1.jpg', 'b/1.png', '1_tokens.png', 'a/2.jpg']
    targets = strip_paths([str(tmp_path / name) for name in names], str(tmp_path))
    made = ['1_tokens2.png', '1_tokens3.png', '1_tokens_tokens.png', '2_tokens.png']
    assert targets == [str(tmp_path / name) for name in made]


# ---------------------------------------------------------------------------------------------------- the command
def test_command(tmp_path):
    """Folders and files, two images of one name, an unreadable one: strips, a grid, and a line for each."""
    cfg = configuration(tmp_path)
    arguments = ['-cfg', cfg, '-pretrained', weights(tmp_path, cfg), '-output', 'out', '-grid=grid.png', '-columns=2']
    wide = save(tmp_path / 'photos' / 'a' / 'cat.png', seed=1, size=(40, 64))
    save(tmp_path / 'photos' / 'b' / 'cat.jpg', seed=2)
    (tmp_path / 'broken.png').write_bytes(b'no image')
    command = [sys.executable, os.path.join(ROOT, 'tools', 'visualize_tokens.py'), *arguments, 'photos', 'broken.png']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'broken.png: not an image that Pillow knows' in done.stderr
    assert done.stdout.splitlines()[-3:] == [
        'photos/a/cat.png: out/cat_tokens.png',
        'photos/b/cat.jpg: out/cat_tokens2.png',
        '3 images, 1 of them unreadable',
    ]
    assert sorted(os.listdir(tmp_path / 'out')) == ['cat_tokens.png', 'cat_tokens2.png']

    strip, other, grid = (
        np.asarray(Image.open(tmp_path / name)) for name in ('out/cat_tokens.png', 'out/cat_tokens2.png', 'grid.png')
    )
    seen = build_transform(get_config(cfg), training=False).image(Image.open(wide), np.random.default_rng(0))
    left = strip[MARGIN : MARGIN + 224 : 7, MARGIN : MARGIN + 224 : 7]
    np.testing.assert_array_equal(left, seen, 'the first panel is what the model sees')
    assert strip.shape[1] == 2 * MARGIN + 4 * 224 + 3 * GAP
    np.testing.assert_array_equal(grid, np.concatenate([strip, other], 1))


def test_command_with_merging(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = configuration(tmp_path, rate=1.0)
    image = save(tmp_path / 'cat.png')
    main(['-cfg', cfg, '-pretrained', weights(tmp_path, cfg), '-output', 'out', image, '-opts', 'MODEL.TOME.R', '4'])
    assert Image.open('out/cat_tokens.png').width == 2 * MARGIN + 4 * 224 + 3 * GAP


def test_mistakes(tmp_path, monkeypatch):
    """One sentence each, and nothing written."""
    monkeypatch.chdir(tmp_path)
    cfg = configuration(tmp_path)
    given = ['-cfg', cfg, '-pretrained', weights(tmp_path, cfg), '-output', 'out']
    image = save(tmp_path / 'cat.png')
    (tmp_path / 'broken.png').write_bytes(b'no image')
    before = sorted(os.listdir(tmp_path))
    mistakes = {
        'no block of .tiny. reduces its tokens': [*given, image, '-opts', 'MODEL.EVIT.KEEP_RATE', '1.0'],
        'block of .tiny. reduces': [*given, '-grid=grid.png', image, '-opts', 'MODEL.EVIT.DROP_LOC', '()'],
        "there is no file or folder 'missing.png'": [*given, 'missing.png'],
        'none of the 1 images can be read': [*given, '-grid', 'grid.png', 'broken.png'],
        '-columns is 0': [*given, '-columns', '0', image],
        '-grid is .*must end in .png': [*given, '-grid', 'grid.jpg', image],
        "-grid 'cat.png' is the path of another": [*given, '-grid', 'cat.png', image],
        "-grid 'out/cat_tokens.png' is": [*given, '-grid', 'out/cat_tokens.png', image],
        '-pretrained is missing': ['-cfg', cfg, '-output', 'out', image],
        'do not divide|does not divide': [*given, '-image_size', '36', image],
    }
    for message, arguments in mistakes.items():
        with pytest.raises(UserError, match=message):
            main(arguments)
        assert sorted(os.listdir(tmp_path)) == before, message


def test_a_model_without_tokens_to_reduce(tmp_path):
    cfg = tmp_path / 'gmlp.yaml'
    cfg.write_text(
        'DATA: {IMAGE_SIZE: 16}\n'
        'MODEL: {TYPE: gmlp, NUM_CLASSES: 2, MIXER: {PATCH_SIZE: 8, EMBED_DIM: 8, DEPTH: 1, MLP_RATIO: 2}}\n'
    )
    image = save(tmp_path / 'cat.png')
    with pytest.raises(UserError, match='MODEL.TYPE is gmlp, which keeps all tokens'):
        main(['-cfg', str(cfg), '-pretrained', weights(tmp_path, cfg), '-output', str(tmp_path / 'out'), image])
    assert not (tmp_path / 'out').exists()
