# SPDX-License-Identifier: Apache-2.0
"""Mixup (https://arxiv.org/abs/1710.09412) and CutMix (https://arxiv.org/abs/1905.04899) of a batch, as in timm.

Image i of b is mixed with its partner, image b - 1 - i: w * image + (1 - w) * partner. The weight map w is constant for
mixup, and 0 inside and 1 outside a box for CutMix. Targets are mixed with the mean of w. This module imports Paddle, so
worker processes must not import it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F

from utils.device import upload
from utils.errors import UserError


class Mixup:
    """Mixup and CutMix of images and targets.

    Args:
        num_classes: K of the targets.
        mixup_alpha: the weight is ~ Beta(alpha, alpha); 0: no mixup.
        cutmix_alpha: the fraction of the area outside the unclipped box is ~ Beta(alpha, alpha); 0: no CutMix.
        cutmix_minmax: (low, high) of the uniform ratio of the box's sides to the image's; replaces `cutmix_alpha`.
        prob: probability of mixing, per draw.
        switch_prob: probability of CutMix if both are enabled.
        mode: batch: one draw for the batch; pair: one per pair of partners; elem: one per image.
        smoothing: label smoothing, also without mixing.
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
        """Mix a batch of any size; an unpaired image is not changed.

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
            weights = upload(maps[:, None]).astype(images.dtype)
            images = images * weights + images.flip(0) * (1.0 - weights)
        return images, mix_targets(labels, self.num_classes, shares, self.smoothing)

    def draw(self, size: int, height: int, width: int, rng) -> tuple[np.ndarray | None, np.ndarray]:
        """Draw the weights of a batch, in timm's order of random numbers.

        Returns:
            Weight maps float32 [b or 1, H or 1, W or 1] of the images, None without mixing, and the weights of their
            targets [b or 1] float32.
        """
        if self.mode == 'batch':
            cutmix, shares = self._draw_one(rng)
        else:
            cutmix, shares = self._draw_many(size // 2 if self.mode == 'pair' else size, rng)
        maps = np.ones((len(shares), height, width), np.float32)
        for index in np.flatnonzero(shares != 1):
            if cutmix[index]:
                y0, y1, x0, x1 = self._box(height, width, shares[index], rng)
                maps[index, y0:y1, x0:x1] = 0
                shares[index] = 1 - (y1 - y0) * (x1 - x0) / (height * width)
            else:
                maps[index] = shares[index]
        shares = shares.astype(np.float32)
        if self.mode == 'pair':
            middle = slice(0, size % 2)
            shares = np.concatenate([shares, np.ones(1, np.float32)[middle], shares[::-1]])
            maps = np.concatenate([maps, np.ones((1, height, width), np.float32)[middle], maps[::-1]])
        return (None if (maps == 1).all() else maps), shares

    def _draw_one(self, rng) -> tuple[np.ndarray, np.ndarray]:
        """Draw once: True for CutMix [1], and the weight [1], where 1 means no mixing."""
        if rng.random() >= self.prob:
            return np.zeros(1, bool), np.ones(1)
        cutmix = self.cutmix_alpha > 0 and (self.mixup_alpha <= 0 or rng.random() < self.switch_prob)
        alpha = self.cutmix_alpha if cutmix else self.mixup_alpha
        return np.array([cutmix]), np.array([rng.beta(alpha, alpha)])

    def _draw_many(self, count: int, rng) -> tuple[np.ndarray, np.ndarray]:
        """Draw `count` times at once, like `_draw_one`."""
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
    """Return (y0, y1, x0, x1) of the box around a center, clipped; the unclipped box covers 1 - `share` of the area."""
    ratio = np.sqrt(1 - share)
    half_h, half_w = int(height * ratio) // 2, int(width * ratio) // 2
    return max(cy - half_h, 0), min(cy + half_h, height), max(cx - half_w, 0), min(cx + half_w, width)


def mix_targets(labels: paddle.Tensor, num_classes: int, shares: np.ndarray, smoothing: float) -> paddle.Tensor:
    """Compute soft targets w * t + (1 - w) * t of the partner, with t = 1 - s + s/K at the label and s/K elsewhere.

    Args:
        labels: [b] int64.
        shares: [b or 1] float32.

    Returns:
        [b, K] float32.
    """
    off = smoothing / num_classes
    hard = F.one_hot(labels, num_classes) * (1.0 - smoothing) + off
    weights = upload(np.asarray(shares, np.float32)[:, None])
    return hard * weights + hard.flip(0) * (1.0 - weights)


def _integer(rng, low: int, high: int) -> int:
    """Draw an integer, uniform in low .. high - 1; `low` if the range is empty."""
    draw = getattr(rng, 'integers', None) or rng.randint
    return int(draw(low, max(high, low + 1)))
