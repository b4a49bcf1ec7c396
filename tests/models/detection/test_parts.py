# SPDX-License-Identifier: Apache-2.0
"""Boxes, anchors, matching, non-maximum suppression, ROIAlign and masks against detectron2."""

import numpy as np
import paddle
import pytest
from paddle import to_tensor

from models.detection import nms
from models.detection.anchors import cell_anchors, grid_anchors
from models.detection.boxes import BoxCoder, pairwise_iou
from models.detection.masks import ImageDetections, mask_targets, paste, postprocess, rasterize
from models.detection.matching import IGNORED, NEGATIVE, POSITIVE, match, subsample
from models.detection.nms import choose_detections, greedy_on_device, grouped_nms
from models.detection.roi_align import PyramidPooler, roi_align
from tests.conftest import assert_close, golden
from tests.models.detection.helpers import polygons

NAN = -12345  # stands for it in the vectors


# ---------------------------------------------------------------------------------------------------- boxes
def test_box_coder():
    g = golden('vitdet-boxcoder')
    boxes, targets = to_tensor(g['in/src']), to_tensor(g['in/tgt'])
    for i, weights in enumerate(g.meta['weights']):
        coder = BoxCoder(weights)
        deltas = coder.encode(boxes, targets)
        assert_close(deltas, g[f'out/deltas{i}'], 1e-5)
        assert_close(coder.decode(deltas, boxes), g[f'out/roundtrip{i}'], 1e-5)
        assert_close(coder.decode(to_tensor(g[f'in/rand_deltas{i}']), boxes), g[f'out/decoded{i}'], 1e-5)


