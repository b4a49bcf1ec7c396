# SPDX-License-Identifier: Apache-2.0
"""JPEG files: the fast decoder gives Pillow's pixels, and Pillow's verdict on damaged ones."""

from __future__ import annotations

import contextlib
import io
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps

from config import get_config
from datasets import build_dataloader, build_dataset
from datasets.images import Jpeg, UnreadableImage, count_scans, decode_image, one_scan_frame, open_image, to_rgb
from datasets.opencv import opencv
from datasets.segmentation import read_values
from datasets.transforms import build_transform, resize_smoothed, smoothing_kernel
from tests.attacks import pictures
from utils.errors import UserError


def photograph(width: int, height: int, seed: int = 0, noise: float = 4) -> Image.Image:
    """Smooth colors with some noise."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((width, height), 3)
    return Image.fromarray(
        (np.asarray(smooth) + rng.normal(0, noise, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (17, 33), (160, 121)])
@pytest.mark.parametrize('subsampling', ['4:4:4', '4:2:2', '4:2:0'])
@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'quality': 12}, {'restart_marker_rows': 1}])
def test_same_pixels_as_pillow(size, subsampling, options):
    data = jpeg(photograph(*size), subsampling=subsampling, **options)
    assert isinstance(open_image(data), Jpeg)
    assert np.array_equal(np.asarray(decode_image(data)), by_pillow(data))


@pytest.mark.parametrize('mode', ['L', 'CMYK'])
def test_other_colors(mode):
    data = jpeg(photograph(50, 40).convert(mode))
    assert isinstance(open_image(data), Jpeg) == (mode == 'L')
    assert decode_image(data).mode == 'RGB'
    assert np.array_equal(np.asarray(decode_image(data)), by_pillow(data))


DATA = jpeg(photograph(90, 70), quality=92)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 89), st.integers(0, 69), st.integers(1, 90), st.integers(1, 70))
def test_what_steps_use_of_it(left, top, width, height):
    """Crops, resizing and conversion are Pillow's."""
    picture, expected = open_image(DATA), Image.fromarray(by_pillow(DATA))
    assert (picture.size, picture.width, picture.height) == (expected.size, *expected.size)
    box = (left, top, min(90, left + width), min(70, top + height))
    assert np.array_equal(np.asarray(picture.crop(box)), np.asarray(expected.crop(box)))
    for one, other in (
        (picture.resize((width, height), 3), expected.resize((width, height), 3)),
        (picture.convert('L'), expected.convert('L')),
    ):
        assert (one.mode, one.tobytes()) == (other.mode, other.tobytes())


# ---------------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize('seed', range(60))
def test_damaged_like_pillow(seed):
    """Cut or altered anywhere: the pixels that Pillow makes of it, or its refusal, which names itself."""
    rng = np.random.default_rng(seed)
    data = bytearray(DATA)
    if seed % 2:
        del data[rng.integers(len(data)) :]
    for place in rng.integers(len(data), size=seed % 3):
        data[place] = rng.integers(256)
    data = bytes(data)
    try:
        expected = by_pillow(data)
    except Exception:
        with pytest.raises(UnreadableImage):
            decode_image(data)
    else:
        assert np.array_equal(np.asarray(decode_image(data)), expected)


