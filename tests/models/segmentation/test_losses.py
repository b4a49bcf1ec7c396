# SPDX-License-Identifier: Apache-2.0
"""The loss against mmsegmentation's."""

import paddle

from models.layers import resize_maps
from models.segmentation.losses import pixel_losses, segmentation_loss
from tests.conftest import assert_close, golden


def test_loss():
    g = golden('segmentation-loss')
    logits, labels = paddle.to_tensor(g['in/logits'], stop_gradient=False), paddle.to_tensor(g['in/labels'])
    assert_close(resize_maps(logits, labels.shape[1:]), g['out/resized'], 1e-5)
    assert_close(pixel_losses(logits, labels), g['out/per_pixel'], 1e-5)
    loss = segmentation_loss(logits, logits, labels, aux_weight=0.4)
    assert_close(0.4 * loss.auxiliary, g['out/loss_weighted'], 1e-5)
    assert_close(loss.total, 1.4 * loss.decode, 1e-6)
    (0.4 * loss.auxiliary).backward()
    assert_close(logits.grad, g['out/grad'], 1e-5)
    valid = segmentation_loss(logits, None, labels, avg_non_ignore=True)
    assert valid.auxiliary is None and valid.total is valid.decode
    assert_close(valid.total, g['out/loss_valid_mean'], 1e-5)


def test_a_batch_without_labels_has_no_loss():
    logits = paddle.randn([1, 3, 2, 2])
    logits.stop_gradient = False
    labels = paddle.full([1, 4, 4], 7, 'uint8')
    for valid in (False, True):
        total = segmentation_loss(logits, logits, labels, 7, valid).total
        total.backward()
        assert total.item() == 0 and not logits.grad.any()
