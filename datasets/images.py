# SPDX-License-Identifier: Apache-2.0
"""From the bytes of an image file to an RGB picture, or to the reason why not."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, features

from utils.text import NAME, printable

# Raster formats by Pillow's names. Its other readers stay shut: some start programs (EPS), most read what no camera writes.
_AVIF = 'avif' in features.modules and features.check_module('avif')
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'DIB', 'GIF', 'TIFF', 'PPM', 'JPEG2000', *(('AVIF',) if _AVIF else ()))
EXTENSIONS = (
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.png', '.apng', '.webp', '.bmp', '.dib', '.gif', '.tif', '.tiff'),
    *('.ppm', '.pgm', '.pbm', '.pnm', '.jp2', '.j2k', '.jpf', '.jpx', '.jpc', '.j2c', *(('.avif',) if _AVIF else ())),
)
# Limits of one image. The largest pictures of public data sets have 20 million pixels and 10 MB.
MAX_FILE = 128 << 20  # bytes of the file
MAX_PIXELS = 89_478_485  # what Pillow warns of: with all copies on the way to RGB up to 1.5 GB
MAX_SIDE = 65535  # pixels, as in JPEG files
MAX_PIXELS_OF = {'JPEG2000': MAX_PIXELS // 2}  # its decoder holds each channel twice, in 32 bits
MAX_SCANS = 100  # of a progressive JPEG; encoders write about 10
MAX_WORK = 2 << 30  # pixels times scans: a scan of a million pixels takes a millisecond, whatever its few bytes hold
_FEW_SCANS = 16  # up to here they need not be counted exactly
# First bytes of files that are no raster image, or one that Pillow does not decode here; the others it knows itself.
_OTHER_KINDS = (
    (b'%PDF', 'PDF'), (b'<svg', 'SVG'), (b'<', 'text with markup'), (b'PK', 'a zip archive'), (b'\0\0\0\x1cftyphei', 'HEIC'),
    (b'\0\0\0\x18ftyphei', 'HEIC'), (b'\0\0\0\x18ftypmif', 'HEIC'), (b'version https://git-lfs', 'a git-lfs pointer'),
)  # fmt: skip
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # refused instead


class UnreadableImage(Exception):
    """An image that cannot be decoded; the text is the reason. `Dataset.load` adds which image it is."""


def decode_image(data: bytes, exif_rotate: bool = False) -> Image.Image:
    """Decodes the bytes of an image file to RGB.

    Grey is copied to the three channels, 16 bits are reduced to 8, alpha is dropped, palettes and CMYK are converted; of
    animations the first frame is read.

    Args:
        exif_rotate: turn and mirror the pixels as the EXIF orientation says. The pipelines that published accuracies were
            measured with ignore it.

    Raises:
        UnreadableImage: empty, truncated or damaged data, something else than an image, or a decompression bomb.
    """
    return open_image(data, exif_rotate).convert('RGB')


def open_image(data: bytes, exif_rotate: bool = False) -> Image.Image | Jpeg:
    """The same picture, but a sound JPEG file is only decoded when, and as far as, a transform asks for its pixels.

    Raises:
        UnreadableImage: here or, for a `Jpeg`, when its pixels are asked for.
    """
    if len(data) > MAX_FILE:
        raise UnreadableImage(f'the file has {len(data)} bytes, more than the {MAX_FILE} that are read')
    size = _plain_jpeg_size(data)
    if size is None:
        return _decode(data, exif_rotate)
    return Jpeg(data, size, _jpeg_orientation(data) if exif_rotate else Orientation())


class Orientation:
    """How stored pixels become those to look at: rows and columns are swapped, then mirrored.

    Args:
        value: of the EXIF tag, 1 to 8; anything else changes nothing, as 1.
    """

    def __init__(self, value: object = 1):
        self.swap, self.mirror, self.flip = value in (5, 6, 7, 8), value in (2, 3, 6, 7), value in (3, 4, 7, 8)

    def size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the result."""
        return stored[::-1] if self.swap else stored

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Stored pixels [h, w, C] -> the result, a view of them."""
        pixels = pixels.swapaxes(0, 1) if self.swap else pixels
        return pixels[:: -1 if self.flip else 1, :: -1 if self.mirror else 1]

    def stored_box(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Where a box of a result of `size` lies among the stored pixels."""
        (width, height), (left, top, right, bottom) = size, box
        left, right = (width - right, width - left) if self.mirror else (left, right)
        top, bottom = (height - bottom, height - top) if self.flip else (top, bottom)
        return (top, left, bottom, right) if self.swap else (left, top, right, bottom)


