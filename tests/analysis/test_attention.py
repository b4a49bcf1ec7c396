# SPDX-License-Identifier: Apache-2.0
"""Attention distance, attention entropy and CKA against reference values, and their invariants."""

import math

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.attention import (
    CKA,
    AttentionStatistics,
    compare_layers,
    mean_grid_distance,
    measure_attention,
    representations,
)
from models.vision_transformer import VisionTransformer
from models.weights.convert import port_state_dict
from tests.conftest import golden
from tests.models.helpers import vision_transformer
from tests.models.test_vision_transformer import tiny
from utils.errors import UserError

ATTENTION, FEATURES, PIPELINE = (golden(f'analysis-{name}') for name in ('attention', 'cka', 'pipeline'))


def close(actual, expected, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


def scores(*shape: int, seed: int = 0) -> paddle.Tensor:
    return paddle.to_tensor(3 * np.random.default_rng(seed).standard_normal(shape), 'float32')


# ---------------------------------------------------------------------------------------------------- attention
def test_entropy_and_distance_of_the_original():
    statistics = AttentionStatistics(depth=2)
    for batch in range(3):
        for layer in range(2):
            statistics.add(layer, paddle.to_tensor(ATTENTION[f'in/logits_batch{batch}_layer{layer}']))
    result = statistics.result()
    close(result['entropy'], ATTENTION['out/entropy'], 1e-5)
    close(result['distance'], ATTENTION['out/distance'], 1e-3)
    assert statistics.tokens == [25, 25]
    assert mean_grid_distance((5, 5)) == pytest.approx(ATTENTION['out/dist_matrix'].mean(), abs=1e-4)


def test_even_attention():
    """The published ranges at 14 x 14 patches."""
    statistics = AttentionStatistics(depth=1)
    statistics.add(0, paddle.zeros([2, 3, 197, 197]))
    result = statistics.result()
    close(result['entropy'], [[math.log(196)] * 3], 1e-3)
    close(result['distance'], [[101.93] * 3], 0.005)
    assert mean_grid_distance((14, 14)) == pytest.approx(result['distance'][0][0], abs=1e-4)
    assert mean_grid_distance((14, 14), 16) == pytest.approx(mean_grid_distance((14, 14)) * 16 / 14)


def test_a_head_that_looks_at_itself_and_one_that_looks_at_the_first_patch():
    logits = np.zeros([1, 2, 10, 10])
    logits[0, 0] = 1e3 * np.eye(10)
    logits[0, 1, :, 1] = logits[0, 1, :, 0] = 1e3  # the class token too, which is left out
    statistics = AttentionStatistics(depth=2, patch_distance=1.0)
    statistics.add(1, paddle.to_tensor(logits, 'float32'))
    result = statistics.result()
    assert result['entropy'][0] is None and result['distance'][0] is None
    close(result['entropy'][1], [0, 0], 1e-5)
    close(result['distance'][1], [0, np.mean([math.hypot(r, c) for r in range(3) for c in range(3)])], 1e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 2))
def test_every_image_or_every_batch_counts_the_same(sizes, num_prefix):
    logits = scores(sum(sizes), 2, 9 + num_prefix, 9 + num_prefix)
    batches = paddle.split(logits, sizes) if len(sizes) > 1 else [logits]

    def measured(parts, **options) -> np.ndarray:
        statistics = AttentionStatistics(1, **options)
        for part in parts:
            statistics.add(0, part, num_prefix)
        return np.array(list(statistics.result().values()))

    alone = [measured([batch]) for batch in batches]
    close(measured(batches), np.mean(alone, axis=0), 1e-9)
    close(measured(batches, per_image=True), np.average(alone, axis=0, weights=sizes), 1e-9)
    close(measured(batches, per_image=True), measured([logits]), 1e-9)


def test_places_of_its_own_for_each_image():
    logits, rng = scores(20, 2, 5, 5), np.random.default_rng(0)
    positions = rng.random((20, 4, 2))
    statistics = AttentionStatistics(1, patch_distance=1.0)
    statistics.add(0, logits, 1, paddle.to_tensor(positions))
    weights = np.exp(logits.numpy()[:, :, 1:, 1:].astype('float64'))
    weights /= weights.sum(-1, keepdims=True)
    distances = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1)
    expected = (weights * distances[:, None]).sum(-1).mean((0, 2))
    close(statistics.result()['distance'][0], expected, 1e-6)


def test_attention_that_cannot_be_measured():
    with pytest.raises(UserError, match='12 patches form no square'):
        AttentionStatistics(1).add(0, scores(2, 2, 13, 13))
    for bad in (math.nan, math.inf, -math.inf):
        statistics, damaged = AttentionStatistics(3), scores(2, 2, 10, 10).numpy()
        damaged[1, 0, 4, 7] = bad
        statistics.add(2, paddle.to_tensor(damaged))
        with pytest.raises(UserError, match='block 2 is not finite'):
            statistics.result()


