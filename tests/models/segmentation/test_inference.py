# SPDX-License-Identifier: Apache-2.0
"""Sliding-window and whole-image inference against mmsegmentation's, around a single convolution."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

from models.layers import resize_maps
from models.segmentation.inference import slide_inference, whole_inference, window_spans
from tests.conftest import assert_close, golden


@pytest.fixture(scope='module')
def case():
    g = golden('segmentation-slide')
    net = nn.Conv2D(3, 5, 5, 4, 2)
    net.set_state_dict({name: g[f'sd/conv.{name}'] for name in ('weight', 'bias')})
    return g, net


def agree(logits, size, expected):
    """Predictions at another size, where the two best classes are apart."""
    resized = resize_maps(logits, size)[0].numpy()
    best = np.sort(resized, axis=0)
    apart = best[-1] - best[-2] > 1e-4
    assert apart.mean() > 0.99
    np.testing.assert_array_equal(resized.argmax(0)[apart], expected[apart])


@paddle.no_grad()
def test_windows(case):
    g, net = case
    for k in range(5):
        image = paddle.to_tensor(g[f'in/image{k}'].astype('float32'))
        logits = slide_inference(net, image, g.meta['crop'], g.meta['stride'][0])
        assert_close(logits[0, :, ::2, ::3], g[f'out/slide{k}'], 1e-5)
        agree(logits, g[f'in/ori{k}'], g[f'out/slide{k}_rescaled_argmax'])
        rows, columns = (window_spans(length, 32, 21) for length in image.shape[2:])
        expected = [list(window[1:]) for window in g['out/windows'] if window[0] == k]
        assert [[*row, *column] for row in rows for column in columns] == expected


def test_the_windows_of_segmenter():
    windows = golden('segmentation-segmenter')['out/windows']
    for case in np.unique(windows[:, 0]):
        rows = windows[windows[:, 0] == case]
        spans = [window_spans(int(length), 48, 32) for length in rows[0, 1:3]]
        assert [[y, x] for y, _ in spans[0] for x, _ in spans[1]] == rows[:, 3:].tolist()


@paddle.no_grad()
def test_whole_images_and_averages_over_scales_and_flips(case):
    g, net = case
    image = paddle.to_tensor(g['in/image0'].astype('float32'))
    assert_close(whole_inference(net, image)[0], g['out/whole0'], 1e-5)
    for name, infer in (('whole', whole_inference), ('slide', lambda net, x: slide_inference(net, x, 32, 21))):
        maps = []
        for scale in ('0.75', '1.0', '1.5'):
            image = paddle.to_tensor(g[f'in/tta_{scale}'])
            for flip in (False, True):
                logits = infer(net, image.flip(3) if flip else image)
                probability = F.softmax(resize_maps(logits, g['in/ori0']), axis=1)
                maps.append(probability.flip(3) if flip else probability)
        assert_close(sum(maps)[0] / len(maps), g[f'out/tta_{name}_probability'], 1e-4)


class Grid(nn.Layer):
    """Logits that are the means of patches."""

    def __init__(self, patch_size, image_size=None):
        super().__init__()
        self.patch_size, self.image_size, self.fixed_size = patch_size, image_size, image_size is not None

    def forward(self, x):
        assert not self.fixed_size or x.shape[2:] == [self.image_size] * 2
        assert not x.shape[2] % self.patch_size and not x.shape[3] % self.patch_size
        return F.avg_pool2d(x, self.patch_size)


def test_images_are_padded_to_what_the_model_takes():
    image = paddle.ones([1, 1, 20, 9])
    for model in (Grid(8), Grid(8, 32)):
        logits = whole_inference(model, image)
        assert logits.shape == [1, 1, 20, 9]
        assert logits[0, 0, :12, :4].unique().tolist() == [1.0]
    assert slide_inference(Grid(8, 32), paddle.ones([1, 1, 40, 9]), 32, 20).shape == [1, 1, 40, 9]