def test_truncated_jpeg_is_found_when_it_is_decoded(tmp_path, make_config):
    """It opens well; training names it, or takes the next image, augmented as if nothing had happened."""
    for name, data in (('a', DATA), ('b', DATA[: len(DATA) // 2]), ('c', jpeg(photograph(60, 60, 1)))):
        (tmp_path / f'{name}.jpg').write_bytes(data)
    (tmp_path / 'train_list.txt').write_text('a.jpg 0\nb.jpg 1\nc.jpg 2\n')
    config = make_config(tmp_path)
    with pytest.raises(UserError, match=r'b\.jpg.*number 1.*truncated'):
        list(build_dataloader(config, build_dataset(config, 'train'), training=True).epoch(0))
    config = make_config(tmp_path, DATA__BAD_IMAGE='skip')
    dataset = build_dataset(config, 'train')
    (batch,) = build_dataloader(config, dataset, training=True).epoch(0)
    assert (sorted(batch.indices), batch.skipped) == ([0, 2, 2], 1)
    place = list(batch.indices).index(2)
    other = 1 + place + list(batch.indices[place + 1 :]).index(2)
    assert not np.array_equal(batch.images[place], batch.images[other])


def test_bomb_is_left_to_pillow(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 3000)
    with pytest.raises(UnreadableImage, match='exceeds limit'):
        decode_image(DATA)


# ---------------------------------------------------------------------------------------------------- orientation
def oriented(value: int, kind: str = 'JPEG', size: tuple[int, int] = (97, 61)) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    buffer = io.BytesIO()
    photograph(*size).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def upright(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB')


@pytest.mark.parametrize('value', range(10))
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_exif_orientation(kind, value):
    """Like Pillow's exif_transpose, for all values and for what is none; ignored unless it is asked for."""
    data = oriented(value, kind)
    expected = upright(data)
    for found in (decode_image(data, exif_rotate=True), open_image(data, exif_rotate=True)):
        assert found.size == expected.size
        assert np.array_equal(np.asarray(found.convert('RGB')), np.asarray(expected))
    assert np.array_equal(np.asarray(decode_image(data)), by_pillow(data))


@pytest.mark.parametrize('value', range(1, 9))
def test_crops_of_a_turned_jpeg(value):
    """Boxes are those of the turned picture, in the fast decoder's reduced pixels too."""
    found, expected = (
        open_image(oriented(value, size=(640, 480)), exif_rotate=True),
        upright(oriented(value, size=(640, 480))),
    )
    assert isinstance(found, Jpeg)
    for box in ((0, 0, *expected.size), (30, 50, 171, 333), (200, 7, 460, 300)):
        assert np.array_equal(np.asarray(found.crop(box)), np.asarray(expected.crop(box)))
        assert np.array_equal(found.reduced(box, 500), np.asarray(expected.crop(box)))
        small = Image.fromarray(found.reduced(box, 30))
        assert small.width < box[2] - box[0]
        shrunk, exact = (np.asarray(each.resize((8, 8), 4), int) for each in (small, expected.crop(box)))
        assert np.abs(shrunk - exact).mean() < 6
    assert found.resize((20, 30), 3).tobytes() == expected.resize((20, 30), 3).tobytes()


@pytest.mark.parametrize(
    'exif', [b'Exif\0\0', b'Exif\0\0MM\0*\0\0\0\x08\xff\xff', b'Exif\0\0' + b'\xff' * 40, b'nonsense']
)
@pytest.mark.parametrize('kind', ['JPEG', 'WEBP'])
def test_damaged_exif_data_say_nothing(kind, exif):
    buffer = io.BytesIO()
    photograph(40, 30).save(buffer, kind, exif=exif)
    assert np.array_equal(np.asarray(decode_image(buffer.getvalue(), True)), by_pillow(buffer.getvalue()))


# ---------------------------------------------------------------------------------------------------- FAST_RESIZE
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 500), st.integers(0, 300), st.integers(1, 640), st.integers(1, 480), st.integers(1, 200))
def test_reduced(left, top, width, height, side):
    """Every side keeps `side` pixels or all it has; the content is that of the box."""
    picture = open_image(LARGE)
    box = (left, top, min(640, left + width), min(480, top + height))
    pixels = picture.reduced(box, side)
    for length, full in zip(pixels.shape[1::-1], (box[2] - box[0], box[3] - box[1])):
        assert min(side, full) <= length <= full + 1
    if min(box[2] - box[0], box[3] - box[1]) >= 24:
        expected = Image.fromarray(by_pillow(LARGE)).resize((8, 8), Image.Resampling.BOX, box)
        found = Image.fromarray(pixels).resize((8, 8), Image.Resampling.BOX)
        assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).mean() < 6


LARGE = jpeg(photograph(640, 480), quality=92)


@pytest.mark.parametrize(('box', 'factor'), [((0, 0, 640, 480), 4), ((0, 0, 400, 200), 2), ((0, 0, 199, 480), 1)])
def test_reduction_factor(box, factor):
    pixels = open_image(LARGE).reduced(box, 100)
    assert pixels.shape == ((box[3] - box[1]) // factor, (box[2] - box[0]) // factor, 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(['444', '422', '420', '440', '411']), st.integers(1, 300), st.sampled_from([b'', b'\0']))
def test_a_single_box_is_decoded_without_the_rows_below(subsampling, bottom, rest):
    """Its pixels are exact. Files that go on after their end are decoded as a whole."""
    pixels = np.asarray(photograph(120, 300, noise=20))
    data = simplejpeg.encode_jpeg(pixels, 80, colorsubsampling=subsampling) + rest
    picture = open_image(data)
    found = picture.reduced((20, 0, 110, bottom), 120, single=True)
    assert np.array_equal(found, simplejpeg.decode_jpeg(data)[:bottom, 20:110])
    assert bool(picture._decoded) == (bottom + 16 > 0.95 * 300 or bool(rest))


def test_a_single_box_of_a_damaged_jpeg():
    """A truncated file is refused, wherever the box lies; so is a damaged header."""
    with pytest.raises(UnreadableImage, match='truncated'):
        open_image(LARGE[:-5000]).reduced((0, 0, 640, 100), 640, single=True)
    scan = LARGE.index(b'\xff\xda')
    damaged = LARGE[: scan + 5] + b'\x09' + LARGE[scan + 6 :]  # a component that does not exist
    with pytest.raises(UnreadableImage):
        open_image(damaged).reduced((0, 0, 640, 100), 640, single=True)


def test_reduced_damaged_jpeg():
    with pytest.raises(UnreadableImage, match='truncated'):
        open_image(LARGE[:-5000]).reduced((0, 0, 640, 480), 100)


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear', 'random'])
@pytest.mark.parametrize(('size', 'large'), [(224, True), (96, True), (48, False)])
def test_fast_resize_stays_close(interpolation, size, large):
    """The same boxes, filters and flips, close pixels, from JPEG and other files; evaluation is not touched."""
    keys = ['DATA.IMAGE_SIZE', size, 'TRAIN.RAND_AUGMENT', False, 'TRAIN.COLOR_JITTER', 0.0]
    keys += ['DATA.INTERPOLATION', interpolation]
    fast, exact = get_config(None, keys), get_config(None, [*keys, 'DATA.FAST_RESIZE', False])
    data, differences = LARGE if large else DATA, []
    for picture in (open_image(data), Image.fromarray(by_pillow(data))):
        for seed in range(10):
            expected, found = (
                build_transform(c, training=True).image(picture, np.random.default_rng(seed)).astype(int)
                for c in (exact, fast)
            )
            assert found.shape == (size, size, 3)
            differences.append(np.abs(found - expected).mean())
    assert 0 < np.mean(differences) < max(differences) < 2
    evaluated = [build_transform(c, training=False).image(open_image(data)) for c in (exact, fast)]
    assert np.array_equal(*evaluated)


@pytest.mark.parametrize('keys', [['DATA.IMAGE_CHANNELS', 1], ['DATA.IMAGE_SIZE', 32], ['DATA.CROP', 'padded']])
def test_pillow_keeps_gray_and_padded_images(keys):
    picture = open_image(LARGE)
    found, expected = (
        build_transform(get_config(None, [*keys, *more]), training=True).image(picture, np.random.default_rng(0))
        for more in ([], ['DATA.FAST_RESIZE', False])
    )
    assert np.array_equal(found, expected)


@pytest.mark.parametrize('resample', [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize('shape', [(340, 340), (400, 230), (150, 330), (224, 640), (120, 150), (900, 1300)])
def test_nearer_to_pillow_than_without_smoothing(shape, resample):
    """Shrinking, enlarging, and one of each; from a factor of two on an area filter goes before."""
    pixels = np.asarray(photograph(shape[1], shape[0], noise=20))
    found = resize_smoothed(pixels, 224, resample).astype(int)
    rough = opencv().resize(pixels, (224, 224), interpolation=2 if resample == Image.Resampling.BICUBIC else 1)
    expected = np.asarray(Image.fromarray(pixels).resize((224, 224), resample), int)
    difference, rough = (np.abs(each - expected).mean() for each in (found, rough.astype(int)))
    assert difference < (0.6 * rough if min(shape) > 224 else rough + 1e-9)
    flat = np.full((*shape, 3), 77, np.uint8)
    assert (resize_smoothed(flat, 224, resample) == 77).all()


def test_smoothing_kernel():
    """Weights sum to 1 and have the variance that a tent filter widened by s has more than one of width 1."""
    for s in (1.01, 1.3, 2.0, 2.5, 3.0):
        kernel = smoothing_kernel(s)
        assert kernel.sum() == pytest.approx(1)
        assert kernel.min() >= 0
        offsets = np.arange(len(kernel)) - len(kernel) // 2
        assert kernel @ offsets**2 == pytest.approx((s**2 - 1) / 6)
    assert smoothing_kernel(1.0).tolist() == smoothing_kernel(0.5).tolist() == [1.0]


def test_exact_is_what_pillow_makes():
    """All of training's steps without FAST_RESIZE, whether they start from the file or from Pillow's picture."""
    config = get_config(None, ['DATA.IMAGE_SIZE', 64, 'DATA.FAST_RESIZE', False])
    transform = build_transform(config, training=True)
    for seed in range(10):
        found, expected = (
            transform.image(picture, np.random.default_rng(seed))
            for picture in (open_image(LARGE), Image.fromarray(by_pillow(LARGE)))
        )
        assert np.array_equal(found, expected)


# ---------------------------------------------------------------------------------------------------- hostile files
def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A black picture of one bit per pixel."""
    header = struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + -(-width // 8)) * height))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


def progressive(scans: int, side: int = 400, mode: str = 'RGB') -> bytes:
    """The last scan of a picture again and again."""
    data = jpeg(Image.new(mode, (side, side)), progressive=True)
    return data[:-2] + data[data.rindex(b'\xff\xda') : -2] * scans + b'\xff\xd9'


PROGRAMS = {
    'EPS': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\nshowpage\n',
    'EPS in binary': b'\xc5\xd0\xd3\xc6' + bytes(40),
    'PDF': b'%PDF-1.7\n',
    'SVG': b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    'WMF': b'\xd7\xcd\xc6\x9a\0\0' + bytes(50),
    'PSD': b'8BPS\0\1' + bytes(40),
    'ICO': b'\0\0\1\0\1\0' + bytes(40),
    'FITS': b'SIMPLE  =                    T' + bytes(80),
    'HEIC': b'\0\0\0\x18ftypheic' + bytes(20),
}


@pytest.mark.parametrize('name', PROGRAMS)
def test_formats_that_are_not_decoded_are_named(name, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *_, **__: pytest.fail('a program was started'))
    for read in (decode_image, open_image, read_values):
        with pytest.raises(UnreadableImage, match=f'but {name.partition(" ")[0]}$'):
            read(PROGRAMS[name])


@pytest.mark.parametrize('size', [(5_000_000, 1), (1, 5_000_000), (65536, 2), (9500, 9500), (13300, 13300)])
def test_pictures_that_are_too_large(size):
    for read in (decode_image, open_image, read_values):
        with pytest.raises(UnreadableImage, match=f'{size[0]} x {size[1]} pixels are too many'):
            read(png(*size))


def test_a_wide_picture_that_is_read():
    assert open_image(png(65535, 1)).size == (65535, 1)


def test_limits_of_other_formats(monkeypatch):
    monkeypatch.setattr('datasets.images.MAX_PIXELS', 3000)
    monkeypatch.setattr('datasets.images.MAX_PIXELS_OF', {'JPEG2000': 1500})
    for kind in ('TIFF', 'GIF', 'BMP', 'WEBP', 'PPM', 'PNG', 'JPEG', 'JPEG2000'):
        buffer = io.BytesIO()
        Image.new('RGB', (48, 48)).save(buffer, kind)
        if kind != 'JPEG2000':
            assert decode_image(buffer.getvalue()).size == (48, 48)
        buffer = io.BytesIO()
        Image.new('RGB', (48, 65)).save(buffer, kind)
        with pytest.raises(UnreadableImage, match=r'48 x 65 pixels'):
            decode_image(buffer.getvalue())


def test_files_that_are_too_large(monkeypatch):
    monkeypatch.setattr('datasets.images.MAX_FILE', 1000)
    with pytest.raises(UnreadableImage, match='more than the 1000 that are read'):
        open_image(DATA)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_jpegs_of_thousands_of_scans(mode):
    for read in (decode_image, open_image):
        with pytest.raises(UnreadableImage, match='more than 100 scans'):
            read(progressive(3000, mode=mode))
    assert decode_image(progressive(0, mode=mode)).size == (400, 400)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_sequential_jpegs_are_decoded_in_one_scan(mode):
    """Their scans are not counted: libjpeg reads no other one, however many follow."""
    buffer = io.BytesIO()
    Image.new(mode, (2000, 2000)).save(buffer, 'JPEG')
    data = buffer.getvalue()
    assert data[one_scan_frame(data) :][:2] == b'\xff\xc0'
    assert one_scan_frame(progressive(0, mode=mode)) is one_scan_frame(data[:20]) is None
    scan = data[data.index(b'\xff\xda') :][:60]
    start = time.process_time()
    with contextlib.suppress(UnreadableImage):
        decode_image(data[:-2] + 3000 * scan + data[-2:])
    assert time.process_time() - start < 2


def test_the_limit_of_scans_falls_with_the_size():
    with pytest.raises(UnreadableImage, match='more than 85 scans'):
        open_image(progressive(90, side=5000))


def test_other_data_behind_a_jpeg_are_no_scans():
    """Motion photos have a film there, whose bytes are random."""
    data = progressive(0)
    assert count_scans(data, 100) == 10
    assert count_scans(data + b'\xff\xda' * 1000, 100) == 10
    comment = data[:2] + b'\xff\xfe' + struct.pack('>H', 2002) + b'\xff\xda' * 1000 + data[2:]
    assert count_scans(comment, 100) == 10
    assert decode_image(comment).size == (400, 400)
    for cut in range(len(data)):
        assert count_scans(data[:cut], 100) <= 10


def test_tiff_files_of_progressive_jpegs_have_few_scans():
    """libtiff decodes each strip as a JPEG file; 1000 strips may be the same one."""
    strip = pictures.progressive(1024, 64, 60)
    start = time.process_time()
    with pytest.raises(UnreadableImage):
        decode_image(pictures.tiff(1024, 65472, strip, 1023, 64, compression=7))
    assert time.process_time() - start < 2


def test_forms_that_take_long_are_refused():
    for data in (pictures.tiff(8, 65535, bytes(8), 300_000, 1), b'P3 3000 2222 255\n' + b'0 ' * 9_000_000):
        with pytest.raises(UnreadableImage, match='take too long to read'):
            decode_image(data)


def test_damaged_tags_say_nothing(recwarn):
    entries = [(tag, 7, 150_000, struct.pack('<I', 8)) for tag in range(1000, 1100)]
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', module=r'PIL\.')  # as datasets/images.py; pytest resets it
        with contextlib.suppress(UnreadableImage):
            decode_image(pictures.ifd(entries))
    assert not recwarn


def test_integers_are_converted_in_parts():
    values = np.arange(600 * 300, dtype='i4').reshape(600, 300)
    picture = to_rgb(Image.fromarray(values))
    np.testing.assert_array_equal(np.asarray(picture)[..., 1], np.clip(values, 0, 65535) >> 8)
