# SPDX-License-Identifier: Apache-2.0
"""Decoding of image files to RGB images."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, features

from utils.sizes import Side, size_pair
from utils.text import NAME, printable

# Allowed raster formats, by Pillow's names. Pillow's other readers are disabled: some start programs (EPS), and most read
# formats that photographs do not use.
_AVIF = 'avif' in features.modules and features.check_module('avif')
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'DIB', 'GIF', 'TIFF', 'PPM', 'JPEG2000', *(('AVIF',) if _AVIF else ()))
EXTENSIONS = (
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.mpo', '.png', '.apng', '.webp', '.bmp', '.dib', '.gif', '.tif', '.tiff'),
    *('.ppm', '.pgm', '.pbm', '.pnm', '.jp2', '.j2k', '.jpf', '.jpx', '.jpc', '.j2c', *(('.avif',) if _AVIF else ())),
)
# Limits of one image, above what cameras write.
MAX_FILE = 128 << 20  # bytes of the file
MAX_PIXELS = 89_478_485  # what Pillow warns of: with all copies on the way to RGB up to 1.5 GB
MAX_SIDE = 65535  # pixels, as in JPEG files
MAX_PIXELS_OF = {'JPEG2000': MAX_PIXELS // 2}  # its decoder holds each channel twice, in 32 bits
MAX_SCANS = 100  # of a progressive JPEG; encoders write about 10
MAX_WORK = 2 << 30  # pixels times scans: a scan of a million pixels takes a millisecond, whatever its few bytes hold
ROWS_BELOW = 16  # rows that are decoded below a box, of which the interpolation of colors needs four
_FEW_SCANS = 16  # up to here they need not be counted exactly
MAX_TILES = 1 << 18  # strips or tiles of a TIFF file, which Pillow reads one by one in Python
MAX_PLAIN = 16 << 20  # bytes of a PPM file of decimal numbers, which Pillow parses in Python
# First bytes of files that are no raster image, or one that Pillow does not decode here; the others it knows itself.
_OTHER_KINDS = (
    (b'%PDF', 'PDF'), (b'<svg', 'SVG'), (b'<', 'text with markup'), (b'PK', 'a zip archive'), (b'\0\0\0\x1cftyphei', 'HEIC'),
    (b'\0\0\0\x18ftyphei', 'HEIC'), (b'\0\0\0\x18ftypmif', 'HEIC'), (b'version https://git-lfs', 'a git-lfs pointer'),
)  # fmt: skip
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # refused instead
warnings.filterwarnings('ignore', module=r'PIL\.')  # one for each damaged entry of a file, thousands
# libtiff decodes each strip of a TIFF file as a JPEG file of its own, with up to 100 scans unless this is set.
os.environ.setdefault('LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER', str(_FEW_SCANS))


class UnreadableImage(Exception):
    """An image cannot be decoded; the text is the reason. `Dataset.load` adds the name of the image."""


def decode_image(data: bytes, exif_rotate: bool = False) -> Image.Image:
    """Decode the bytes of an image file to RGB.

    Grayscale is copied to three channels, 16 bits are reduced to 8, alpha is dropped, palettes and CMYK are converted. Of an
    animation the first frame is read.

    Args:
        exif_rotate: rotate and mirror the pixels by the EXIF orientation. The pipelines behind published accuracies ignore
            it.

    Raises:
        UnreadableImage: the data are empty, truncated, damaged, no image, or a decompression bomb.
    """
    return open_image(data, exif_rotate).convert('RGB')


def open_image(data: bytes, exif_rotate: bool = False) -> Image.Image | Jpeg:
    """Open an image like `decode_image`, but decode a valid JPEG file lazily, as far as a transform needs its pixels.

    Raises:
        UnreadableImage: here or, for a `Jpeg`, when its pixels are decoded.
    """
    if len(data) > MAX_FILE:
        raise UnreadableImage(f'the file has {len(data)} bytes, more than the {MAX_FILE} that are read')
    size = _plain_jpeg_size(data)
    if size is None:
        return _decode(data, exif_rotate)
    frame = one_scan_frame(data)
    if frame is None:
        _check_scans(data, size[0] * size[1])
    return Jpeg(data, size, _jpeg_orientation(data) if exif_rotate else Orientation(), frame)


def stored_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) from the header of an image file, without decoding it; None if it cannot be read."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.size
    return None


class Orientation:
    """EXIF orientation: rows and columns of the stored pixels are swapped, then mirrored.

    Args:
        value: value of the EXIF tag, 1 to 8; any other value means 1, no change.
    """

    def __init__(self, value: object = 1):
        self.swap, self.mirror, self.flip = value in (5, 6, 7, 8), value in (2, 3, 6, 7), value in (3, 4, 7, 8)

    def size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Return (width, height) of the result."""
        return stored[::-1] if self.swap else stored

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Return the result as a view of the stored pixels [h, w, C]."""
        pixels = pixels.swapaxes(0, 1) if self.swap else pixels
        return pixels[:: -1 if self.flip else 1, :: -1 if self.mirror else 1]

    def stored_box(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Convert a box in a result of `size` to the box in the stored pixels."""
        (width, height), (left, top, right, bottom) = size, box
        left, right = (width - right, width - left) if self.mirror else (left, right)
        top, bottom = (height - bottom, height - top) if self.flip else (top, bottom)
        return (top, left, bottom, right) if self.swap else (left, top, right, bottom)