def test_anchors():
    g = golden('vitdet-anchors')
    facts = g.meta
    for i, ((size,), grid, stride) in enumerate(zip(facts['sizes'], facts['grids_hw'], facts['strides'])):
        cell = cell_anchors(size, facts['aspect_ratios'])
        assert_close(cell, g[f'out/cell{i}'], 1e-6)
        assert_close(grid_anchors(grid, stride, cell), g[f'out/anchors{i}'], 1e-6)
        anchors = grid_anchors((640 // stride,) * 2, stride, cell)
        assert len(anchors) == g['out/full640_count'][i]
        assert_close(anchors.sum(dtype='float64') / 1e6, g['out/full640_sum'][i], 1e-6)
        assert_close(anchors[-3:], g['out/full640_last3'][i], 1e-6)


# ---------------------------------------------------------------------------------------------------- matching
def test_matching():
    g = golden('vitdet-matcher')
    boxes = to_tensor(g['in/boxes'])
    iou = pairwise_iou(to_tensor(g['in/gt']), boxes)
    assert_close(iou, g['out/iou'], 1e-6)
    disjoint = pairwise_iou(to_tensor(g['in/gt_disjoint']), boxes)
    rpn, roi = (0.3, 0.7, True), (0.5, 0.5, False)
    for name, table, options in (
        ('rpn', iou, rpn),
        ('roi', iou, roi),
        ('rpn_disjoint', disjoint, rpn),
        ('rpn_empty', paddle.zeros([0, 5]), rpn),
        ('roi_empty', paddle.zeros([0, 5]), roi),
    ):
        index, labels = match(table, *options)
        np.testing.assert_array_equal(index, g[f'out/{name}_idx'])
        np.testing.assert_array_equal(labels, g[f'out/{name}_label'])


@pytest.mark.parametrize(('positives', 'negatives'), [(40, 400), (3, 400), (200, 5), (0, 10), (7, 0)])
def test_samples(positives, negatives):
    rng = np.random.default_rng(positives)
    labels = rng.permutation([POSITIVE] * positives + [NEGATIVE] * negatives + [IGNORED] * 30)
    keys = [to_tensor(rng.random(len(labels))) for _ in range(2)]
    first, again, other = (subsample(to_tensor(labels), key, 64, 0.25).numpy() for key in (keys[0], *keys))
    np.testing.assert_array_equal(first, again)
    for kept in (first, other):
        assert (kept == POSITIVE).sum() == min(positives, 16)
        assert (kept == NEGATIVE).sum() == min(negatives, 64 - min(positives, 16))
        assert ((kept == labels) | (kept == IGNORED)).all()
    assert positives <= 16 and negatives <= 64 or (first != other).any()


def test_every_box_is_sampled_equally_often():
    rng, labels = np.random.default_rng(0), to_tensor(np.repeat([POSITIVE, NEGATIVE], [10, 30]))
    counts = sum((subsample(labels, to_tensor(rng.random(40)), 8, 0.5) >= 0).numpy().astype(int) for _ in range(600))
    assert abs(counts[:10] / 600 - 0.4).max() < 0.08 and abs(counts[10:] / 600 - 4 / 30).max() < 0.08


# ---------------------------------------------------------------------------------------------------- suppression
def test_non_maximum_suppression():
    g = golden('vitdet-nms')
    boxes, scores, classes = (to_tensor(g[f'in/{name}']) for name in ('boxes', 'scores', 'classes'))
    for threshold in (0.5, 0.7):
        kept = grouped_nms(boxes, scores, paddle.zeros_like(classes), threshold)
        np.testing.assert_array_equal(kept, g[f'out/nms_{threshold}'])
        kept = grouped_nms(boxes, scores, classes, threshold)
        np.testing.assert_array_equal(kept, g[f'out/batched_nms_{threshold}'])


def test_final_detections():
    g = golden('vitdet-nms')
    boxes, scores = (np.where(g[f'in/{name}'] == NAN, np.nan, g[f'in/{name}']) for name in ('cls_boxes', 'cls_probs'))
    finite = np.flatnonzero(np.isfinite(boxes).all(1) & np.isfinite(scores).all(1))
    assert len(finite) < len(boxes)
    # A second image holds the same, without the region of the best detection.
    valid = np.ones([2, len(boxes)], 'bool')
    valid[1, finite[g['out/final_roi'][0]]] = False
    boxes, scores = (to_tensor(np.stack([values] * 2)) for values in (boxes, scores))
    sizes = to_tensor([[70, 90]] * 2)
    best = choose_detections(boxes, scores, to_tensor(valid), sizes, 0.05, 0.5, 30)
    assert best.valid[0].all().item()
    assert_close(best.boxes[0], g['out/final_boxes'], 1e-6)
    assert_close(best.scores[0], g['out/final_scores'], 1e-6)
    np.testing.assert_array_equal(best.index[0] % 4, g['out/final_classes'])
    np.testing.assert_array_equal(best.index[0] // 4, finite[g['out/final_roi']])
    assert not (best.index[1] // 4 == int(finite[g['out/final_roi'][0]])).any().item()
    nothing = choose_detections(boxes, scores, to_tensor(valid), sizes, 1.0, 0.5, 30)
    assert not nothing.valid.any().item() and not nothing.boxes.any().item() and not nothing.scores.any().item()


def clusters(seed: int, images: int, count: int) -> np.ndarray:
    """Boxes around a few centers, so that many overlap."""
    rng = np.random.default_rng(seed)
    centers, sizes = rng.uniform(0, 200, (images, 8, 2)), rng.uniform(10, 80, (images, 8, 2))
    chosen = rng.integers(0, 8, (images, count, 1))
    centers, sizes = (np.take_along_axis(values, chosen, 1) for values in (centers, sizes))
    centers, sizes = centers + rng.normal(0, 0.15, centers.shape) * sizes, sizes * rng.uniform(0.8, 1.2, sizes.shape)
    return np.concatenate([centers - sizes / 2, centers + sizes / 2], axis=2).astype('float32')


@pytest.mark.parametrize('pairs', [1, 2**23])
def test_suppression_without_waiting_is_the_greedy_one(monkeypatch, pairs):
    monkeypatch.setattr(nms, '_PAIRS', pairs)
    boxes, usable = clusters(0, 3, 150), np.random.default_rng(1).random((3, 150)) < 0.9
    boxes[0, 1] = boxes[0, 0]  # of equal boxes the first one
    boxes[1, 5:7, 2] = boxes[1, 5:7, 0]  # without area
    for threshold in (0.3, 0.5, 0.7):
        kept, settled = greedy_on_device(to_tensor(boxes), to_tensor(usable), threshold)
        assert settled.item() and kept.shape == [3, 150]
        for image in range(3):
            rows = np.flatnonzero(usable[image])
            scores = to_tensor(-np.arange(len(rows), dtype='float32'))
            expected = grouped_nms(to_tensor(boxes[image, rows]), scores, paddle.zeros_like(scores, 'int64'), threshold)
            found = np.flatnonzero(kept[image])
            np.testing.assert_array_equal(found, rows[expected.numpy()])
            assert 10 < len(found) < len(rows) / 2 or threshold > 0.5


def test_a_chain_of_boxes_that_needs_more_rounds_is_not_settled():
    """Each box overlaps its neighbors alone, so that the greedy algorithm keeps every second one."""
    starts = np.arange(40, dtype='float32')
    chain = to_tensor(np.stack([starts, 0 * starts, starts + 4, 0 * starts + 1], axis=1)[None])
    usable = paddle.ones([1, 40], 'bool')
    assert not greedy_on_device(chain, usable, 0.5)[1].item()
    kept, settled = greedy_on_device(chain[:, : nms.ROUNDS - 1], usable[:, : nms.ROUNDS - 1], 0.5)
    assert settled.item() and kept[0].tolist() == [place % 2 == 0 for place in range(nms.ROUNDS - 1)]


# ---------------------------------------------------------------------------------------------------- regions
@pytest.mark.parametrize('output', [7, 14])
def test_roi_align(output):
    """Values in training and evaluation, and gradients, of regions without area, thinner than a cell and outside too."""
    g = golden('vitdet-roialign')
    order = np.argsort(g['in/rois'][:, 0], kind='stable')
    rois, back = to_tensor(g['in/rois'][order]), to_tensor(np.argsort(order))
    x = to_tensor(g['in/x'], stop_gradient=False)
    for maps in (x, x.detach()):
        pooled = roi_align(maps, rois[:, 1:], rois[:, 0].astype('int64'), output, 0.25)
        assert_close(paddle.gather(pooled, back), g[f'out/pool{output}'])
        if not maps.stop_gradient:
            (paddle.gather(pooled, back) * to_tensor(g[f'in/gradout{output}'])).sum().backward()
            assert_close(x.grad, g[f'out/gradx{output}'], 1e-5)


def test_pyramid_pooler():
    g = golden('vitdet-roialign')
    pooler = PyramidPooler((4, 8, 16, 32), 7)
    np.testing.assert_array_equal(pooler.levels(to_tensor(g['in/level_boxes'])), g['out/levels'])
    pooler = PyramidPooler((4, 8, 16, 32), 7, g.meta['pooler']['canonical_box_size'])
    boxes, images = np.concatenate([g['in/pool_boxes0'], g['in/pool_boxes1']]), np.repeat([0, 1], 4)
    boxes, images = to_tensor(boxes), to_tensor(images)
    np.testing.assert_array_equal(pooler.levels(boxes), g['out/pooler_levels'])
    maps = [to_tensor(g[f'in/pool_feat{level}']) for level in range(4)]
    assert_close(pooler(maps, boxes, images), g['out/pooler'])


# ---------------------------------------------------------------------------------------------------- masks
def test_masks_of_polygons():
    g = golden('vitdet-masks')
    instances = polygons(g.group('in'), 'poly', 7)
    bitmaps = rasterize(instances, *g.meta['image_hw'])
    np.testing.assert_array_equal(bitmaps, g['out/bitmask'])
    np.testing.assert_array_equal(mask_targets(instances, g['in/crop_boxes'], 28), g['out/crop28'])
    np.testing.assert_array_equal(mask_targets(list(bitmaps), g['in/crop_boxes'], 28), g['out/crop28_bitmask'])
    mixed = mask_targets([instances[0], bitmaps[1], instances[2]], g['in/crop_boxes'][:3], 28)
    np.testing.assert_array_equal(mixed[::2], g['out/crop28'][:3:2])
    np.testing.assert_array_equal(mixed[1], g['out/crop28_bitmask'][1])
    assert rasterize([], 4, 5).shape == (0, 4, 5) and mask_targets([], np.zeros([0, 4]), 28).shape == (0, 28, 28)


def test_pasted_masks():
    g = golden('vitdet-masks')
    soft = paste(g['in/paste_masks'], g['in/paste_boxes'], *g.meta['image_hw'])
    assert_close(soft, g['out/paste_soft'], 1e-5)
    certain = np.abs(g['out/paste_soft'] - 0.5) > 1e-4
    np.testing.assert_array_equal((soft >= 0.5)[certain], g['out/paste_bool'][certain])


def test_detections_in_the_original_image(monkeypatch):
    """The boxes of the vectors are in pixels of the output, since detectron2 scales them in place."""
    g = golden('vitdet-masks')
    size = height, width = tuple(g.meta['post_output_hw'])
    scale = np.array([width / 52, height / 40] * 2, 'float32')
    numbers = np.arange(6)
    given = ImageDetections(g['in/post_boxes'] / scale, numbers / 10, numbers, g['in/paste_masks'])
    for cells in (2**26, 2 * height * width):
        monkeypatch.setattr('models.detection.masks.PASTE_CELLS', cells)
        found = postprocess(given, (40, 52), size)
        assert_close(found.boxes, g['out/post_boxes'], 1e-5)
        np.testing.assert_array_equal(found.classes, g['out/post_kept'])
        np.testing.assert_array_equal(found.scores, found.classes / 10)
        assert (found.masks != g['out/post_masks']).mean() < 1e-4 and found.masks.dtype == bool
