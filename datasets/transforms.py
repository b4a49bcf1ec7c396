# SPDX-License-Identifier: Apache-2.0
"""From a picture to the uint8 array a model is fed from, as in DeiT and timm.

Training: random crop, flip, RandAugment (else AutoAugment, else colour jitter). Evaluation: resize, centre crop.
Normalisation happens once per batch on the device (datasets/batch.py), random erasing along with it.

A step is a callable `step(image, rng) -> image` on Pillow images; all randomness comes from the numpy generator. The first
one may get a `Jpeg` and so decides how much of it is decoded. With DATA.FAST_RESIZE training's first steps work on arrays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Union

import numpy as np
from PIL import Image, ImageOps

from datasets.augment import BICUBIC, BILINEAR, RESAMPLES, AutoAugment, Canvas, ColorJitter, RandAugment, choose
from datasets.images import Jpeg
from datasets.views import Views, check_views, view_steps

Picture = Union[Image.Image, Jpeg]
Step = Callable[[Picture, np.random.Generator], Image.Image]

SMALL = 32  # up to this side images are cropped with padding, as for CIFAR, unless DATA.CROP says otherwise
PADDING = 4
THIN = 32  # pictures that are so many times as long as wide are cut before they are enlarged
MILD = 1.4  # up to this factor shrinking aliases little


class Transform:
    """Applies steps to an RGB picture.

    Attributes:
        shape: of the result, (H, W, C).
    """

    def __init__(self, steps: Sequence[Step], size: int, channels: int):
        self.steps = list(steps)
        self.shape = (size, size, channels)

    def __call__(self, image: Picture, rng: np.random.Generator) -> np.ndarray:
        """RGB picture -> [H, W, C] uint8."""
        if self.shape[-1] == 1:
            image = image.convert('L')
        for step in self.steps:
            image = step(image, rng)
        return np.asarray(image).reshape(self.shape)


def build_transform(config, training: bool) -> Transform | Views:
    """The transform that DATA and TRAIN describe."""
    data = config.DATA
    if training and data.VIEWS == 2:
        return _two_views(config)
    padded = data.CROP == 'padded' or (data.CROP == 'auto' and data.IMAGE_SIZE <= SMALL)
    if training:
        steps = _training_steps(config, padded)
    else:
        resample = BILINEAR if data.INTERPOLATION == 'bilinear' else BICUBIC
        short = data.IMAGE_SIZE if padded else math.floor(data.IMAGE_SIZE / data.CROP_PCT)
        squash = data.EVAL_CROP == 'squash'
        resize = Squash(data.IMAGE_SIZE, resample) if squash else ResizeShort(short, resample)
        steps = [resize, CentreCrop(data.IMAGE_SIZE)]
    return Transform(steps, data.IMAGE_SIZE, data.IMAGE_CHANNELS)


def _two_views(config) -> Views:
    check_views(config)
    data = config.DATA
    crop = [_resized_crop(config), *([as_pillow] if _is_fast(config) else [])]
    views = view_steps(crop, RandomFlip(config.TRAIN.HFLIP))
    return Views([Transform(steps, data.IMAGE_SIZE, data.IMAGE_CHANNELS) for steps in views])


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
class ResizeShort:
    """Resizes the shorter side to `size` pixels, the longer one to int(size * long / short).

    Of a thin picture only the middle is computed, THIN times as long as wide, so that memory does not grow with its shape.
    """

    def __init__(self, size: int, resample: Image.Resampling):
        self.size = size
        self.resample = resample

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Image.Image:
        width, height = image.size
        short = min(width, height)
        size = int(self.size * width / short), int(self.size * height / short)
        if max(size) > THIN * self.size:
            return resize_middle(image, size, THIN * self.size, self.resample)
        return image.resize(size, self.resample)


class Squash:
    """Resizes both sides to `size` pixels, whatever they were."""

    def __init__(self, size: int, resample: Image.Resampling):
        self.size = size
        self.resample = resample

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Image.Image:
        return image.resize((self.size, self.size), self.resample)


class CentreCrop:
    """Cuts the central square of `size` pixels; offsets are rounded half to even."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        left, top = (round((side - self.size) / 2) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


def resize_middle(image: Picture, size: tuple[int, int], length: int, resample: Image.Resampling) -> Image.Image:
    """The middle of a picture resized to `size`, `length` to `length + 3` pixels long, without the rest being computed.

    An even number of pixels is left out on both sides, so that CentreCrop cuts the pixels that it would cut from the whole.
    """
    axis = int(size[1] > size[0])
    full, stored = size[axis], image.size[axis]
    left_out = (full - length) // 4 * 2
    begin, end = (place * stored / full for place in (left_out, full - left_out))
    margin = math.ceil(2 * max(1.0, stored / full)) + 1  # a cubic filter reaches two pixels, more where it shrinks
    first, last = max(0, math.floor(begin) - margin), min(stored, math.ceil(end) + margin)
    cut, box, part = [0, 0, *image.size], [0, 0, *image.size], list(size)
    cut[axis], cut[axis + 2] = first, last
    box[axis], box[axis + 2] = begin - first, end - first
    part[axis] = full - 2 * left_out
    return image.crop(tuple(cut)).resize(tuple(part), resample, tuple(box))


# ---------------------------------------------------------------------------------------------------- training
class RandomResizedCrop:
    """Cuts a box whose area is a uniform share of the image and whose log aspect ratio is uniform, and resizes it.

    After ten boxes that stick out: the largest centred box whose ratio is in range.
    """

    TRIES = 10

    def __init__(self, size: int, scale: Sequence[float], ratio: Sequence[float], resamples: tuple):
        self.size = size
        self.scale = scale
        self.ratio = ratio
        self.resamples = resamples

    def __call__(self, image: Picture, rng: np.random.Generator) -> Image.Image:
        box = self.box(image.width, image.height, rng)
        return image.crop(box).resize((self.size, self.size), choose(self.resamples, rng))

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


class PaddedCrop:
    """Pads with black and cuts a square at random."""

    def __init__(self, size: int, padding: int):
        self.size = size
        self.padding = padding

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        image = ImageOps.expand(image, self.padding)
        left, top = (int(rng.integers(side - self.size + 1)) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomFlip:
    """Mirrors left and right with a probability."""

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return self.mirror(image) if rng.random() < self.probability else image

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

    def __call__(self, image: Picture, rng: np.random.Generator) -> np.ndarray:
        box = self.box(image.width, image.height, rng)
        resample = choose(self.resamples, rng)
        pixels = image.reduced(box, self.size) if isinstance(image, Jpeg) else np.asarray(image.crop(box))
        return resize_smoothed(pixels, self.size, resample)


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
