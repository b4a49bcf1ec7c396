# SPDX-License-Identifier: Apache-2.0
"""Transforms of dense prediction, as in mmsegmentation: OpenCV resizes pixels [H, W, C] uint8 without antialiasing.

Training: resize by a random factor, crop, flip, photometric distortion, pad. Evaluation: resize the image, not its targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from datasets.bands import Bands
from datasets.images import UnreadableImage
from datasets.opencv import opencv
from datasets.sample import IMAGE_SIZE, VALID, LabelMap, Placement, Plane, Sample
from datasets.transforms import MAX_ASPECT_RATIO, FastFlip, Geometric, Picture, Transform, size_of
from utils.errors import UserError
from utils.sizes import image_size

TRIES = 10  # maximum number of redraws of a crop that one class dominates
Size = tuple[int, int]


def dense_transform(config, training: bool, targets: Sequence[Plane] = ()) -> Transform:
    """Build the transform that DATA and TRAIN describe.

    Args:
        targets: planes of the targets in training.
    """
    data, train = config.DATA, config.TRAIN
    if not training:
        window = min(crop_size(config)) if config.VAL.IS_SLIDE else None
        return Transform(
            [ScaledImages(data.IMAGE_SCALE, config.VAL.SCALE_RATIOS, window)], (None, None, data.IMAGE_CHANNELS)
        )
    size = crop_size(config)
    steps = [
        ScaledResize(data.IMAGE_SCALE, train.SCALE_RANGE),
        ClassCrop(size, train.CROP_CLASS_SHARE),
        FastFlip(train.HFLIP),
    ]
    if train.PHOTOMETRIC:
        if data.IMAGE_CHANNELS != 3:
            raise UserError(
                'TRAIN.PHOTOMETRIC changes the colors of RGB images: set it to False for DATA.IMAGE_CHANNELS '
                f'{data.IMAGE_CHANNELS}.'
            )
        steps.append(PhotometricDistortion())
    planes = [*targets, Plane(VALID, (2,), 'int32')]
    return Transform([*steps, Pad(size)], (*size, data.IMAGE_CHANNELS), planes)


def crop_size(config) -> Size:
    """Return (height, width) of the training images."""
    return tuple(config.DATA.CROP_SIZE or image_size(config))


def as_pixels(image: Picture | np.ndarray) -> np.ndarray:
    """Convert an image to [H, W, C] or [H, W] uint8."""
    if isinstance(image, np.ndarray):
        return image
    return np.asarray(image if isinstance(image, (Image.Image, Bands)) else image.convert('RGB'))


# ---------------------------------------------------------------------------------------------------- resizing
def scaled_size(size: Size, scale: Sequence[int]) -> Size:
    """Scale a size, with its aspect ratio, so that its longer side is at most max(scale), its shorter at most min(scale)."""
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return tuple(max(int(side * factor + 0.5), 1) for side in size)


def window_size(size: Size, short: int) -> Size:
    """Scale a size, with its aspect ratio, so that its shorter side is `short`. Raises UnreadableImage for thin images."""
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise UnreadableImage(f'{size[0]} x {size[1]} pixels, more than {MAX_ASPECT_RATIO} times as long as wide')
    return tuple(max(int(side * short / min(size) + 0.5), 1) for side in size)


def resized(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Resize [H, W, ...] to `size` (width, height), bilinear."""
    cv2 = opencv()
    return pixels if size_of(pixels) == tuple(size) else cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)


class ScaledResize(Geometric):
    """Resizes to fit into `scale` (longer, shorter side) times a uniform factor; keeps the aspect ratio."""

    def __init__(self, scale: Sequence[int], factors: tuple[float, float]):
        self.scale = scale
        self.factors = factors
        opencv()  # once, before workers are forked

    def draw(self, size, rng, targets) -> Placement:
        """See `Geometric`."""
        low, high = self.factors
        factor = rng.random() * (high - low) + low
        return Placement((0, 0, *size), scaled_size(size, [int(side * factor) for side in self.scale]))

    def apply(self, image: Picture, placement: Placement) -> np.ndarray:
        """See `Geometric`."""
        return resized(as_pixels(image), placement.size)


class ImageList:
    """A ragged target that holds several images."""

    def __init__(self, images: Sequence[np.ndarray]):
        self.images = list(images)

    def array(self) -> list[np.ndarray]:
        return self.images


class ScaledImages:
    """Resizes an image to one or several scales for evaluation; targets keep the size of the stored image.

    Adds the targets IMAGE_SIZE, (height, width) of the stored image, and 'scales', the images of all scales but the first.

    Args:
        scale: (longer, shorter side) at ratio 1.
        ratios: ratios of the scales.
        window: side of sliding windows; with several ratios it is the minimum of the shorter side.
    """

    def __init__(self, scale: Sequence[int], ratios: Sequence[float], window: int | None):
        self.scale = scale
        self.ratios = ratios
        self.window = window
        opencv()

    def joint(self, sample: Sample, rng=None) -> Sample:
        """See `Geometric`."""
        pixels = as_pixels(sample.image)
        first, *more = (resized(pixels, self.size(size_of(pixels), ratio)) for ratio in self.ratios)
        targets = {**sample.targets, IMAGE_SIZE: np.array(pixels.shape[:2])}
        if more:
            targets['scales'] = ImageList(more)
        return Sample(first, targets)

    def size(self, size: Size, ratio: float) -> Size:
        """Return (width, height) at a ratio."""
        scale = [int(side * ratio) for side in self.scale]
        if self.window is None or len(self.ratios) == 1:
            return scaled_size(size, scale)
        return window_size(size, max(min(scale), self.window))