class Jpeg:
    """A JPEG file, with what the first step of a transform uses of Pillow's interface.

    The pixels are those that Pillow gives: libjpeg-turbo decodes for both, but simplejpeg spends less around it.

    Args:
        size: (width, height) as stored.

    Attributes:
        size: (width, height) in the given orientation.
    """

    def __init__(self, data: bytes, size: tuple[int, int], orientation: Orientation):
        self.size = self.width, self.height = orientation.size(size)
        self._data = data
        self._stored_size = size
        self._orientation = orientation
        self._decoded: dict[str, np.ndarray] = {}

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        left, top, right, bottom = self._orientation.stored_box(box, self.size)
        pixels = self._orientation.apply(self._whole('RGBX')[top:bottom, left:right])
        pixels = np.ascontiguousarray(pixels)  # the layout Pillow has in memory
        return Image.frombytes('RGB', pixels.shape[1::-1], pixels.data, 'raw', 'RGBX')

    def convert(self, mode: str) -> Image.Image:
        whole = self.crop((0, 0, *self.size))
        return whole if mode == whole.mode else whole.convert(mode)

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        return self.convert('RGB').resize(size, resample)

    def reduced(self, box: tuple[int, int, int, int], side: int) -> np.ndarray:
        """Pixels of a box [h, w, 3] uint8, decoded at 1/2, 3/8, 1/4 or 1/8 where both sides stay at least `side`.

        The box then grows to whole decoded pixels.
        """
        left, top, right, bottom = self._orientation.stored_box(box, self.size)
        full_width, full_height = self._stored_size
        least = [-(-side * whole // part) for whole, part in zip(self._stored_size, (right - left, bottom - top))]
        if all(low <= -(-whole // 2) for low, whole in zip(least, self._stored_size)):
            pixels = self._pixels('RGB', min_width=least[0], min_height=least[1], min_factor=2)
        else:
            pixels = self._whole('RGB')
        height, width = pixels.shape[:2]
        rows = slice(top * height // full_height, -(-bottom * height // full_height))
        columns = slice(left * width // full_width, -(-right * width // full_width))
        return self._orientation.apply(pixels[rows, columns])

    def _whole(self, layout: str) -> np.ndarray:
        """All stored pixels [H, W, 3 or 4], decoded once for any number of crops."""
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
    if width * height > min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS):
        return None
    _check_scans(data, width * height)
    return (width, height) if colours in ('YCbCr', 'Gray') else None


def _check_scans(data: bytes, pixels: int) -> None:
    """Each scan of a JPEG file goes over all pixels. Raises UnreadableImage for more scans than any encoder writes."""
    if data.count(_SCAN) <= _FEW_SCANS:
        return
    limit = min(MAX_SCANS, MAX_WORK // max(pixels, 1))
    if count_scans(data, limit) > limit:
        raise UnreadableImage(f'a JPEG file of more than {limit} scans, which would take too long')


_SCAN, _END = b'\xff\xda', 0xD9


def count_scans(data: bytes, limit: int) -> int:
    """Scans of a JPEG file up to its end marker, which other data may follow; no more than `limit` + 1 are counted."""
    place, scans = 2, 0
    while scans <= limit:
        place = data.find(b'\xff', place)
        if place < 0 or place + 4 > len(data) or data[place + 1] == _END:
            break
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # part of the pixels, or a marker alone
            place += 2
        else:
            scans += marker == _SCAN[1]
            place += 2 + int.from_bytes(data[place + 2 : place + 4], 'big')
    return scans


def _decode(data: bytes, exif_rotate: bool = False) -> Image.Image:
    """Decodes any image file to RGB with Pillow."""
    with loaded(data) as image:
        picture = to_rgb(image)
        return _rotated(picture, _orientation(image)) if exif_rotate else picture


@contextlib.contextmanager
def loaded(data: bytes, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """The image of a file, decoded by Pillow, in the mode that it is stored in.

    Args:
        formats: those that are decoded, by Pillow's names.

    Raises:
        UnreadableImage: another format, damaged data, an image above the limits; also for what the block raises.
    """
    if not data:
        raise UnreadableImage('the file is empty')
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            check_size(image)
            if image.format in ('JPEG', 'MPO'):
                _check_scans(data, image.width * image.height)
            image.load()  # Pillow applies the orientation of TIFF files here
            yield image
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage(_refused(data, formats)) from None
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise UnreadableImage(printable(error, NAME) or type(error).__name__) from None


def check_size(image: Image.Image) -> None:
    """Raises UnreadableImage for an image, not decoded yet, that would take too much memory."""
    limit = MAX_PIXELS_OF.get(image.format, MAX_PIXELS)
    if image.width * image.height > limit or max(image.size) > MAX_SIDE:
        raise UnreadableImage(
            f'{image.width} x {image.height} pixels, but at most {limit} are decoded, and sides of {MAX_SIDE}'
        )


def _refused(data: bytes, formats: Sequence[str]) -> str:
    """Why a file is not decoded, and which format it has where that is known. None of Pillow's other readers is started."""
    head = data[:32]
    found = next((kind for magic, kind in _OTHER_KINDS if head.lstrip().lower().startswith(magic.lower())), None)
    if found is None:
        Image.init()
        for name, (_, accept) in Image.OPEN.items():
            with contextlib.suppress(Exception):  # these look at the first bytes only
                if accept is not None and accept(head) is True and name not in formats:
                    found = name
                    break
    return f'not an image that Pillow knows as {", ".join(formats)}' + (f', but {found}' if found else '')


def _orientation(image: Image.Image) -> Orientation:
    """That of the EXIF data, or XMP data, of an open file; damaged ones say nothing."""
    with contextlib.suppress(Exception):
        return Orientation(image.getexif().get(ExifTags.Base.Orientation))
    return Orientation()


def _jpeg_orientation(data: bytes) -> Orientation:
    """The same of a JPEG file, whose pixels are not decoded."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=FORMATS[:1]) as image:
        return _orientation(image)
    return Orientation()


def _rotated(image: Image.Image, orientation: Orientation) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(orientation.apply(np.asarray(image))))


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
