# SPDX-License-Identifier: Apache-2.0
"""From a picture and its targets to the arrays of a batch. The transforms of classification are those of DeiT and timm.

Training: random crop, flip, RandAugment (else AutoAugment, else color jitter). Evaluation: resize, center crop.
Normalization happens once per batch on the device (datasets/batch.py), and so does random erasing.

A step is a callable `step(image, rng) -> image` on Pillow images; all randomness comes from the numpy generator. Steps that
move pixels are `Geometric`: they are drawn once, and targets follow. The first step may get a `Jpeg` and so decides how much
of it is decoded. With DATA.FAST_RESIZE the first steps of training work on arrays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import numpy as np
from PIL import Image

from datasets.augment import BICUBIC, BILINEAR, RESAMPLES, AutoAugment, Canvas, ColorJitter, RandAugment, choose
from datasets.images import Jpeg
from datasets.sample import IMAGE, NOTHING, Placement, Plane, Sample
from datasets.views import Views, check_views, view_steps

Picture = Union[Image.Image, Jpeg]
Step = Callable[[Picture, np.random.Generator], Image.Image]

SMALL = 32  # up to this side images are cropped with padding, as for CIFAR, unless DATA.CROP says otherwise
PADDING = 4
THIN = 32  # pictures that are so many times as long as wide are cut before they are enlarged
MILD = 1.4  # up to this factor shrinking aliases little


class Transform:
    """Applies steps to an RGB picture and its targets.

    Args:
        steps: applied in order.
        shape: of the image that the steps end with, (H, W, C); H and W None: images of different sizes.
        targets: shapes and types of the targets that have the same for all images; other targets are ragged.

    Attributes:
        planes: what has the same shape for all images; the image is the first, where it has.
    """

    def __init__(self, steps: Sequence[Step], shape: tuple[int | None, int | None, int], targets: Sequence[Plane] = ()):
        self.steps = list(steps)
        self.shape = shape
        self.planes = (*([Plane(IMAGE, shape)] if None not in shape else []), *targets)

    def image(self, picture: Picture, rng: np.random.Generator | None = None) -> np.ndarray:
        """RGB picture without targets -> [H, W, C] uint8."""
        return self(Sample(picture), rng).image

    def __call__(self, sample: Sample, rng: np.random.Generator | None) -> Sample:
        """RGB picture -> [H, W, C] uint8, and the targets that follow it."""
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
    """A step that moves pixels: one draw, which is applied to the image and to all targets."""

    def draw(self, size: tuple[int, int], rng: np.random.Generator, targets: Mapping[str, Any]) -> Placement:
        """Where the pixels of an image of `size` (width, height) go."""
        raise NotImplementedError

    def apply(self, image: Picture, placement: Placement) -> Image.Image | np.ndarray:
        """The image after the operation."""
        raise NotImplementedError

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Image.Image | np.ndarray:
        return self.apply(image, self.draw(size_of(image), rng, {}))

    def joint(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The image and its targets after the operation."""
        placement = self.draw(size_of(sample.image), rng, sample.targets)
        return Sample(self.apply(sample.image, placement), sample.placed(placement))


