# SPDX-License-Identifier: Apache-2.0
"""Transforms of object detection, those of ViTDet (https://arxiv.org/abs/2203.16527) in detectron2.

Training: flip, large-scale jitter (https://arxiv.org/abs/2012.07177), crop. Evaluation: resize. Both end with padding to a square.
Pixels are Pillow's.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from datasets.augment import BILINEAR
from datasets.dense import Pad, as_pixels
from datasets.detection import OBJECTS
from datasets.sample import IMAGE_SIZE, VALID, Placement, Plane, Sample
from datasets.transforms import Geometric, Picture, RandomFlip, Transform, size_of

Size = tuple[int, int]


def detection_transform(config, training: bool) -> Transform:
    """Build the transform that DATA and TRAIN describe; planes are images [S, S, C] and their size without padding."""
    data, train = config.DATA, config.TRAIN
    side, planes = data.IMAGE_SIZE, [Plane(VALID, (2,), 'int32')]
    if training:
        steps = [decoded, RandomFlip(train.HFLIP), ScaleJitter(side, train.SCALE_RANGE), JitterCrop(side)]
    else:
        steps, planes = [decoded, FitResize(side, side)], [*planes, Plane(IMAGE_SIZE, (2,), 'int32')]
    return Transform([*steps, Pad((side, side)), as_targets], (side, side, data.IMAGE_CHANNELS), planes)


def decoded(image: Picture, rng: np.random.Generator) -> Image.Image:
    """Decode the whole picture."""
    return image if isinstance(image, Image.Image) else image.convert('RGB')


class ScaleJitter(Geometric):
    """Large-scale jitter: resize so that the longer side becomes `side` times a uniform random factor.

    Args:
        side: of the square that the image fits into at the factor 1.
        factors: range of the factor.
    """

    def __init__(self, side: int, factors: tuple[float, float]):
        self.side = side
        self.factors = factors

    def draw(self, size, rng, targets) -> Placement:
        """See `Geometric`."""
        return Placement((0, 0, *size), jittered_size(size, self.side, rng.uniform(*self.factors)))

    def apply(self, image: Image.Image, placement: Placement) -> Image.Image:
        """See `Geometric`."""
        return image.resize(placement.size, BILINEAR)


def jittered_size(size: Size, side: int, factor: float) -> Size:
    """Return the size of the same ratio that fits into a square of `side * factor`, rounded half to even, at least 1."""
    scale = min(side * factor / length for length in size)
    return tuple(max(round(length * scale), 1) for length in size)


class JitterCrop(Geometric):
    """Crop sides longer than `side` to `side`. One random number places the crop on both axes. Objects are clipped."""

    def __init__(self, side: int):
        self.side = side

    def draw(self, size, rng, targets) -> Placement:
        """See `Geometric`."""
        box = crop_box(size, self.side, rng.random())
        return Placement(box, (box[2] - box[0], box[3] - box[1]))

    def apply(self, image: Image.Image, placement: Placement) -> np.ndarray:
        """See `Geometric`."""
        left, top, right, bottom = placement.box
        return as_pixels(image)[top:bottom, left:right]

    def joint(self, sample: Sample, rng) -> Sample:
        """See `Geometric`."""
        image, targets = super().joint(sample, rng)
        if OBJECTS in targets:
            targets = {**targets, OBJECTS: targets[OBJECTS].clipped(size_of(image))}
        return Sample(image, targets)


def crop_box(size: Size, side: int, place: float) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) in an image of `size` (width, height); `place` is in [0, 1]."""
    left, top = (round(max(length - side, 0) * place) for length in size)
    right, bottom = (start + min(length, side) for start, length in zip((left, top), size))
    return left, top, right, bottom


class FitResize:
    """Evaluation: resize the shorter side to `short`, or the longer side to `longest` if it would exceed it.

    Targets keep the size of the stored image, which is added as IMAGE_SIZE.
    """

    def __init__(self, short: int, longest: int):
        self.short = short
        self.longest = longest

    def joint(self, sample: Sample, rng=None) -> Sample:
        """See `Geometric`."""
        width, height = size_of(sample.image)
        image = sample.image.resize(fitted_size((width, height), self.short, self.longest), BILINEAR)
        return Sample(np.asarray(image), {**sample.targets, IMAGE_SIZE: np.array([height, width], 'int32')})


def fitted_size(size: Size, short: int, longest: int) -> Size:
    """Return the size of the same ratio, at least one pixel; sides are rounded half up."""
    scale = short / min(size)
    sides = [short if length == min(size) else length * scale for length in size]
    if max(sides) > longest:
        scale = longest / max(sides)
        sides = [side * scale for side in sides]
    return tuple(max(int(side + 0.5), 1) for side in sides)


class _AsTargets:
    """Last step: replace the objects by the arrays of a batch."""

    def joint(self, sample: Sample, rng=None) -> Sample:
        targets = dict(sample.targets)
        objects = targets.pop(OBJECTS, None)
        return Sample(sample.image, {**targets, **({} if objects is None else objects.targets())})


as_targets = _AsTargets()
