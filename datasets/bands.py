# SPDX-License-Identifier: Apache-2.0
"""Images of other than one or three channels (DATA.IMAGE_CHANNELS), such as RGB with alpha, or multispectral images.

Every channel is resized and cropped by itself with Pillow. Pillow's own images of two and four channels take the last one for
opacity, and weight the other channels by it when they are resized.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from datasets.images import EXTENSIONS, MAX_FILE, MAX_PIXELS, MAX_SIDE, UnreadableImage, loaded, to_rgb
from utils.text import NAME, printable

PLAIN = (1, 3)  # numbers of channels of plain images: gray, RGB
ALPHA = {2: 'LA', 4: 'RGBA'}  # Pillow's modes with these numbers of channels
ARRAY = '.npy'
_MAGIC = b'\x93NUMPY'
_TRANSPARENT = ('LA', 'La', 'PA', 'RGBA', 'RGBa')


class Bands:
    """An image of any number of channels, with the part of Pillow's interface that transforms use.

    Args:
        channels: an image of mode L per channel, of one size.
    """

    def __init__(self, channels: Sequence[Image.Image]):
        self.channels = list(channels)
        self.size = self.width, self.height = self.channels[0].size

    @classmethod
    def of(cls, pixels: np.ndarray) -> Bands:
        """Return the image of an array [H, W, C] uint8."""
        return cls([Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(pixels, -1, 0)])

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        return Bands([channel.crop(box) for channel in self.channels])

    def resize(self, size: tuple[int, int], resample: Image.Resampling, box: tuple | None = None) -> Bands:
        return Bands([channel.resize(size, resample, box) for channel in self.channels])

    def transpose(self, method: Image.Transpose) -> Bands:
        return Bands([channel.transpose(method) for channel in self.channels])

    def convert(self, mode: str) -> Image.Image:
        """Return a picture to look at: of one or two channels the first, in gray, else the first three as RGB."""
        shown = self.channels[:3] if len(self.channels) > 2 else self.channels[:1] * 3
        return Image.merge('RGB', shown).convert(mode)

    def tobytes(self) -> bytes:
        return b''.join(channel.tobytes() for channel in self.channels)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.stack([np.asarray(channel) for channel in self.channels], axis=-1)


def image_extensions(channels: int) -> tuple[str, ...]:
    """Return the extensions of image files with this number of channels."""
    return EXTENSIONS if channels in PLAIN else (*EXTENSIONS, ARRAY)


def decode_bands(data: bytes, channels: int, exif_rotate: bool = False) -> Bands:
    """Decode an image of `channels` channels.

    - `.npy`: an array [H, W, C] uint8.
    - TIFF of as many pages: each page, converted to gray, is a channel.
    - any other image: gray and alpha for two channels, RGB and alpha for four. Without alpha it is opaque, 255.

    Args:
        channels: neither 1 nor 3.
        exif_rotate: see `decode_image`; arrays and pages have no orientation.

    Raises:
        UnreadableImage: damaged data, or another number of channels.
    """
    if len(data) > MAX_FILE:
        raise UnreadableImage(f'the file has {len(data)} bytes, more than the {MAX_FILE} that are read')
    if data.startswith(_MAGIC):
        return Bands.of(_array(data, channels))
    with loaded(data) as image:
        count = _count_pages(image, channels) if image.format == 'TIFF' else 1
        if count > 1:
            return _pages(image, count, channels)
        return with_alpha(ImageOps.exif_transpose(image) if exif_rotate else image, channels)


def with_alpha(image: Image.Image, channels: int) -> Bands:
    """Split an image into gray and alpha, or into RGB and alpha. Raises UnreadableImage for other numbers of channels."""
    if channels not in ALPHA:
        raise UnreadableImage(
            f'an image of mode {image.mode} has no {channels} channels (DATA.IMAGE_CHANNELS): use .npy arrays [H, W, {channels}] '
            f'uint8, or TIFF files of {channels} pages'
        )
    transparent = image.mode in _TRANSPARENT or 'transparency' in image.info
    image = image.convert('RGBA') if transparent else to_rgb(image)
    return Bands(image.convert(ALPHA[channels]).split())


def _count_pages(image: Image.Image, most: int) -> int:
    """Return the number of pages of an open TIFF file, at most `most` + 1: a file may hold millions."""
    for number in range(1, most + 1):
        try:
            image.seek(number)
        except EOFError:
            image.seek(0)
            return number
    image.seek(0)
    return most + 1


def _pages(image: Image.Image, count: int, channels: int) -> Bands:
    """Return the pages of an open TIFF file as channels; `count`: result of `_count_pages`."""
    if count != channels:
        more = ' or more' if count > channels else ''
        raise UnreadableImage(f'a TIFF file of {count}{more} pages, not of {channels} (DATA.IMAGE_CHANNELS)')
    _check_pixels(image.width * image.height * channels)
    pages = []
    for number in range(channels):
        image.seek(number)
        if image.size != (pages[0].size if pages else image.size):
            raise UnreadableImage(f'page {number} of the TIFF file has another size than page 0')
        pages.append(to_rgb(image).convert('L'))
    return Bands(pages)


def _array(data: bytes, channels: int) -> np.ndarray:
    """Read a .npy file. Its header is checked before anything is allocated."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as error:  # damaged headers can raise any exception
        raise UnreadableImage(f'a damaged .npy file: {printable(error, NAME)}') from None
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != channels or 0 in shape:
        raise UnreadableImage(
            f'an array {list(shape)} of {dtype}, but DATA.IMAGE_CHANNELS needs [height, width, {channels}] of uint8'
        )
    _check_pixels(shape[0] * shape[1] * channels, max(shape[:2]))
    pixels = np.frombuffer(data, np.uint8, offset=stream.tell())
    if pixels.size != shape[0] * shape[1] * channels:
        raise UnreadableImage(
            f'an array {list(shape)} of uint8 in a .npy file of {pixels.size} values: it is truncated'
        )
    return pixels.reshape(shape, order='F' if fortran else 'C')


def _check_pixels(values: int, side: int = 0) -> None:
    """Raise UnreadableImage for an image above the limits of an RGB image."""
    if values > 3 * MAX_PIXELS or side > MAX_SIDE:
        raise UnreadableImage(
            f'{values} values are too many: the limits are {3 * MAX_PIXELS}, and {MAX_SIDE} pixels per side'
        )
