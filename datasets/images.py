# SPDX-License-Identifier: Apache-2.0
"""From the bytes of an image file to an RGB picture, or to the reason why not."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')


class UnreadableImage(Exception):
    """An image that cannot be decoded; the text is the reason. `Dataset.load` adds which image it is."""


def decode_image(data: bytes) -> Image.Image:
    """Decodes the bytes of an image file to RGB.

    Grey is copied to the three channels, 16 bits are reduced to 8, alpha is dropped, palettes and CMYK are converted;
    an EXIF orientation is ignored, as in the pipelines that published accuracies were measured with.

    Raises:
        UnreadableImage: empty, truncated or damaged data, something else than an image, or a decompression bomb.
    """
    return open_image(data).convert('RGB')


def open_image(data: bytes) -> Image.Image | Jpeg:
    """The same picture, but a sound JPEG file is only decoded when, and as far as, a transform asks for its pixels.

    Raises:
        UnreadableImage: here or, for a `Jpeg`, when its pixels are asked for.
    """
    size = _plain_jpeg_size(data)
    return _decode(data) if size is None else Jpeg(data, size)


class Jpeg:
    """A JPEG file, with what the first step of a transform uses of Pillow's interface.

    The pixels are those that Pillow gives: libjpeg-turbo decodes for both, but simplejpeg spends less around it.

    Attributes:
        size: (width, height).
    """

    def __init__(self, data: bytes, size: tuple[int, int]):
        self.size = self.width, self.height = size
        self._data = data
        self._decoded: dict[str, np.ndarray] = {}

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        left, top, right, bottom = box
        pixels = np.ascontiguousarray(self._whole('RGBX')[top:bottom, left:right])  # the layout Pillow has in memory
        return Image.frombytes('RGB', (right - left, bottom - top), pixels.data, 'raw', 'RGBX')

    def convert(self, mode: str) -> Image.Image:
        whole = self.crop((0, 0, *self.size))
        return whole if mode == whole.mode else whole.convert(mode)

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        return self.convert('RGB').resize(size, resample)

    def reduced(self, box: tuple[int, int, int, int], side: int) -> np.ndarray:
        """Pixels of a box [h, w, 3] uint8, decoded at 1/2, 3/8, 1/4 or 1/8 where both sides stay at least `side`.

        The box then grows to whole decoded pixels.
        """
        left, top, right, bottom = box
        least = [-(-side * whole // part) for whole, part in zip(self.size, (right - left, bottom - top))]
        if all(low <= -(-whole // 2) for low, whole in zip(least, self.size)):
            pixels = self._pixels('RGB', min_width=least[0], min_height=least[1], min_factor=2)
        else:
            pixels = self._whole('RGB')
        height, width = pixels.shape[:2]
        rows = slice(top * height // self.height, -(-bottom * height // self.height))
        return pixels[rows, left * width // self.width : -(-right * width // self.width)]

    def _whole(self, layout: str) -> np.ndarray:
        """All pixels [H, W, 3 or 4], decoded once for any number of crops."""
        if layout not in self._decoded:
            self._decoded[layout] = self._pixels(layout)
        return self._decoded[layout]

    def _pixels(self, layout: str, **reduction: int) -> np.ndarray:
        try:
            return simplejpeg.decode_jpeg(self._data, layout, **reduction)
        except ValueError:  # damaged: Pillow decides whether it can be used
            return np.asarray(_decode(self._data).convert(layout))


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG file, None for anything out of the ordinary, which is left to Pillow."""
    if not data.startswith(b'\xff\xd8\xff'):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if colours in ('YCbCr', 'Gray') and width * height <= Image.MAX_IMAGE_PIXELS else None


def _decode(data: bytes) -> Image.Image:
    """Decodes any image file to RGB with Pillow."""
    if not data:
        raise UnreadableImage('the file is empty')
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except Image.UnidentifiedImageError:
        raise UnreadableImage('not an image that Pillow knows') from None
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise UnreadableImage(str(error) or type(error).__name__) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow mode to RGB."""
    if image.mode == 'RGB':
        return image
    if image.mode == 'F':
        raise UnreadableImage('32-bit floating point pixels have no fixed range')
    if image.mode.startswith('I'):  # Pillow's own conversion would clip 16 bits at 255
        high_byte = np.clip(np.asarray(image), 0, 65535) >> 8
        image = Image.fromarray(high_byte.astype(np.uint8))
    elif image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    return image.convert('RGB')