def size_of(image: Picture | np.ndarray) -> tuple[int, int]:
    """(width, height)."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def build_transform(config, training: bool) -> Transform:
    """The transform of image classification that DATA and TRAIN describe."""
    data = config.DATA
    padded = data.CROP == 'padded' or (data.CROP == 'auto' and data.IMAGE_SIZE <= SMALL)
    if training:
        steps = _training_steps(config, padded)
    else:
        resample = BILINEAR if data.INTERPOLATION == 'bilinear' else BICUBIC
        short = data.IMAGE_SIZE if padded else math.floor(data.IMAGE_SIZE / data.CROP_PCT)
        squash = data.EVAL_CROP == 'squash'
        resize = Squash(data.IMAGE_SIZE, resample) if squash else ResizeShort(short, resample)
        steps = [resize, CentreCrop(data.IMAGE_SIZE)]
    return Transform(steps, _shape(config))


def two_view_transform(config) -> Views:
    """The transform of MoCo v3: two views of each training image."""
    check_views(config)
    crop = [_resized_crop(config), *([as_pillow] if _is_fast(config) else [])]
    views = view_steps(crop, RandomFlip(config.TRAIN.HFLIP))
    return Views([Transform(steps, _shape(config)) for steps in views])


def _shape(config) -> tuple[int, int, int]:
    return config.DATA.IMAGE_SIZE, config.DATA.IMAGE_SIZE, config.DATA.IMAGE_CHANNELS


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
    policy = _policy(config)
    if policy is not None:
        steps += [as_pillow, policy] if fast else [policy]
    return steps


def _is_fast(config) -> bool:
    """Whether what is not cropped with padding is resized by OpenCV; grey is left to Pillow."""
    return config.DATA.FAST_RESIZE and config.DATA.IMAGE_CHANNELS == 3


def _resized_crop(config) -> RandomResizedCrop:
    data, train = config.DATA, config.TRAIN
    crop = FastResizedCrop if _is_fast(config) else RandomResizedCrop
    return crop(data.IMAGE_SIZE, train.CROP_SCALE, train.CROP_RATIO, RESAMPLES[data.INTERPOLATION])


def _policy(config) -> Step | None:
    """What changes colours and shapes at random."""
    data, train = config.DATA, config.TRAIN
    mean = tuple(min(255, round(255 * value)) for value in data.IMAGENET_MEAN)
    canvas = Canvas(train.RAND_AUGMENT_SPACE, data.INTERPOLATION, mean[0] if data.IMAGE_CHANNELS == 1 else mean)
    if train.RAND_AUGMENT:
        return RandAugment(train.RAND_AUGMENT_LAYERS, train.RAND_AUGMENT_MAGNITUDE, canvas)
    if train.AUTO_AUGMENT:
        return AutoAugment(canvas)
    return ColorJitter(*[train.COLOR_JITTER] * 3) if train.COLOR_JITTER > 0 else None


# ---------------------------------------------------------------------------------------------------- evaluation
class ResizeShort(Geometric):
    """Resizes the shorter side to `size` pixels, the longer one to int(size * long / short).

    Of a thin picture only the middle is computed, THIN times as long as wide, so that memory does not grow with its shape.
    """

    def __init__(self, size: int, resample: Image.Resampling):
        self.size = size
        self.resample = resample

    def draw(self, size, rng=None, targets=NOTHING) -> Placement:
        """See `Geometric`."""
        width, height = size
        short = min(width, height)
        resized = int(self.size * width / short), int(self.size * height / short)
        axis = int(height > width)
        box, stored = [0, 0, width, height], size[axis]
        left_out, length = _left_out(resized[axis], THIN * self.size), resized[axis]
        if left_out:
            box[axis], box[axis + 2] = (place * stored / length for place in (left_out, length - left_out))
            resized = tuple(side - 2 * left_out * (number == axis) for number, side in enumerate(resized))
        return Placement(tuple(box), resized)

    def apply(self, image: Picture, placement: Placement) -> Image.Image:
        """See `Geometric`."""
        if placement.box == (0, 0, *image.size):
            return image.resize(placement.size, self.resample)
        return resize_box(image, placement, self.resample)


class Squash(Geometric):
    """Resizes both sides to `size` pixels, whatever they were."""

    def __init__(self, size: int, resample: Image.Resampling):
        self.size = size
        self.resample = resample

    def draw(self, size, rng=None, targets=NOTHING) -> Placement:
        """See `Geometric`."""
        return Placement((0, 0, *size), (self.size, self.size))

    def apply(self, image: Picture, placement: Placement) -> Image.Image:
        """See `Geometric`."""
        return image.resize(placement.size, self.resample)


class CentreCrop(Geometric):
    """Cuts the central square of `size` pixels; offsets are rounded half to even."""

    def __init__(self, size: int):
        self.size = size

    def draw(self, size, rng=None, targets=NOTHING) -> Placement:
        """See `Geometric`."""
        left, top = (round((side - self.size) / 2) for side in size)
        return Placement((left, top, left + self.size, top + self.size), (self.size, self.size))

    def apply(self, image: Image.Image, placement: Placement) -> Image.Image:
        """See `Geometric`."""
        return image.crop(placement.box)


def _left_out(full: int, length: int) -> int:
    """Pixels to leave out on both sides of `full` so that `length` to `length + 3` stay.

    The number is even, so that CentreCrop cuts the pixels that it would cut from the whole.
    """
    return max(full - length, 0) // 4 * 2


def resize_box(image: Picture, placement: Placement, resample: Image.Resampling) -> Image.Image:
    """Resize a box of a picture, which may end between pixels, without computing the rest."""
    cut = []
    for axis in (0, 1):
        begin, end, stored = placement.box[axis], placement.box[axis + 2], image.size[axis]
        shrinking = max(1.0, (end - begin) / placement.size[axis])
        margin = math.ceil(2 * shrinking) + 1  # a cubic filter reaches two pixels, more where it shrinks
        cut.append((max(0, math.floor(begin) - margin), min(stored, math.ceil(end) + margin)))
    (left, right), (top, bottom) = cut
    box = tuple(edge - start for edge, start in zip(placement.box, (left, top, left, top)))
    return image.crop((left, top, right, bottom)).resize(placement.size, resample, box)


# ---------------------------------------------------------------------------------------------------- training
class RandomResizedCrop(Geometric):
    """Cuts a box whose area is a uniform share of the image and whose log aspect ratio is uniform, and resizes it.

    After ten boxes that stick out: the largest centred box whose ratio is in range.
    """

    TRIES = 10

    def __init__(self, size: int, scale: Sequence[float], ratio: Sequence[float], resamples: tuple):
        self.size = size
        self.scale = scale
        self.ratio = ratio
        self.resamples = resamples

    def draw(self, size, rng, targets=NOTHING) -> Placement:
        """See `Geometric`."""
        box = self.box(*size, rng)
        return Placement(box, (self.size, self.size), resample=choose(self.resamples, rng))

    def apply(self, image: Picture, placement: Placement) -> Image.Image:
        """See `Geometric`."""
        return image.crop(placement.box).resize(placement.size, placement.resample)

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) inside an image of the given size."""
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
    """Pads with black and cuts a square at random."""

    def __init__(self, size: int, padding: int):
        self.size = size
        self.padding = padding

    def draw(self, size, rng, targets=NOTHING) -> Placement:
        """See `Geometric`."""
        left, top = (int(rng.integers(side + 2 * self.padding - self.size + 1)) - self.padding for side in size)
        return Placement((left, top, left + self.size, top + self.size), (self.size, self.size))

    def apply(self, image: Image.Image, placement: Placement) -> Image.Image:
        """See `Geometric`."""
        return image.crop(placement.box)  # black outside of the image