# ---------------------------------------------------------------------------------------------------- similarity
def test_cka_of_the_original():
    cka = CKA()
    for batch in range(3):
        cka.add(*([paddle.to_tensor(FEATURES[f'in/f{m}_batch{batch}_{i}']) for i in range(m + 2)] for m in (1, 2)))
    close(cka.result(), FEATURES['out/cka'], 1e-3)
    ours, means = cka.hsic(), FEATURES['out/hsic_mean']
    np.testing.assert_allclose(ours[:3, 3:], means[:, :, 1], rtol=1e-4, atol=1e-4 * np.abs(means).max())
    np.testing.assert_allclose(np.diagonal(ours)[:3], means[:, 0, 0], rtol=1e-4)
    np.testing.assert_allclose(np.diagonal(ours)[3:], means[0, :, 2], rtol=1e-4)
    assert cka.images == 22


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(1e-3, 1e3), st.lists(st.integers(4, 9), min_size=1, max_size=3))
def test_rotated_and_scaled_features_are_the_same(seed, factor, sizes):
    rng, cka = np.random.default_rng(seed), CKA()
    rotation = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    mixing = rng.standard_normal((12, 12))
    for size in sizes:
        x = rng.standard_normal((size, 12))
        layers = [x, factor * x @ rotation, np.tanh(x @ mixing)]
        cka.add(*[[paddle.to_tensor(layer.reshape(size, 3, 4)) for layer in layers]] * 2)
    result = cka.result()
    close(result[0, 1], 1, 1e-9)
    close(result, result.T, 1e-9)
    close(np.diagonal(result), 1, 1e-9)
    close(result[0], result[1], 1e-9)


def test_the_estimate_is_unbiased():
    """Unrelated features: around 0 even for batches of four, where the biased estimate is near 1."""
    rng, cka = np.random.default_rng(0), CKA()
    for _ in range(2000):
        cka.add(*([paddle.to_tensor(rng.standard_normal((4, 3)))] for _ in range(2)))
    assert abs(cka.result().item()) < 0.1


def test_cka_that_cannot_be_estimated():
    x = scores(8, 3)
    with pytest.raises(UserError, match='at least 4 images, not 3'):
        CKA().add([x[:3]], [x[:3]])
    with pytest.raises(UserError, match='there is none'):
        CKA().result()
    cka = CKA()
    cka.add([x, x * math.inf], [x])
    with pytest.raises(UserError, match='layer 1 of the first model is not finite'):
        cka.result()
    cka = CKA()
    cka.add([x, paddle.full([8, 3], 0.1)], [paddle.zeros([8, 2]), x, x + 1])
    assert np.isnan(cka.result()).tolist() == [[True, False, False], [True] * 3]


# ---------------------------------------------------------------------------------------------------- models
def upstream(number: int) -> VisionTransformer:
    model = vision_transformer(num_classes=3, **PIPELINE.meta[f'model{number}'])
    model.set_state_dict(port_state_dict(model, PIPELINE.group(f'sd/model{number}')))
    model.eval()
    return model


def test_the_originals_pipeline():
    first, second = upstream(1), upstream(2)
    batches = [paddle.to_tensor(PIPELINE[f'in/x_batch{i}']) for i in range(2)]
    with paddle.no_grad():
        for number, model in ((1, first), (2, second)):
            layers = list(representations(model, batches[0]))
            assert len(layers) == model.depth + 1
            for i, layer in enumerate(layers):
                assert layer.shape[1] == 196
                close(layer[0, :4], PIPELINE[f'out/rep{number}_{i}_slice'], 2e-4)
            features = model.forward_head(model.forward_features(batches[0]), pre_logits=True)
            close(features, PIPELINE[f'out/feat{number}'], 2e-4)
        seen = first.forward_intermediates(batches[0], [0], ['attn_logits'])
    close(seen.blocks[0].attn_logits[0, :, :3], PIPELINE['out/logits_layer1_sample0_rows'], 2e-4)

    measured = measure_attention(first, batches)
    close(measured['entropy'], PIPELINE['out/entropy'], 1e-4)
    close(measured['distance'], PIPELINE['out/distance'], 1e-2)
    assert measured['images'] == 12 and measured['tokens'] == [196] * 3
    cka, images = compare_layers(first, second, zip(batches, batches))
    close(cka, PIPELINE['out/cka'], 2e-3)
    assert images == 12


def randomized(**settings) -> VisionTransformer:
    """Build a tiny model of 16 patches with random attention weights."""
    paddle.seed(0)
    model = tiny(**settings)
    for parameter in model.parameters():
        parameter.set_value(parameter + 0.2 * paddle.randn(parameter.shape))
    model.eval()
    return model


IMAGES = paddle.to_tensor(np.random.default_rng(0).standard_normal((12, 3, 32, 32)), 'float32')
VARIANTS = {
    'pooling': {'global_pool': True},
    'distilled': {'distilled': True},
    'relative positions': {'relative_positions': ('block', 'shared'), 'absolute_positions': False, 'layer_scale': 0.1},
    'fused': {'keep_rate': [0.5, 0.5, 1.0], 'fuse_token': True},
    'dropped': {'keep_rate': [1.0, 0.5, 1.0]},
    'no attention': {'removed_layers': [1]},
    'faded': {'done_layers': [1]},
}