# ---------------------------------------------------------------------------------------------------- cropping
class ClassCrop(Geometric):
    """Random crop in which no class covers the fraction `share` of the labeled pixels or more, if ten draws find one.

    Args:
        size: (height, width); a shorter side stays.
        share: fraction in (0, 1]; 1: the first draw is used.
    """

    def __init__(self, size: Size, share: float):
        self.size = size
        self.share = share

    def draw(self, size, rng, targets) -> Placement:
        """See `Geometric`."""
        labels = next((target for target in targets.values() if isinstance(target, LabelMap)), None)
        box = self._box(size, rng)
        for _ in range(TRIES if labels is not None and self.share < 1 else 0):
            if self._accepts(labels, box):
                break
            box = self._box(size, rng)
        return Placement(box, (box[2] - box[0], box[3] - box[1]))

    def _box(self, size: Size, rng: np.random.Generator) -> tuple[int, int, int, int]:
        (width, height), (rows, columns) = size, self.size
        top = int(rng.integers(max(height - rows, 0) + 1))
        left = int(rng.integers(max(width - columns, 0) + 1))
        return left, top, min(left + columns, width), min(top + rows, height)

    def _accepts(self, labels: LabelMap, box: tuple[int, int, int, int]) -> bool:
        left, top, right, bottom = box
        crop = labels.pixels[top:bottom, left:right]
        counts = np.bincount(crop[crop != labels.ignored])
        return counts.size > 0 and counts.max() / counts.sum() < self.share

    def apply(self, image: np.ndarray, placement: Placement) -> np.ndarray:
        """See `Geometric`."""
        left, top, right, bottom = placement.box
        return image[top:bottom, left:right]


class Pad(Geometric):
    """Pads at the right and bottom. Adds the target VALID, (height, width) without padding, for the mask in the batch."""

    def __init__(self, size: Size):
        self.size = size

    def draw(self, size, rng, targets) -> Placement:
        """See `Geometric`."""
        height, width = self.size
        return Placement((0, 0, width, height), (width, height))

    def apply(self, image: np.ndarray, placement: Placement) -> np.ndarray:
        """See `Geometric`."""
        missing = [(0, full - side) for full, side in zip(self.size, image.shape[:2])]
        return np.pad(image, [*missing, *[(0, 0)] * (image.ndim - 2)])

    def joint(self, sample: Sample, rng) -> Sample:
        """See `Geometric`."""
        valid = np.array(sample.image.shape[:2], 'int32')
        image, targets = super().joint(sample, rng)
        return Sample(image, {**targets, VALID: valid})


# ---------------------------------------------------------------------------------------------------- colors
class Distortion(NamedTuple):
    """Draws of a photometric distortion; None: the operation is skipped."""

    brightness: float | None
    contrast_first: bool
    contrast: float | None
    saturation: float | None
    hue: int | None


class PhotometricDistortion:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2 (SSD, https://arxiv.org/abs/1512.02325)."""

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return distort(pixels, self.draw(rng))

    def draw(self, rng: np.random.Generator) -> Distortion:
        """Draw the parameters in the order of the operations."""
        brightness = _maybe(rng, lambda: rng.uniform(-32, 32))
        first = bool(rng.integers(2))
        contrast = _maybe(rng, lambda: rng.uniform(0.5, 1.5)) if first else None
        saturation = _maybe(rng, lambda: rng.uniform(0.5, 1.5))
        hue = _maybe(rng, lambda: int(rng.integers(-18, 18)))
        if not first:
            contrast = _maybe(rng, lambda: rng.uniform(0.5, 1.5))
        return Distortion(brightness, first, contrast, saturation, hue)


def _maybe(rng: np.random.Generator, draw) -> Any:
    return draw() if rng.integers(2) else None


def distort(pixels: np.ndarray, draws: Distortion) -> np.ndarray:
    """Apply the draws to RGB [H, W, 3] uint8."""
    if draws.brightness is not None:
        pixels = linear(pixels, offset=draws.brightness)
    if draws.contrast is not None and draws.contrast_first:
        pixels = linear(pixels, draws.contrast)
    if draws.saturation is not None:
        pixels = saturated(pixels, draws.saturation)
    if draws.hue is not None:
        pixels = hue_shifted(pixels, draws.hue)
    if draws.contrast is not None and not draws.contrast_first:
        pixels = linear(pixels, draws.contrast)
    return pixels


def linear(values: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Compute values * factor + offset in float32, clipped and truncated to uint8."""
    return np.clip(values.astype('float32') * np.float32(factor) + np.float32(offset), 0, 255).astype('uint8')


def saturated(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Multiply the saturation by a factor, in OpenCV's 8-bit HSV."""
    hsv = _to_hsv(pixels)
    hsv[..., 1] = linear(hsv[..., 1], factor)
    return _to_rgb(hsv)


def hue_shifted(pixels: np.ndarray, shift: int) -> np.ndarray:
    """Add a shift to the hue, 0 to 179."""
    hsv = _to_hsv(pixels)
    hsv[..., 0] = (hsv[..., 0].astype(int) + shift) % 180
    return _to_rgb(hsv)


def _to_hsv(pixels: np.ndarray) -> np.ndarray:
    cv2 = opencv()
    return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2HSV)


def _to_rgb(hsv: np.ndarray) -> np.ndarray:
    cv2 = opencv()
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
