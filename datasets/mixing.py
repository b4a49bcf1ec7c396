# SPDX-License-Identifier: Apache-2.0
"""Mixup (https://arxiv.org/abs/1710.09412) and CutMix (https://arxiv.org/abs/1905.04899) of a batch, as in timm.

Each image is mixed with its partner, the image at the mirrored place of the batch. One formula covers all variants: with a
weight map w, constant for mixup, 0 inside and 1 outside a box for cutmix, the result is w * image + (1 - w) * partner, and
the targets are mixed with the mean of w. Imports Paddle: not for worker processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F

from utils.errors import UserError


class Mixup:
    """Mixes images and targets.

    Args:
        num_classes: K of the targets.
        mixup_alpha: the weight is ~ Beta(alpha, alpha); 0: no mixup.
        cutmix_alpha: the area outside the box, before it is clipped, is ~ Beta(alpha, alpha); 0: no cutmix.
        cutmix_minmax: (low, high) share of each side of the box instead, uniform; turns cutmix on.
        prob: probability of mixing at all, per draw.
        switch_prob: probability of cutmix where both are on.
        mode: batch: one draw for all; pair: one per pair of partners; elem: one per image.
        smoothing: of the targets; also where nothing is mixed.
    """

    def __init__(
        self,
        num_classes: int,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = 'batch',
        smoothing: float = 0.1,
    ):
        if cutmix_minmax:
            low, high = cutmix_minmax
            if not 0 <= low < high <= 1:
                raise UserError(f'TRAIN.CUTMIX_MINMAX is {tuple(cutmix_minmax)}, but must be (low, high) in [0, 1].')
            cutmix_alpha = 1.0
        if mixup_alpha <= 0 and cutmix_alpha <= 0:
            raise ValueError('neither mixup nor cutmix is on')
        self.num_classes = num_classes
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.cutmix_minmax = cutmix_minmax
        self.prob = prob
        self.switch_prob = switch_prob
        self.mode = mode
        self.smoothing = smoothing

    def __call__(
        self, images: paddle.Tensor, labels: paddle.Tensor, rng: np.random.Generator
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Mixes a batch of any size; an unpaired image stays as it is.

        Args:
            images: [b, C, H, W] float.
            labels: [b] int64.
            rng: a numpy Generator, or anything with numpy's older methods (RandomState, numpy.random).

        Returns:
            Images [b, C, H, W] and soft targets [b, K] float32.
        """
        size, _, height, width = images.shape
        maps, shares = self.draw(size, height, width, rng)
        if maps is not None:
            weights = paddle.to_tensor(maps[:, None], images.dtype)
            images = images * weights + images.flip(0) * (1.0 - weights)
        return images, mix_targets(labels, self.num_classes, shares, self.smoothing)

    def draw(self, size: int, height: int, width: int, rng) -> tuple[np.ndarray | None, np.ndarray]:
        """Draws how a batch is mixed, in timm's order of random numbers.

        Returns:
            Weight maps float32 [b or 1, H or 1, W or 1] of the images themselves, None where nothing is mixed, and the
            share of their own target [b or 1] float32.
        """
        if self.mode == 'batch':
            cutmix, shares = self._draw_one(rng)
        else:
            cutmix, shares = self._draw_many(size // 2 if self.mode == 'pair' else size, rng)
        maps = np.ones((len(shares), height, width), np.float32)
        for place in np.flatnonzero(shares != 1):
            if cutmix[place]:
                y0, y1, x0, x1 = self._box(height, width, shares[place], rng)
                maps[place, y0:y1, x0:x1] = 0
                shares[place] = 1 - (y1 - y0) * (x1 - x0) / (height * width)
            else:
                maps[place] = shares[place]
        shares = shares.astype(np.float32)
        if self.mode == 'pair':
            middle = slice(0, size % 2)
            shares = np.concatenate([shares, np.ones(1, np.float32)[middle], shares[::-1]])
            maps = np.concatenate([maps, np.ones((1, height, width), np.float32)[middle], maps[::-1]])
        return (None if (maps == 1).all() else maps), shares

    def _draw_one(self, rng) -> tuple[np.ndarray, np.ndarray]:
        """Whether it is cutmix [1], and its weight [1]: 1 is no mixing."""
        if rng.random() >= self.prob:
            return np.zeros(1, bool), np.ones(1)
        cutmix = self.cutmix_alpha > 0 and (self.mixup_alpha <= 0 or rng.random() < self.switch_prob)
        alpha = self.cutmix_alpha if cutmix else self.mixup_alpha
        return np.array([cutmix]), np.array([rng.beta(alpha, alpha)])

    def _draw_many(self, count: int, rng) -> tuple[np.ndarray, np.ndarray]:
        """The same for `count` draws at once."""
        if self.mixup_alpha > 0 and self.cutmix_alpha > 0:
            cutmix = rng.random(count) < self.switch_prob
            by_cutmix = rng.beta(self.cutmix_alpha, self.cutmix_alpha, count)
            weights = np.where(cutmix, by_cutmix, rng.beta(self.mixup_alpha, self.mixup_alpha, count))
        else:
            alpha = max(self.mixup_alpha, self.cutmix_alpha)
            cutmix = np.full(count, self.cutmix_alpha > 0)
            weights = rng.beta(alpha, alpha, count)
        return cutmix, np.where(rng.random(count) < self.prob, weights, 1).astype(np.float32)

    def _box(self, height: int, width: int, share: float, rng) -> tuple[int, int, int, int]:
        if self.cutmix_minmax:
            low, high = self.cutmix_minmax
            h = _integer(rng, int(height * low), int(height * high))
            w = _integer(rng, int(width * low), int(width * high))
            y0, x0 = _integer(rng, 0, height - h), _integer(rng, 0, width - w)
            return y0, y0 + h, x0, x0 + w
        return cutmix_box(height, width, share, _integer(rng, 0, height), _integer(rng, 0, width))


def cutmix_box(height: int, width: int, share: float, cy: int, cx: int) -> tuple[int, int, int, int]:
    """(y0, y1, x0, x1) of the box about a centre that leaves `share` of the area before it is clipped to the image."""
    ratio = np.sqrt(1 - share)
    half_h, half_w = int(height * ratio) // 2, int(width * ratio) // 2
    return max(cy - half_h, 0), min(cy + half_h, height), max(cx - half_w, 0), min(cx + half_w, width)


def mix_targets(labels: paddle.Tensor, num_classes: int, shares: np.ndarray, smoothing: float) -> paddle.Tensor:
    """Soft targets share * t + (1 - share) * partner's t, where t is 1 - s + s/K at the label and s/K elsewhere.

    Args:
        labels: [b] int64.
        shares: [b or 1] float32.

    Returns:
        [b, K] float32.
    """
    off = smoothing / num_classes
    hard = F.one_hot(labels, num_classes) * (1.0 - smoothing) + off
    weights = paddle.to_tensor(np.asarray(shares, np.float32)[:, None])
    return hard * weights + hard.flip(0) * (1.0 - weights)


def _integer(rng, low: int, high: int) -> int:
    """Uniform in low .. high - 1; `low` itself where the range is empty."""
    draw = getattr(rng, 'integers', None) or rng.randint
    return int(draw(low, max(high, low + 1)))