@pytest.mark.parametrize('settings', VARIANTS.values(), ids=VARIANTS)
def test_every_vision_transformer(settings):
    model = randomized(**settings)
    before = model(IMAGES)
    measured = measure_attention(model, [IMAGES[:5], IMAGES[5:]])
    left = set(range(3)) - {*settings.get('removed_layers', ()), *settings.get('done_layers', ())}
    for layer in range(3):
        if layer not in left:
            assert measured['tokens'][layer] is measured['entropy'][layer] is measured['distance'][layer] is None
            continue
        assert len(measured['entropy'][layer]) == 3
        assert (
            0 < min(measured['entropy'][layer]) <= max(measured['entropy'][layer]) < math.log(measured['tokens'][layer])
        )
        assert 0 < min(measured['distance'][layer]) <= max(measured['distance'][layer]) < 14 * math.hypot(3, 3)
    cka, _ = compare_layers(model, model, [(IMAGES, IMAGES)])
    close(np.diagonal(cka), 1, 1e-9)
    assert np.array_equal(model(IMAGES), before)


def test_fewer_tokens():
    assert measure_attention(randomized(**VARIANTS['fused']), [IMAGES])['tokens'] == [16, 9, 6]
    assert measure_attention(randomized(**VARIANTS['dropped']), [IMAGES])['tokens'] == [16, 16, 8]
    model = randomized(distilled=True)
    model.merge_tokens(4)
    assert measure_attention(model, [IMAGES])['tokens'] == [16, 12, 8]
    close(np.diagonal(compare_layers(model, model, [(IMAGES, IMAGES)])[0]), 1, 1e-9)


def test_a_dropped_patch_is_zero_and_a_merged_one_a_copy():
    model = randomized(**VARIANTS['dropped'])
    *_, before, last, _ = representations(model, IMAGES)
    kept = model(IMAGES, get_idx=True)[1][0].numpy()
    for image, patches in enumerate(np.abs(last.numpy()).sum(-1)):
        assert set(np.flatnonzero(patches)) == set(kept[image])
    model = randomized()
    model.merge_tokens([0, 5])
    state = model.forward_tokens(IMAGES, trace=True)[1]
    for patches, source in zip(list(representations(model, IMAGES))[2].numpy(), state.source.numpy()):
        holder = source[1:, 1:].argmax(0)
        assert len(np.unique(holder)) == len(np.unique(patches.round(4), axis=0)) == 11
        assert all(np.array_equal(patches[i], patches[np.flatnonzero(holder == holder[i])[0]]) for i in range(16))


def test_position_of_a_merged_token_is_the_mean_of_its_patches():
    """Uniform attention: its distance is that of the positions."""
    model = randomized()
    model.merge_tokens([6], prop_attn=False)
    model.blocks[1].attn.qkv.weight.set_value(paddle.zeros_like(model.blocks[1].attn.qkv.weight))
    model.blocks[1].attn.qkv.bias.set_value(paddle.zeros_like(model.blocks[1].attn.qkv.bias))
    state = model.forward_tokens(IMAGES, trace=True)[1]
    rows, columns = np.divmod(np.arange(16), 4)
    expected = []
    for source in state.source.numpy()[:, 1:, 1:]:
        positions = np.array([[rows[token > 0].mean(), columns[token > 0].mean()] for token in source])
        expected.append(np.linalg.norm(positions[:, None] - positions[None], axis=-1).mean())
    measured = measure_attention(model, [IMAGES], patch_distance=8)
    close(measured['distance'][1], [8 * np.mean(expected)] * 3, 1e-4)
    close(measured['entropy'][1], [math.log(10)] * 3, 1e-4)


def test_a_block_without_attention_is_seen_through_its_other_norm():
    removed, faded = randomized(removed_layers=[1]), randomized(done_layers=[1])
    faded.set_state_dict({**faded.state_dict(), **removed.state_dict()})
    for ours, theirs in zip(representations(removed, IMAGES), representations(faded, IMAGES)):
        close(ours, theirs, 1e-6)
    layers = []
    hook = removed.blocks[1].norm2.register_forward_post_hook(lambda _, __, output: layers.append(output))
    seen = list(representations(removed, IMAGES))[1]
    hook.remove()
    close(seen, layers[0][:, 1:], 1e-6)


def test_batches_of_fewer_than_four_images_are_left_out():
    model = randomized()
    whole, images = compare_layers(model, model, [(IMAGES[:8], IMAGES[:8]), (IMAGES[8:11], IMAGES[8:11])])
    assert images == 8
    close(whole, compare_layers(model, model, [(IMAGES[:8], IMAGES[:8])])[0], 0)
    with pytest.raises(UserError, match='there is none'):
        compare_layers(model, model, [(IMAGES[:3], IMAGES[:3])])
