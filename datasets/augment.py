# SPDX-License-Identifier: Apache-2.0
"""Image operations and augmentation policies.

RandAugment: https://arxiv.org/abs/1909.13719, as timm's `rand-m9-mstd0.5-inc1`, where severity increases with magnitude.
AutoAugment: https://arxiv.org/abs/1805.09501, the ImageNet policy of table 9.

An operation takes and returns a Pillow image (RGB or L); its magnitude ranges from 0 to 10. Geometric operations also take
a `Style`: the resampling filter and the fill color of uncovered corners.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Union

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from datasets.opencv import opencv

Color = Union[int, tuple[int, int, int]]

BILINEAR, BICUBIC, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.NEAREST


# ---------------------------------------------------------------------------------------------------- operations
def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keep the `bits` highest bits; 0 bits, which Pillow may refuse, give a black image."""
    mask = 0xFF & ~(0xFF >> bits)
    return _look_up(image, [value & mask for value in range(256)])


def solarize(image: Image.Image, threshold: int) -> Image.Image:
    """Invert values of at least `threshold`."""
    return _look_up(image, [value if value < threshold else 255 - value for value in range(256)])


def solarize_add(image: Image.Image, addend: int) -> Image.Image:
    """Add `addend` to values below 128, up to 255."""
    return _look_up(image, [min(255, value + addend) if value < 128 else value for value in range(256)])


def color(image: Image.Image, factor: float) -> Image.Image:
    """Change the saturation: factor 0 gives a gray image, 1 the image itself."""
    return ImageEnhance.Color(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(factor)


def hue(image: Image.Image, shift: float) -> Image.Image:
    """Shift the hue by int(255 * shift) of 256 steps of the color circle; L has no hue."""
    if image.mode == 'L':
        return image
    turned = [(value + int(255 * shift)) % 256 for value in range(256)]
    return image.convert('HSV').point(turned + 2 * list(range(256))).convert(image.mode)


def grayscale(image: Image.Image) -> Image.Image:
    """Copy the luminance to all channels."""
    return image.convert('L').convert(image.mode)


def blur(image: Image.Image, radius: float) -> Image.Image:
    """Apply a Gaussian blur; Pillow's radius is the standard deviation in pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius))


class Style(NamedTuple):
    """How a geometric operation is applied.

    Attributes:
        resample: resampling filter.
        fill: color of uncovered corners.
        fast: with OpenCV, see `_warp`.
    """

    resample: Image.Resampling
    fill: Color
    fast: bool = False


def rotate(image: Image.Image, degrees: float, style: Style) -> Image.Image:
    """Rotate counter-clockwise about the center."""
    if style.fast:
        return _affine(image, _rotation(degrees, *image.size), style)
    return image.rotate(degrees, resample=style.resample, fillcolor=style.fill)


def shear_x(image: Image.Image, factor: float, style: Style) -> Image.Image:
    return _affine(image, (1, factor, 0, 0, 1, 0), style)


def shear_y(image: Image.Image, factor: float, style: Style) -> Image.Image:
    return _affine(image, (1, 0, 0, factor, 1, 0), style)


def translate_x(image: Image.Image, pixels: float, style: Style) -> Image.Image:
    return _affine(image, (1, 0, pixels, 0, 1, 0), style)


def translate_y(image: Image.Image, pixels: float, style: Style) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, pixels), style)


def translate_x_relative(image: Image.Image, fraction: float, style: Style) -> Image.Image:
    """Translate by a fraction of the width."""
    return translate_x(image, fraction * image.width, style)


def translate_y_relative(image: Image.Image, fraction: float, style: Style) -> Image.Image:
    """Translate by a fraction of the height."""
    return translate_y(image, fraction * image.height, style)


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """Return the matrix for `_affine` of a counter-clockwise rotation about the center of an image."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y


def _affine(image: Image.Image, matrix: tuple, style: Style) -> Image.Image:
    """Transform an image.

    Args:
        matrix: (a, b, c, d, e, f) maps a point (x, y) of the result to the point (ax + by + c, dx + ey + f) of the image.
    """
    if style.fast and style.resample != NEAREST:
        return _warp(image, matrix, style)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=style.resample, fillcolor=style.fill)


