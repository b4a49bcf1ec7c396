# SPDX-License-Identifier: Apache-2.0
"""Hostile and damaged images: bombs made by hand, and damaged files of every format."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from datasets.images import FORMATS, decode_image, open_image
from datasets.segmentation import read_values
from tests.attacks.mutations import mutants

SIDE = 9459  # pixels; a square of this side is just above the limit, one row less just below


def image_file(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def valid_files() -> dict[str, bytes]:
    """A small picture in each format and in several variants of it."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    picture = Image.fromarray(pixels)
    exif = b'Exif\0\0' + ifd([(274, 3, 1, struct.pack('<I', 6)), (305, 2, 4, b'abc\0')])
    files = {kind: image_file(picture, kind) for kind in FORMATS if kind != 'DIB'}
    return {
        **files,
        'JPEG exif': image_file(picture, 'JPEG', exif=exif),
        'JPEG progressive': image_file(picture, 'JPEG', progressive=True),
        'JPEG gray': image_file(picture.convert('L'), 'JPEG'),
        'JPEG cmyk': image_file(picture.convert('CMYK'), 'JPEG'),
        'PNG palette': image_file(picture.quantize(9), 'PNG', transparency=1),
        'PNG 16': image_file(Image.fromarray(pixels[..., 0].astype('u2') << 5), 'PNG'),
        'WEBP lossless': image_file(picture, 'WEBP', lossless=True, exif=exif),
        'PNG alpha': image_file(picture.convert('RGBA'), 'PNG', exif=exif),
        **{f'TIFF {name}': image_file(picture, 'TIFF', compression=name) for name in ('tiff_lzw', 'jpeg', 'packbits')},
        'TIFF int': image_file(Image.fromarray(pixels[..., 0].astype('i4')), 'TIFF'),
        'GIF frames': image_file(picture, 'GIF', save_all=True, append_images=[picture.rotate(90)] * 3),
        'PPM plain': b'P3 2 2 255\n' + b'1 2 3 ' * 4,
        'PPM 16': b'P6 4 4 65535\n' + bytes(96),
    }


def ifd(entries: list[tuple[int, int, int, bytes]], behind: bytes = b'') -> bytes:
    """A TIFF file: (tag, type, count, four bytes of value or offset) each."""
    table = b''.join(struct.pack('<HHI', *entry[:3]) + entry[3] for entry in sorted(entries))
    return b'II*\0\x08\0\0\0' + struct.pack('<H', len(entries)) + table + bytes(4) + behind


def tiff(width: int, height: int, data: bytes, strips: int, rows: int, compression: int = 1) -> bytes:
    """A gray TIFF file of strips that all are the same bytes."""
    number = struct.Struct('<I').pack
    size = 8 + 2 + 12 * 8 + 4
    entries = [
        (256, 4, 1, number(width)), (257, 4, 1, number(height)), (258, 3, 1, number(8)), (259, 3, 1, number(compression)),
        (262, 3, 1, number(1)), (273, 4, strips, number(size if strips > 1 else size)), (278, 4, 1, number(rows)),
        (279, 4, strips, number(size + 4 * strips if strips > 1 else len(data))),
    ]  # fmt: skip
    place = number(size + 8 * strips)
    return ifd(entries, place * strips + number(len(data)) * strips + data if strips > 1 else data)


def png(width: int, height: int, color: int, bits: int, data: bytes = b'') -> bytes:
    """Black pixels, or what `data` unpacks to."""
    if not data:
        row = (width * {0: 1, 2: 3, 4: 2, 6: 4}[color] * bits + 7) // 8 + 1
        packer = zlib.compressobj(9)
        data = (
            b''.join(packer.compress(bytes(row * min(256, height - top))) for top in range(0, height, 256))
            + packer.flush()
        )

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))

    head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, color, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', data) + chunk(b'IEND', b'')


def progressive(width: int, height: int, scans: int) -> bytes:
    """A JPEG file whose last scan is repeated."""
    data = image_file(Image.new('RGB', (width, height)), 'JPEG', progressive=True)
    last = data.rindex(b'\xff\xda')
    return data[:last] + data[last:-2] * scans + data[-2:]


def patched(data: bytes, name: bytes, skip: int, numbers: tuple[int, int]) -> bytes:
    """Other numbers, `skip` bytes behind the name of a box."""
    place = data.index(name) + len(name) + skip
    return data[:place] + struct.pack('>II', *numbers) + data[place + 8 :]


