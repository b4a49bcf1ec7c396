# SPDX-License-Identifier: Apache-2.0
"""Transforms of images and targets to the arrays of a batch. Those of classification are DeiT's and timm's.

Training: random crop, flip, RandAugment (else AutoAugment, else color jitter). Evaluation: resize, center crop.
Normalization and random erasing run once per batch on the device (datasets/batch.py).

A step is a callable `step(image, rng) -> image` on Pillow images; all random numbers come from the numpy generator. Steps
that move pixels are `Geometric`: one draw is applied to the image and to all targets. The first step may get a `Jpeg` and
decode only a part of it. With DATA.FAST_RESIZE the first steps of training work on arrays, with OpenCV.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import numpy as np
from PIL import Image

from datasets.augment import BICUBIC, BILINEAR, RESAMPLES, AutoAugment, ColorJitter, RandAugment, StyleSampler, choose
from datasets.bands import PLAIN, Bands
from datasets.images import Jpeg
from datasets.opencv import opencv
from datasets.sample import IMAGE, NOTHING, Placement, Plane, Sample
from datasets.views import Views, check_views, view_steps
from utils.errors import UserError
from utils.sizes import Side, image_size, size_pair, size_value

Picture = Union[Image.Image, Jpeg, Bands]
Step = Callable[[Picture, np.random.Generator], Image.Image]

SMALL = 32  # DATA.CROP auto crops images up to this side with padding, as usual for CIFAR
PADDING = 4
MAX_ASPECT_RATIO = 32  # images with a larger ratio are cropped before they are resized
MAX_UNSMOOTHED = 1.4  # reduction factor up to which resizing without smoothing aliases little
MAX_SMOOTHED = 3  # reduction factor up to which `smoothing_kernel` has five values


class Transform:
    """Applies steps to an image, RGB or `Bands`, and its targets.

    Args:
        steps: steps in order.
        shape: (H, W, C) of the resulting image; H and W None: images of different sizes.
        targets: planes of the targets of fixed shape; other targets are ragged.

    Attributes:
        planes: arrays of fixed shape; the image is the first if its shape is fixed.
    """

    def __init__(self, steps: Sequence[Step], shape: tuple[int | None, int | None, int], targets: Sequence[Plane] = ()):
        self.steps = list(steps)
        self.shape = shape
        self.planes = (*([Plane(IMAGE, shape)] if None not in shape else []), *targets)

    def image(self, picture: Picture, rng: np.random.Generator | None = None) -> np.ndarray:
        """Transform an RGB image without targets to [H, W, C] uint8."""
        return self(Sample(picture), rng).image

    def __call__(self, sample: Sample, rng: np.random.Generator | None) -> Sample:
        """Transform an RGB image to [H, W, C] uint8, together with its targets."""
        channels = self.shape[-1]
        if channels == 1:
            sample = Sample(sample.image.convert('L'), sample.targets)
        for step in self.steps:
            if hasattr(step, 'joint'):
                sample = step.joint(sample, rng)
            else:
                sample = Sample(step(sample.image, rng), sample.targets)
        pixels = np.asarray(sample.image)
        sizes = (side or found for side, found in zip(self.shape, pixels.shape))
        return Sample(pixels.reshape(*list(sizes)[:2], channels), sample.targets)


class Geometric:
    """A step that moves pixels: one draw is applied to the image and to all targets."""

    def draw(self, size: tuple[int, int], rng: np.random.Generator, targets: Mapping[str, Any]) -> Placement:
        """Draw the geometric operation for an image of `size` (width, height)."""
        raise NotImplementedError

    def apply(self, image: Picture, placement: Placement) -> Image.Image | np.ndarray:
        """Return the image after the operation."""
        raise NotImplementedError

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Image.Image | np.ndarray:
        return self.apply(image, self.draw(size_of(image), rng, {}))

    def joint(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the image and its targets after the operation."""
        placement = self.draw(size_of(sample.image), rng, sample.targets)
        return Sample(self.apply(sample.image, placement), sample.placed(placement))