class Jpeg:
    """A JPEG file with the part of Pillow's interface that the first step of a transform uses.

    The pixels equal Pillow's: both use libjpeg-turbo, but simplejpeg has less overhead.

    Args:
        size: (width, height) as stored.
        frame: see `one_scan_frame`.

    Attributes:
        size: (width, height) in the given orientation.
    """

    def __init__(self, data: bytes, size: tuple[int, int], orientation: Orientation, frame: int | None = None):
        self.size = self.width, self.height = orientation.size(size)
        self._data = data
        self._stored_size = size
        self._orientation = orientation
        self._frame = frame
        self._decoded: dict[str, np.ndarray] = {}

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        left, top, right, bottom = self._orientation.stored_box(box, self.size)
        pixels = self._orientation.apply(self._whole('RGBX')[top:bottom, left:right])
        pixels = np.ascontiguousarray(pixels)  # Pillow's memory layout
        return Image.frombytes('RGB', pixels.shape[1::-1], pixels.data, 'raw', 'RGBX')

    def convert(self, mode: str) -> Image.Image:
        whole = self.crop((0, 0, *self.size))
        return whole if mode == whole.mode else whole.convert(mode)

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        return self.convert('RGB').resize(size, resample)

    def reduced(self, box: tuple[int, int, int, int], size: Side, single: bool = False) -> np.ndarray:
        """Decode a box [h, w, 3] uint8 at 1/2, 3/8, 1/4 or 1/8 size if it still covers a square of `size`, or (height, width).

        The box is then enlarged to whole decoded pixels.

        Args:
            single: no other box of this image follows, so that the rows below this one need not be decoded.
        """
        left, top, right, bottom = self._orientation.stored_box(box, self.size)
        full_width, full_height = self._stored_size
        parts, wanted = (right - left, bottom - top), self._orientation.size(size_pair(size)[::-1])
        least = [-(-side * whole // part) for side, whole, part in zip(wanted, self._stored_size, parts)]
        if all(low <= -(-whole // 2) for low, whole in zip(least, self._stored_size)):
            pixels = self._pixels('RGB', min_width=least[0], min_height=least[1], min_factor=2)
        else:
            pixels = self._rows(bottom) if single else self._whole('RGB')
            return self._orientation.apply(pixels[top:bottom, left:right])
        height, width = pixels.shape[:2]
        rows = slice(top * height // full_height, -(-bottom * height // full_height))
        columns = slice(left * width // full_width, -(-right * width // full_width))
        return self._orientation.apply(pixels[rows, columns])

    def _whole(self, layout: str) -> np.ndarray:
        """Return all stored pixels [H, W, 3 or 4], decoded once for any number of crops."""
        if layout not in self._decoded:
            self._decoded[layout] = self._pixels(layout)
        return self._decoded[layout]

    def _rows(self, bottom: int) -> np.ndarray:
        """Return at least the first `bottom` stored rows [>= bottom, W, 3], without decoding all rows below them.

        The decoder stops at the height in the frame header. ROWS_BELOW more rows keep the interpolation of colors exact.
        A file that does not end with the end marker may be truncated: all of it is decoded.
        """
        rows = bottom + ROWS_BELOW
        if self._frame is None or rows > 0.95 * self._stored_size[1] or not self._data.endswith(_EOI):
            return self._whole('RGB')
        height = self._frame + 5
        data = b''.join([self._data[:height], rows.to_bytes(2, 'big'), self._data[height + 2 :]])
        try:
            return simplejpeg.decode_jpeg(data, 'RGB', strict=False)  # strict: an error for the data of the other rows
        except ValueError:
            return self._whole('RGB')

    def _pixels(self, layout: str, **reduction: int) -> np.ndarray:
        try:
            return simplejpeg.decode_jpeg(self._data, layout, **reduction)
        except ValueError:  # damaged: Pillow may still decode a part of it
            return np.asarray(_decode(self._data).convert(layout))


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a regular JPEG file; None for other files, which Pillow decodes."""
    if not data.startswith(b'\xff\xd8\xff'):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if width * height > min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS):
        return None
    return (width, height) if colors in ('YCbCr', 'Gray') else None


def _check_scans(data: bytes, pixels: int) -> None:
    """Each scan of a JPEG file goes over all pixels. Raises UnreadableImage for more scans than any encoder writes."""
    if data.count(_SCAN) <= _FEW_SCANS:
        return
    limit = min(MAX_SCANS, MAX_WORK // max(pixels, 1))
    if count_scans(data, limit) > limit:
        raise UnreadableImage(f'a JPEG file of more than {limit} scans, which would take too long')


_SCAN, _EOI = b'\xff\xda', b'\xff\xd9'
_SEQUENTIAL = (0xC0, 0xC1)  # markers of a frame that is not progressive


def one_scan_frame(data: bytes) -> int | None:
    """Return the position of the frame header of a JPEG file of which libjpeg reads one scan; None for other files.

    Such a file is sequential, with all components in the first scan. This reads the headers only: counting the scans reads
    the whole file, which takes 7 % of the time to prepare an image.
    """
    place, frame = 2, None
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in _SEQUENTIAL:
            frame = place
        elif marker == _SCAN[1]:
            return frame if frame is not None and data[place + 4] == data[frame + 9] else None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], 'big')
    return None


def count_scans(data: bytes, limit: int) -> int:
    """Scans of a JPEG file up to its end marker, which other data may follow; no more than `limit` + 1 are counted."""
    place, scans = 2, 0
    while scans <= limit:
        place = data.find(b'\xff', place)
        if place < 0 or place + 4 > len(data) or data[place + 1] == _EOI[1]:
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


_ROWS = 256  # of an image that are converted at once
_PLAIN = (b'P1', b'P2', b'P3')  # first bytes of PPM files of decimal numbers


def _decode(data: bytes, exif_rotate: bool = False) -> Image.Image:
    """Decode an image file to RGB with Pillow."""
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
            if image.format in ('JPEG', 'MPO') and one_scan_frame(data) is None:
                _check_scans(data, image.width * image.height)
            if len(image.tile) > MAX_TILES or (data[:2] in _PLAIN and len(data) > MAX_PLAIN):
                raise UnreadableImage('its pixels are in a form that would take too long to read')
            image.load()  # Pillow applies the orientation of TIFF files here
            yield image
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError:
        raise UnreadableImage(_refused(data, formats)) from None
    except Exception as error:  # damaged bytes can raise any exception
        raise UnreadableImage(printable(error, NAME) or type(error).__name__) from None


def check_size(image: Image.Image) -> None:
    """Raises UnreadableImage for an image, not decoded yet, that would take too much memory."""
    limit = MAX_PIXELS_OF.get(image.format, MAX_PIXELS)
    if image.width * image.height > limit or max(image.size) > MAX_SIDE:
        raise UnreadableImage(
            f'{image.width} x {image.height} pixels are too many: the limits are {limit}, and {MAX_SIDE} per side'
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
    """Return the orientation in the EXIF or XMP data of an open file; ignore damaged data."""
    with contextlib.suppress(Exception):
        return Orientation(image.getexif().get(ExifTags.Base.Orientation))
    return Orientation()


def _jpeg_orientation(data: bytes) -> Orientation:
    """Return the orientation of a JPEG file without decoding its pixels."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=FORMATS[:1]) as image:
        return _orientation(image)
    return Orientation()


def _rotated(image: Image.Image, orientation: Orientation) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(orientation.apply(np.asarray(image))))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB."""
    if image.mode == 'RGB':
        return image
    if image.mode == 'F':
        raise UnreadableImage('32-bit floating point pixels have no fixed range')
    if image.mode.startswith('I'):  # Pillow's conversion would clip 16 bits at 255
        image = _high_byte(image)
    elif image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    return image.convert('RGB')


def _high_byte(image: Image.Image) -> Image.Image:
    """Reduce 16 bits to 8, in parts, since Pillow stores 32 bits per pixel."""
    result = np.empty((image.height, image.width), np.uint8)
    for top in range(0, image.height, _ROWS):
        rows = np.asarray(image.crop((0, top, image.width, min(top + _ROWS, image.height))))
        result[top : top + _ROWS] = np.clip(rows, 0, 65535) >> 8
    return Image.fromarray(result)