def crafted() -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield (name, function that makes the file)."""
    yield (
        'EPS',
        lambda: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch HIT) (w) file\n%%EOF',
    )
    yield 'EPS in DOS form', lambda: b'\xc5\xd0\xd3\xc6' + struct.pack('<II', 32, 99) + bytes(20) + b'%!PS-Adobe'
    for name, head in {
        'FITS': b'SIMPLE  = T',
        'WMF': b'\xd7\xcd\xc6\x9a',
        'PSD': b'8BPS\0\1',
        'ICO': b'\0\0\1\0\1\0',
    }.items():
        yield name, lambda head=head: head + bytes(2000)
    for color, bits in ((6, 16), (2, 8), (0, 16), (0, 8), (4, 16)):
        yield f'PNG {color} {bits}', lambda color=color, bits=bits: png(SIDE, SIDE - 1, color, bits)
    yield 'PNG above', lambda: png(SIDE, SIDE, 0, 1)
    yield 'PNG thin', lambda: png(5_000_000, 1, 0, 8)
    yield 'PNG of bombs', lambda: png(8, 8, 2, 8, zlib.compress(bytes(200 << 20), 9))
    yield 'WebP lossless', lambda: image_file(Image.new('RGB', (SIDE, SIDE - 1)), 'WEBP', lossless=True, method=0)
    yield 'GIF', lambda: image_file(Image.new('L', (SIDE, SIDE - 1)), 'GIF')
    yield 'GIF frame', lambda: b'GIF89a' + struct.pack('<HHBBB', 1, 1, 0x80, 0, 0) + bytes(6) + b',' + struct.pack('<HHHHB', 0, 0, 65535, 65535, 0) + b'\2\2D\1\0;'  # fmt: skip
    yield 'JPEG 2000 small box', lambda: patched(image_file(Image.new('RGB', (3000, 3000)), 'JPEG2000'), b'ihdr', 0, (64, 64))  # fmt: skip
    yield 'JPEG 2000 large size', lambda: patched(image_file(Image.new('RGB', (3000, 3000)), 'JPEG2000'), b'\xff\x51', 4, (60000, 60000))  # fmt: skip
    yield 'JPEG 2000 small tiles', lambda: patched(image_file(Image.new('RGB', (3000, 3000)), 'JPEG2000'), b'\xff\x51', 20, (1, 1))  # fmt: skip
    if 'AVIF' in FORMATS:
        yield 'AVIF small box', lambda: patched(image_file(Image.new('RGB', (3000, 3000)), 'AVIF', speed=10), b'ispe', 4, (9, 9))  # fmt: skip
    for scans in (40, 1500):
        yield f'JPEG of {scans} scans', lambda scans=scans: progressive(6000, 6000, scans)
    strip = progressive(1024, 64, 60)
    yield 'TIFF of JPEG files', lambda: tiff(1024, 65472, strip, 1023, 64, compression=7)
    yield 'TIFF of many strips', lambda: tiff(8, 65535, bytes(8), 65535, 1)
    yield 'TIFF of a million strips', lambda: tiff(8, 65535, bytes(8), 1_000_000, 1)
    yield 'TIFF of entries', lambda: ifd([(tag, 7, 150_000, struct.pack('<I', 8)) for tag in range(1000, 16000)])
    yield 'TIFF integers', lambda: image_file(Image.new('I', (SIDE, SIDE - 1)), 'TIFF', compression='tiff_deflate')
    yield 'TIFF loop', lambda: b'II*\0\x08\0\0\0\0\0\x08\0\0\0'
    yield 'PPM plain', lambda: b'P3 3000 2222 255\n' + b'0 ' * 10_000_000
    yield 'PPM digits', lambda: b'P6 ' + b'9' * 100_000 + b' 1 255\n'
    yield 'PPM comment', lambda: b'P6 #' + b'x' * 10_000_000
    yield 'BMP of runs', lambda: b'BM' + struct.pack('<IIIIiiHHIIIIII', 99, 0, 1078, 40, 30000, 2900, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024) + b'\0\2\xff\xff' * 300_000  # fmt: skip
    exif = b'Exif\0\0' + ifd([(tag, 7, 60_000, struct.pack('<I', 8)) for tag in range(1000, 5900)])
    yield 'EXIF of entries', lambda: image_file(Image.new('RGB', (9, 9)), 'JPEG', exif=exif[:65000])


def decoded(data: bytes) -> None:
    """Decode as the training, the prediction, and label maps do."""
    errors = []
    for read in (decode_image, lambda data: open_image(data, exif_rotate=True).convert('RGB'), read_values):
        try:
            read(data)
        except Exception as error:
            errors.append(error)
    for error in errors:
        raise error


def attacks(tries: int, made: bool = True) -> Iterator[tuple[str, Callable[[], object]]]:
    for name, make in crafted() if made else ():
        yield name, lambda make=make: decode_image(make())
    files = valid_files()  # damaged ones follow
    for index, (name, data) in enumerate(files.items()):
        for number, damaged in enumerate(mutants(data, tries // len(files), seed=index)):
            yield f'{number} of {name}', lambda damaged=damaged: decoded(damaged)
