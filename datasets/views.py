# SPDX-License-Identifier: Apache-2.0
"""Two views of each training image, augmented independently and differently, for MoCo-v3 (DATA.VIEWS 2).

MoCo-v3: https://arxiv.org/abs/2104.02057, whose views are those of BYOL: https://arxiv.org/abs/2006.07733. The order of the
steps is that of MAE-Lite: https://arxiv.org/abs/2205.14443. They work on Pillow images, RGB or L; what concerns colours
leaves L as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from datasets.augment import ColorJitter, blur, grayscale, solarize
from datasets.sample import IMAGE, Plane, Sample
from utils.errors import UserError

JITTER, GREY = 0.8, 0.2  # probabilities in both views
BLUR, SOLARIZE = 0.1, 0.2  # in the second view; the first is always blurred, and never solarised
STRENGTHS = (0.4, 0.4, 0.2, 0.1)  # of the jitter: brightness, contrast, saturation, hue
RADII = (0.1, 2.0)  # of the blur, pixels
THRESHOLD = 128  # values that solarising inverts begin here


class Views:
    """Several transforms of the same picture, one after the other from one generator.

    Attributes:
        planes: of the result, one of shape (views, H, W, C).
    """

    def __init__(self, transforms: Sequence):
        self.transforms = list(transforms)
        self.planes = (Plane(IMAGE, (len(self.transforms), *self.transforms[0].planes[0].shape)),)

    def image(self, picture, rng: np.random.Generator) -> np.ndarray:
        """RGB picture -> [views, H, W, C] uint8."""
        return self(Sample(picture), rng).image

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """RGB picture -> [views, H, W, C] uint8."""
        return Sample(np.stack([transform(sample, rng).image for transform in self.transforms]))


def view_steps(crop: list[Callable], flip: Callable) -> tuple[list[Callable], list[Callable]]:
    """The steps of the first and of the second view, around the same crop, which ends in a Pillow image, and flip."""
    jitter, grey = Sometimes(JITTER, ColorJitter(*STRENGTHS)), Sometimes(GREY, _grey)
    first = [*crop, jitter, random_blur, grey, flip]
    second = [*crop, jitter, Sometimes(BLUR, random_blur), grey, flip, Sometimes(SOLARIZE, _solarize)]
    return first, second


def check_views(config) -> None:
    """Raises UserError where other keys ask for what the two views are not made with."""
    train = config.TRAIN
    changes = {
        'TRAIN.RAND_AUGMENT False': train.RAND_AUGMENT,
        'TRAIN.AUTO_AUGMENT False': train.AUTO_AUGMENT,
        'TRAIN.REPEATED_AUG 0': train.REPEATED_AUG > 1,
        'TRAIN.RANDOM_ERASE_PROB 0': train.RANDOM_ERASE_PROB > 0,
        'DATA.CROP auto': config.DATA.CROP == 'padded',
    }
    wanted = [change for change, needed in changes.items() if needed]
    if wanted:
        raise UserError(f'DATA.VIEWS 2 augments as MoCo-v3 does and in no other way: set {", ".join(wanted)}.')


# ---------------------------------------------------------------------------------------------------- steps
class Sometimes:
    """Takes a step with a probability."""

    def __init__(self, probability: float, step: Callable):
        self.probability = probability
        self.step = step

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return self.step(image, rng) if rng.random() < self.probability else image


def random_blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return blur(image, rng.uniform(*RADII))


def _grey(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return grayscale(image)


def _solarize(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return solarize(image, THRESHOLD)
