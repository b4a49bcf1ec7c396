# SPDX-License-Identifier: Apache-2.0
"""Two augmented views of each training image for MoCo v3 (DATA.VIEWS 2).

MoCo v3 (https://arxiv.org/abs/2104.02057) uses the views of BYOL (https://arxiv.org/abs/2006.07733). The order of the steps
is that of MAE-Lite (https://arxiv.org/abs/2205.14443). Steps take Pillow images, RGB or L; color steps do not change L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from datasets.augment import ColorJitter, blur, grayscale, solarize
from datasets.bands import PLAIN
from datasets.sample import IMAGE, Plane, Sample
from utils.errors import UserError

JITTER, GRAY = 0.8, 0.2  # probabilities in both views
BLUR, SOLARIZE = 0.1, 0.2  # probabilities in the second view; the first is always blurred and never solarized
STRENGTHS = (0.4, 0.4, 0.2, 0.1)  # color jitter: brightness, contrast, saturation, hue
RADII = (0.1, 2.0)  # range of the blur radius, pixels
THRESHOLD = 128  # solarization inverts values of at least this


class Views:
    """Several transforms of the same image, with one random generator.

    Attributes:
        planes: one plane of shape (views, H, W, C).
    """

    def __init__(self, transforms: Sequence):
        self.transforms = list(transforms)
        self.planes = (Plane(IMAGE, (len(self.transforms), *self.transforms[0].planes[0].shape)),)

    def image(self, picture, rng: np.random.Generator) -> np.ndarray:
        """Transform an RGB image to [views, H, W, C] uint8."""
        return self(Sample(picture), rng).image

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Transform an RGB image to [views, H, W, C] uint8."""
        return Sample(np.stack([transform(sample, rng).image for transform in self.transforms]))


def view_steps(crop: list[Callable], flip: Callable) -> tuple[list[Callable], list[Callable]]:
    """Return the steps of the first and of the second view.

    Args:
        crop: steps of the crop, which return a Pillow image.
        flip: step of the flip.
    """
    jitter, gray = RandomApply(JITTER, ColorJitter(*STRENGTHS)), RandomApply(GRAY, _grayscale)
    first = [*crop, jitter, random_blur, gray, flip]
    second = [*crop, jitter, RandomApply(BLUR, random_blur), gray, flip, RandomApply(SOLARIZE, _solarize)]
    return first, second


def check_views(config) -> None:
    """Raise UserError if other keys set augmentation that the two views do not use."""
    train = config.TRAIN
    if config.DATA.IMAGE_CHANNELS not in PLAIN:
        raise UserError(
            f'DATA.VIEWS 2 changes the colors of RGB and gray images, not of {config.DATA.IMAGE_CHANNELS} channels: set '
            'DATA.IMAGE_CHANNELS to 1 or 3.'
        )
    changes = {
        'TRAIN.RAND_AUGMENT False': train.RAND_AUGMENT,
        'TRAIN.AUTO_AUGMENT False': train.AUTO_AUGMENT,
        'TRAIN.REPEATED_AUG 0': train.REPEATED_AUG > 1,
        'TRAIN.RANDOM_ERASE_PROB 0': train.RANDOM_ERASE_PROB > 0,
        'DATA.CROP auto': config.DATA.CROP == 'padded',
    }
    wanted = [change for change, needed in changes.items() if needed]
    if wanted:
        raise UserError(f'DATA.VIEWS 2 uses the augmentation of MoCo v3 only: set {", ".join(wanted)}.')


# ---------------------------------------------------------------------------------------------------- steps
class RandomApply:
    """Applies a step with a probability."""

    def __init__(self, probability: float, step: Callable):
        self.probability = probability
        self.step = step

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return self.step(image, rng) if rng.random() < self.probability else image


def random_blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return blur(image, rng.uniform(*RADII))


def _grayscale(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return grayscale(image)


def _solarize(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return solarize(image, THRESHOLD)