def _warp(image: Image.Image, matrix: tuple, style: Style) -> Image.Image:
    """Transform an image like `_affine` with OpenCV, three times faster.

    On photographs of 224 pixels the mean difference from Pillow is 0.4 to 0.5 of 255 with the bilinear filter and 0.6 to 1.0
    with the bicubic one, which is sharper in OpenCV (coefficient -0.75, Pillow's is -0.5).
    """
    cv2 = opencv()
    matrix = np.array(matrix).reshape(2, 3)
    matrix[:, 2] += (matrix[:, 0] + matrix[:, 1] - 1) / 2  # OpenCV's coordinates start at the center of the first pixel
    flags = (cv2.INTER_LINEAR if style.resample == BILINEAR else cv2.INTER_CUBIC) | cv2.WARP_INVERSE_MAP
    border = {'borderMode': cv2.BORDER_CONSTANT, 'borderValue': style.fill}
    return Image.fromarray(cv2.warpAffine(np.asarray(image), matrix, image.size, flags=flags, **border))


def _look_up(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


# ---------------------------------------------------------------------------------------------------- magnitudes
class Operation(NamedTuple):
    """An operation of a policy.

    Attributes:
        function: takes the image, the argument unless `argument` is None, and the style if `geometric`.
        argument: maps the severity m = magnitude / 10 to the argument.
        signed: True if m is negated with probability 1/2.
        geometric: True if the function takes a style.
    """

    function: Callable
    argument: Callable[[float], float] | None = None
    signed: bool = False
    geometric: bool = False

    def __call__(self, image: Image.Image, magnitude: float, negative: bool, style: Style) -> Image.Image:
        severity = magnitude / 10
        arguments = (
            [] if self.argument is None else [self.argument(-severity if negative and self.signed else severity)]
        )
        return self.function(image, *arguments, *([style] if self.geometric else []))


def _enhance(function: Callable) -> Operation:
    return Operation(function, lambda m: 1.0 + m * 0.9, signed=True)


def _geometry(function: Callable, largest: float) -> Operation:
    return Operation(function, lambda m: m * largest, signed=True, geometric=True)


INCREASING = {
    'AutoContrast': Operation(ImageOps.autocontrast),
    'Equalize': Operation(ImageOps.equalize),
    'Invert': Operation(ImageOps.invert),
    'Rotate': _geometry(rotate, 30.0),
    'PosterizeIncreasing': Operation(posterize, lambda m: 4 - int(m * 4)),
    'SolarizeIncreasing': Operation(solarize, lambda m: 256 - int(m * 256)),
    'SolarizeAdd': Operation(solarize_add, lambda m: int(m * 110)),
    'ColorIncreasing': _enhance(color),
    'ContrastIncreasing': _enhance(contrast),
    'BrightnessIncreasing': _enhance(brightness),
    'SharpnessIncreasing': _enhance(sharpness),
    'ShearX': _geometry(shear_x, 0.3),
    'ShearY': _geometry(shear_y, 0.3),
    'TranslateXRel': _geometry(translate_x_relative, 0.45),
    'TranslateYRel': _geometry(translate_y_relative, 0.45),
}

# PaddleViT translates by up to 100 pixels, independently of the image size.
INCREASING_PADDLEVIT = {
    **{name: operation for name, operation in INCREASING.items() if not name.startswith('Translate')},
    'TranslateX': _geometry(translate_x, 100.0),
    'TranslateY': _geometry(translate_y, 100.0),
}

# In AutoAugment, some severities decrease with the magnitude, and enhancement factors range from 0.1 to 1.9.
ORIGINAL = {
    **{name: INCREASING[name] for name in ('AutoContrast', 'Equalize', 'Invert', 'Rotate', 'ShearX')},
    'PosterizeOriginal': Operation(posterize, lambda m: 4 + int(m * 4)),
    'Solarize': Operation(solarize, lambda m: int(m * 256)),
    'Color': Operation(color, lambda m: m * 1.8 + 0.1),
    'Contrast': Operation(contrast, lambda m: m * 1.8 + 0.1),
    'Sharpness': Operation(sharpness, lambda m: m * 1.8 + 0.1),
}

# Sub-policies of two (operation, probability, magnitude) each.
IMAGENET_POLICY = (
    (('PosterizeOriginal', 0.4, 8), ('Rotate', 0.6, 9)),
    (('Solarize', 0.6, 5), ('AutoContrast', 0.6, 5)),
    (('Equalize', 0.8, 8), ('Equalize', 0.6, 3)),
    (('PosterizeOriginal', 0.6, 7), ('PosterizeOriginal', 0.6, 6)),
    (('Equalize', 0.4, 7), ('Solarize', 0.2, 4)),
    (('Equalize', 0.4, 4), ('Rotate', 0.8, 8)),
    (('Solarize', 0.6, 3), ('Equalize', 0.6, 7)),
    (('PosterizeOriginal', 0.8, 5), ('Equalize', 1.0, 2)),
    (('Rotate', 0.2, 3), ('Solarize', 0.6, 8)),
    (('Equalize', 0.6, 8), ('PosterizeOriginal', 0.4, 6)),
    (('Rotate', 0.8, 8), ('Color', 0.4, 0)),
    (('Rotate', 0.4, 9), ('Equalize', 0.6, 2)),
    (('Equalize', 0.0, 7), ('Equalize', 0.8, 8)),
    (('Invert', 0.6, 4), ('Equalize', 1.0, 8)),
    (('Color', 0.6, 4), ('Contrast', 1.0, 8)),
    (('Rotate', 0.8, 8), ('Color', 1.0, 2)),
    (('Color', 0.8, 8), ('Solarize', 0.8, 7)),
    (('Sharpness', 0.4, 7), ('Invert', 0.6, 8)),
    (('ShearX', 0.6, 5), ('Equalize', 1.0, 9)),
    (('Color', 0.4, 0), ('Equalize', 0.6, 3)),
    (('Equalize', 0.4, 7), ('Solarize', 0.2, 4)),
    (('Solarize', 0.6, 5), ('AutoContrast', 0.6, 5)),
    (('Invert', 0.6, 4), ('Equalize', 1.0, 8)),
    (('Color', 0.6, 4), ('Contrast', 1.0, 8)),
    (('Equalize', 0.8, 8), ('Equalize', 0.6, 3)),
)


# ---------------------------------------------------------------------------------------------------- policies
class StyleSampler:
    """Chooses the style of each operation of a policy.

    timm: the interpolation of the run, or bilinear or bicubic at random; filled with the mean color of the data.
    paddlevit: nearest neighbor; filled with mid-gray, after rotations with black.

    Args:
        space: timm or paddlevit.
        interpolation: DATA.INTERPOLATION.
        mean: mean color of the data, 0 to 255.
        fast: see `Style`.
    """

    def __init__(self, space: str, interpolation: str, mean: Color, fast: bool = False):
        self.space = space
        self.resamples = RESAMPLES[interpolation]
        self.mean = mean
        self.fast = fast

    def style(self, name: str, rng: np.random.Generator) -> Style:
        if self.space == 'paddlevit':
            shade = 0 if name == 'Rotate' else 128
            return Style(NEAREST, shade if isinstance(self.mean, int) else (shade,) * 3, self.fast)
        return Style(choose(self.resamples, rng), self.mean, self.fast)


RESAMPLES = {'bicubic': (BICUBIC,), 'bilinear': (BILINEAR,), 'random': (BILINEAR, BICUBIC)}


def choose(options: tuple, rng: np.random.Generator):
    """Return one of `options` with equal probability; draws no random number for a single option."""
    return options[0] if len(options) == 1 else options[rng.integers(len(options))]


class RandAugment:
    """RandAugment: `layers` operations drawn with replacement.

    Each is applied with probability 0.5, at a magnitude ~ N(magnitude, 0.5) clipped to [0, 10].
    """

    PROBABILITY, DEVIATION = 0.5, 0.5

    def __init__(self, layers: int, magnitude: float, styles: StyleSampler):
        self.layers = layers
        self.magnitude = magnitude
        self.styles = styles
        self.operations = INCREASING_PADDLEVIT if styles.space == 'paddlevit' else INCREASING

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        names = tuple(self.operations)
        for choice in rng.integers(len(names), size=self.layers):
            if rng.random() >= self.PROBABILITY:
                continue
            name = names[choice]
            magnitude = min(10.0, max(0.0, rng.normal(self.magnitude, self.DEVIATION)))
            negative = rng.random() < 0.5
            image = self.operations[name](image, magnitude, negative, self.styles.style(name, rng))
        return image


class AutoAugment:
    """AutoAugment: one of the 25 sub-policies for ImageNet per image."""

    def __init__(self, styles: StyleSampler):
        self.styles = styles

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for name, probability, magnitude in IMAGENET_POLICY[rng.integers(len(IMAGENET_POLICY))]:
            if rng.random() < probability:
                negative = rng.random() < 0.5
                image = ORIGINAL[name](image, magnitude, negative, self.styles.style(name, rng))
        return image


class ColorJitter:
    """Color jitter: changes of brightness, contrast, saturation and optionally hue, in random order.

    Factors are uniform in [1 - strength, 1 + strength]. The hue shift, if there is a fourth strength, is uniform in
    [-strength, strength].
    """

    FUNCTIONS = (brightness, contrast, color, hue)

    def __init__(self, *strengths: float):
        factors, shifts = strengths[:3], strengths[3:]
        self.low = [*(max(0.0, 1.0 - strength) for strength in factors), *(-strength for strength in shifts)]
        self.high = [*(1.0 + strength for strength in factors), *shifts]

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        arguments = rng.uniform(self.low, self.high)
        for index in rng.permutation(len(arguments)):
            image = self.FUNCTIONS[index](image, arguments[index])
        return image