class RandomFlip(Geometric):
    """Mirrors left and right with a probability."""

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
    """The same boxes, resized by OpenCV, as arrays [H, W, 3].

    JPEG files are decoded at half size or less where a box stays at least as large as the input on both sides.
    """

    def __init__(self, *args):
        super().__init__(*args)
        opencv()  # once, before workers are forked

    def apply(self, image: Picture, placement: Placement) -> np.ndarray:
        """See `Geometric`."""
        box = placement.box
        pixels = image.reduced(box, self.size) if isinstance(image, Jpeg) else np.asarray(image.crop(box))
        return resize_smoothed(pixels, self.size, placement.resample)


def resize_smoothed(pixels: np.ndarray, size: int, resample: Image.Resampling) -> np.ndarray:
    """Resizes [h, w, C] to [size, size, C] nearly as Pillow's antialiased filters do, in a fifth of the time.

    OpenCV's filters do not widen where they shrink. A kernel (a, 1 - 2a, a) before them, whose variance is 2a, makes up for
    it: a tent filter widened by s has s^2 / 6, so a = (s^2 - 1) / 12, for each side its own. From s = 2 on, where a would be
    too large, the area filter shrinks first; up to MILD the linear filter alone aliases so little that it saves the time.

    On photographs of 500 x 375 pixels the mean difference from Pillow's bicubic pixels is then 0.8 to 0.9 of 255. With smoothing
    always it is 0.7, which makes the whole way from the file a tenth slower; OpenCV's linear filter alone has 1.2, its cubic
    one 1.5, and its area filter 0.9 in twice the time.
    """
    cv2 = opencv()
    height, width = (min(side, 2 * size) for side in pixels.shape[:2])
    if (height, width) != pixels.shape[:2]:
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    interpolation = cv2.INTER_LINEAR if resample == BILINEAR else cv2.INTER_CUBIC
    shrinking = max(height, width) / size
    if 1 < shrinking <= MILD:
        interpolation = cv2.INTER_LINEAR
    elif shrinking > MILD:
        across, down = (smoothing_kernel(side / size) for side in (width, height))
        pixels = cv2.sepFilter2D(pixels, -1, across, down, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(pixels, (size, size), interpolation=interpolation)


def smoothing_kernel(shrinking: float) -> np.ndarray:
    """[3] weights of neighbouring pixels before they are shrunk by a factor; of one below 1, which enlarges, [1]."""
    outer = (shrinking**2 - 1) / 12
    return np.array([outer, 1 - 2 * outer, outer] if outer > 0 else [1.0])


class FastFlip(RandomFlip):
    """The same on arrays."""

    def mirror(self, image: np.ndarray) -> np.ndarray:
        return opencv().flip(image, 1)


def as_pillow(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The step from arrays back to what policies take."""
    return Image.fromarray(pixels)


@functools.cache
def opencv():
    """The cv2 module, which takes a third of a second to import, so that only those wait for it who use it."""
    import cv2

    cv2.setNumThreads(0)  # worker processes are what runs in parallel
    return cv2