def size_of(image: Picture | np.ndarray) -> tuple[int, int]:
    """Return (width, height)."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def build_transform(config, training: bool) -> Transform:
    """Build the transform of image classification that DATA and TRAIN describe."""
    data = config.DATA
    size = data.IMAGE_SIZE
    padded = data.CROP == 'padded' or (data.CROP == 'auto' and max(size_pair(size)) <= SMALL)
    if training:
        steps = _training_steps(config, padded)
    else:
        resample = BILINEAR if data.INTERPOLATION == 'bilinear' else BICUBIC
        covered = size if padded else size_value([math.floor(side / data.CROP_PCT) for side in size_pair(size)])
        resize = Squash(size, resample) if data.EVAL_CROP == 'squash' else ResizeShort(covered, resample)
        steps = [resize, CenterCrop(size)]
    return Transform(steps, _shape(config))


def two_view_transform(config) -> Views:
    """Build the transform of MoCo v3: two views of each training image."""
    check_views(config)
    crop = [_resized_crop(config, views=2), *([as_pillow] if _is_fast(config) else [])]
    views = view_steps(crop, RandomFlip(config.TRAIN.HFLIP))
    return Views([Transform(steps, _shape(config)) for steps in views])


def _shape(config) -> tuple[int, int, int]:
    return *image_size(config), config.DATA.IMAGE_CHANNELS


def _training_steps(config, padded: bool) -> list[Step]:
    data, train = config.DATA, config.TRAIN
    fast = _is_fast(config) and not padded
    if padded:
        resample = RESAMPLES[data.INTERPOLATION][-1]
        steps: list[Step] = [ResizeShort(data.IMAGE_SIZE, resample), PaddedCrop(data.IMAGE_SIZE, PADDING)]
    else:
        steps = [_resized_crop(config)]
    if train.HFLIP > 0:
        steps.append((FastFlip if fast else RandomFlip)(train.HFLIP))
    policy = _policy(config, fast)
    if policy is not None:
        steps += [as_pillow, policy] if fast else [policy]
    return steps


def _is_fast(config) -> bool:
    """Return True if OpenCV resizes random resized crops; grayscale images always use Pillow."""
    return config.DATA.FAST_RESIZE and config.DATA.IMAGE_CHANNELS == 3


def _resized_crop(config, views: int = 1) -> RandomResizedCrop:
    data, train = config.DATA, config.TRAIN
    arguments = data.IMAGE_SIZE, train.CROP_SCALE, train.CROP_RATIO, RESAMPLES[data.INTERPOLATION]
    return FastResizedCrop(*arguments, single=views == 1) if _is_fast(config) else RandomResizedCrop(*arguments)


def _policy(config, fast: bool) -> Step | None:
    """Return the augmentation policy, or None.

    Args:
        fast: OpenCV applies geometric operations.
    """
    data, train = config.DATA, config.TRAIN
    if data.IMAGE_CHANNELS not in PLAIN:
        _check_no_policy(config)
        return None
    mean = tuple(min(255, round(255 * value)) for value in data.IMAGENET_MEAN)
    fill = mean[0] if data.IMAGE_CHANNELS == 1 else mean
    styles = StyleSampler(train.RAND_AUGMENT_SPACE, data.INTERPOLATION, fill, fast)
    if train.RAND_AUGMENT:
        return RandAugment(train.RAND_AUGMENT_LAYERS, train.RAND_AUGMENT_MAGNITUDE, styles)
    if train.AUTO_AUGMENT:
        return AutoAugment(styles)
    return ColorJitter(*[train.COLOR_JITTER] * 3) if train.COLOR_JITTER > 0 else None


def _check_no_policy(config) -> None:
    """Raise UserError if a policy is on: its operations are defined on the colors of RGB and gray images."""
    train = config.TRAIN
    keys = {'RAND_AUGMENT': False, 'AUTO_AUGMENT': False, 'COLOR_JITTER': 0}
    wanted = [f'TRAIN.{key} {off}' for key, off in keys.items() if train[key]]
    if wanted:
        raise UserError(
            f'color operations are for RGB and gray images, not for {config.DATA.IMAGE_CHANNELS} channels '
            f'(DATA.IMAGE_CHANNELS): set {" and ".join(wanted)}.'
        )


# ---------------------------------------------------------------------------------------------------- evaluation
class ResizeShort(Geometric):
    """Resizes the shorter side to `size` pixels, the longer one to int(size * long / short).

    With `size` (height, width), the result is the smallest image of the same ratio that covers this size.
    Images with an aspect ratio above MAX_ASPECT_RATIO are cropped to it at the center, which bounds the memory.
    """

    def __init__(self, size: Side, resample: Image.Resampling):
        self.size = size
        self.resample = resample

    def draw(self, size, rng=None, targets=NOTHING) -> Placement:
        """See `Geometric`."""
        width, height = size
        covered = size_pair(self.size)[::-1]
        tight = int(covered[1] * width >= covered[0] * height)  # the axis on which the result has the given length
        resized = [max(int(covered[tight] * side / size[tight]), 1) for side in size]
        axis = 1 - tight
        resized[axis] = max(resized[axis], covered[axis])
        box, stored = [0, 0, width, height], size[axis]
        margin, length = _crop_margin(resized[axis], MAX_ASPECT_RATIO * max(covered)), resized[axis]
        if margin:
            box[axis], box[axis + 2] = (edge * stored / length for edge in (margin, length - margin))
            resized[axis] -= 2 * margin
        return Placement(tuple(box), tuple(resized))

    def apply(self, image: Picture, placement: Placement) -> Image.Image:
        """See `Geometric`."""
        if placement.box == (0, 0, *image.size):
            return image.resize(placement.size, self.resample)
        return resize_box(image, placement, self.resample)


class Squash(Geometric):
    """Resizes both sides to `size` pixels, or to (height, width), without keeping the aspect ratio."""

    def __init__(self, size: Side, resample: Image.Resampling):
        self.size = size
        self.resample = resample

    def draw(self, size, rng=None, targets=NOTHING) -> Placement:
        """See `Geometric`."""
        return Placement((0, 0, *size), size_pair(self.size)[::-1])

    def apply(self, image: Picture, placement: Placement) -> Image.Image:
        """See `Geometric`."""
        return image.resize(placement.size, self.resample)


class CenterCrop(Geometric):
    """Center crop to a square of `size` pixels, or to (height, width); offsets are rounded half to even."""

    def __init__(self, size: Side):
        self.size = size

    def draw(self, size, rng=None, targets=NOTHING) -> Placement:
        """See `Geometric`."""
        height, width = size_pair(self.size)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return Placement((left, top, left + width, top + height), (width, height))

    def apply(self, image: Image.Image, placement: Placement) -> Image.Image:
        """See `Geometric`."""
        return image.crop(placement.box)


def _crop_margin(full: int, length: int) -> int:
    """Return the pixels to drop on both sides of `full` so that `length` to `length + 3` remain.

    The number is even, so that CenterCrop gives the same pixels as without the crop.
    """
    return max(full - length, 0) // 4 * 2


def resize_box(image: Picture, placement: Placement, resample: Image.Resampling) -> Image.Image:
    """Resize a box of an image, with fractional edges, without resizing the rest."""
    cut = []
    for axis in (0, 1):
        begin, end, stored = placement.box[axis], placement.box[axis + 2], image.size[axis]
        shrinking = max(1.0, (end - begin) / placement.size[axis])
        margin = math.ceil(2 * shrinking) + 1  # support of the bicubic filter: two pixels times the reduction factor
        cut.append((max(0, math.floor(begin) - margin), min(stored, math.ceil(end) + margin)))
    (left, right), (top, bottom) = cut
    box = tuple(edge - start for edge, start in zip(placement.box, (left, top, left, top)))
    return image.crop((left, top, right, bottom)).resize(placement.size, resample, box)


# ---------------------------------------------------------------------------------------------------- training
class RandomResizedCrop(Geometric):
    """Random resized crop: the fraction of the area is uniform in `scale`, the log aspect ratio is uniform in log `ratio`.

    If ten draws do not fit into the image, the largest center crop with a ratio in range is used. The ratio is that of the crop,
    as in timm, also if the result, of `size` pixels or (height, width), has another one.
    """

    TRIES = 10

    def __init__(self, size: Side, scale: Sequence[float], ratio: Sequence[float], resamples: tuple):
        self.size = size
        self.scale = scale
        self.ratio = ratio
        self.resamples = resamples

    def draw(self, size, rng, targets=NOTHING) -> Placement:
        """See `Geometric`."""
        box = self.box(*size, rng)
        return Placement(box, size_pair(self.size)[::-1], resample=choose(self.resamples, rng))

    def apply(self, image: Picture, placement: Placement) -> Image.Image:
        """See `Geometric`."""
        return image.crop(placement.box).resize(placement.size, placement.resample)

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw (left, top, right, bottom) in an image of the given size."""
        log_low, log_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(self.TRIES):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(log_low, log_high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


class PaddedCrop(Geometric):
    """Pads with black and takes a random crop of `size` pixels, or of (height, width)."""

    def __init__(self, size: Side, padding: int):
        self.size = size
        self.padding = padding

    def draw(self, size, rng, targets=NOTHING) -> Placement:
        """See `Geometric`."""
        crop = size_pair(self.size)[::-1]
        left, top = (
            int(rng.integers(side + 2 * self.padding - length + 1)) - self.padding for side, length in zip(size, crop)
        )
        return Placement((left, top, left + crop[0], top + crop[1]), crop)

    def apply(self, image: Image.Image, placement: Placement) -> Image.Image:
        """See `Geometric`."""
        return image.crop(placement.box)  # black outside of the image


class RandomFlip(Geometric):
    """Random horizontal flip."""

    def __init__(self, probability: float):
        self.probability = probability

    def draw(self, size, rng, targets=NOTHING) -> Placement:
        """See `Geometric`."""
        return Placement((0, 0, *size), size, mirrored=rng.random() < self.probability)

    def apply(self, image: Picture | np.ndarray, placement: Placement) -> Image.Image | np.ndarray:
        """See `Geometric`."""
        return self.mirror(image) if placement.mirrored else image

    def mirror(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


# ---------------------------------------------------------------------------------------------------- FAST_RESIZE
class FastResizedCrop(RandomResizedCrop):
    """`RandomResizedCrop` with OpenCV, which returns arrays [H, W, 3].

    JPEG files are decoded at half size or less if the decoded box stays at least as large as the result on both sides, else
    down to the lower edge of the box.

    Args:
        single: an image is cropped once.
    """

    def __init__(self, *args, single: bool = True):
        super().__init__(*args)
        self.single = single
        opencv()  # once, before workers are forked

    def apply(self, image: Picture, placement: Placement) -> np.ndarray:
        """See `Geometric`."""
        box = placement.box
        if isinstance(image, Jpeg):
            pixels = image.reduced(box, self.size, self.single)
        else:
            pixels = np.asarray(image.crop(box))
        return resize_smoothed(pixels, self.size, placement.resample)


def resize_smoothed(pixels: np.ndarray, size: Side, resample: Image.Resampling) -> np.ndarray:
    """Resize [h, w, C] to [size, size, C], or to [*size, C] for a pair, close to Pillow's antialiased filters and five times faster.

    OpenCV's filters do not antialias, so `smoothing_kernel` smooths before them. Sides of more than MAX_SMOOTHED times
    `size` are first reduced to that by the area filter, which is slow. Up to MAX_UNSMOOTHED no smoothing is needed.

    On photographs of 500 x 375 pixels the mean difference from Pillow's bicubic filter is 0.8 to 0.9 of 255. Smoothing at
    all factors gives 0.7, but makes loading 10 % slower. OpenCV's linear filter alone gives 1.2, its cubic filter 1.5, and
    its area filter 0.9 in twice the time.
    """
    cv2 = opencv()
    target = size_pair(size)
    height, width = (min(side, MAX_SMOOTHED * wanted) for side, wanted in zip(pixels.shape, target))
    if (height, width) != pixels.shape[:2]:
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    interpolation = cv2.INTER_LINEAR if resample == BILINEAR else cv2.INTER_CUBIC
    shrinking = max(height / target[0], width / target[1])
    if 1 < shrinking <= MAX_UNSMOOTHED:
        interpolation = cv2.INTER_LINEAR
    elif shrinking > MAX_UNSMOOTHED:
        across, down = smoothing_kernel(width / target[1]), smoothing_kernel(height / target[0])
        pixels = cv2.sepFilter2D(pixels, -1, across, down, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(pixels, target[::-1], interpolation=interpolation)


def smoothing_kernel(shrinking: float) -> np.ndarray:
    """Return the smoothing kernel [1, 3 or 5] for a reduction factor s.

    A tent filter widened by s has variance s^2 / 6, and linear interpolation has 1 / 6. The kernel (a, 1 - 2a, a) has variance
    2a, so a = (s^2 - 1) / 12. From s = 2 on that would leave too little at the center: the kernel with half the variance
    is then applied twice. For s = 3 this is the tent (1, 2, 3, 2, 1) / 9.
    """
    outer = (shrinking**2 - 1) / 12
    if outer <= 0:
        return np.ones(1)
    if outer <= 0.25:
        return np.array([outer, 1 - 2 * outer, outer])
    half = np.array([outer / 2, 1 - outer, outer / 2])
    return np.convolve(half, half)


class FastFlip(RandomFlip):
    """`RandomFlip` on arrays."""

    def mirror(self, image: np.ndarray) -> np.ndarray:
        return opencv().flip(image, 1)


def as_pillow(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Convert an array to a Pillow image, the input of policies."""
    return Image.fromarray(pixels)
