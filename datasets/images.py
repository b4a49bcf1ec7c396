# SPDX-License-Identifier: Apache-2.0
"""From the bytes of an image file to an RGB picture, or to the reason why not."""

from __future__ import annotations

import io

import numpy as np
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
