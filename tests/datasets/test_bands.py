# SPDX-License-Identifier: Apache-2.0
"""Images of other than one or three channels: formats, transforms, data sets."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config import get_config
from datasets import build_dataloader, build_dataset
from datasets.augment import BICUBIC
from datasets.bands import Bands, decode_bands
from datasets.batch import to_device
from datasets.dense import dense_transform
from datasets.images import UnreadableImage
from datasets.sample import LabelMap, Sample
from datasets.subset import first_images
from datasets.transforms import build_transform, two_view_transform
from tasks import build_task
from tasks.pictures import as_image, image_grid
from tools import make_lmdb, make_zip
from utils.errors import UserError

PLAIN_TRAINING = ('TRAIN.RAND_AUGMENT', False, 'TRAIN.COLOR_JITTER', 0)


def config_of(channels, *options):
    statistics = ('DATA.IMAGENET_MEAN', [0.4] * channels, 'DATA.IMAGENET_STD', [0.2] * channels)
    return get_config(None, ['DATA.IMAGE_CHANNELS', channels, *statistics, *PLAIN_TRAINING, *options])


def pixels(height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), 'uint8')


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def saved(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------- formats
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([2, 4, 5, 13]), st.booleans())
def test_arrays(height, width, channels, fortran):
    array = pixels(height, width, channels)
    found = decode_bands(npy(np.asfortranarray(array) if fortran else array), channels)
    assert found.size == (width, height)
    np.testing.assert_array_equal(np.asarray(found), array)


def test_alpha():
    """Colors under transparent pixels stay as they are stored."""
    array = pixels(6, 5, 4)
    array[0, 0] = 10, 20, 30, 0
    np.testing.assert_array_equal(np.asarray(decode_bands(saved(Image.fromarray(array)), 4)), array)
    gray = pixels(6, 5, 2)
    np.testing.assert_array_equal(np.asarray(decode_bands(saved(Image.fromarray(gray, 'LA')), 2)), gray)


def test_images_without_alpha_are_opaque():
    color, gray = Image.fromarray(pixels(6, 5, 3)), Image.fromarray(pixels(6, 5, 1)[..., 0])
    four, two = np.asarray(decode_bands(saved(color, 'PPM'), 4)), np.asarray(decode_bands(saved(gray), 2))
    np.testing.assert_array_equal(four[..., :3], np.asarray(color))
    np.testing.assert_array_equal(two[..., 0], np.asarray(gray))
    assert (four[..., 3] == 255).all() and (two[..., 1] == 255).all()


def test_pages_of_tiff_files():
    array = pixels(7, 9, 5)
    pages = [Image.fromarray(channel) for channel in np.moveaxis(array, -1, 0)]
    data = saved(pages[0], 'TIFF', save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(np.asarray(decode_bands(data, 5)), array)
    with pytest.raises(UnreadableImage, match='a TIFF file of 5 or more pages, not of 4'):
        decode_bands(data, 4)
    with pytest.raises(UnreadableImage, match='a TIFF file of 5 pages, not of 9'):
        decode_bands(data, 9)
    whole = saved(Image.fromarray(pixels(7, 9, 4)), 'TIFF')  # one page of RGB and alpha
    np.testing.assert_array_equal(np.asarray(decode_bands(whole, 4)), pixels(7, 9, 4))
    uneven = saved(pages[0], 'TIFF', save_all=True, append_images=[pages[1].resize((3, 3))])
    with pytest.raises(UnreadableImage, match='page 1 of the TIFF file has another size'):
        decode_bands(uneven, 2)


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (npy(pixels(4, 4, 3)), r'an array \[4, 4, 3\] of uint8, but DATA.IMAGE_CHANNELS needs \[height, width, 5\]'),
        (npy(pixels(4, 4, 5).astype('float32')), 'of float32'),
        (npy(pixels(4, 4, 5)[0]), r'an array \[4, 5\]'),
        (npy(pixels(4, 4, 5))[:-1], 'it is truncated'),
        (npy(np.zeros((0, 4, 5), 'uint8')), r'an array \[0, 4, 5\]'),
        (npy(np.array([None]), allow_pickle=True), 'of object'),
        (b'\x93NUMPY\x01\x00\xff\xff', 'a damaged .npy file'),
        (npy(pixels(4, 4, 5)).replace(b'(4, 4, 5)', b'(9**9,5)'), 'a damaged .npy file'),
        (npy(pixels(4, 4, 5)).replace(b'(4, 4, 5), }', b'(99999,99999,5)}'), 'too many'),
        (saved(Image.fromarray(pixels(4, 4, 3))), 'an image of mode RGB has no 5 channels'),
        (b'', 'the file is empty'),
        (b'abc', 'not an image'),
    ],
)
def test_unreadable_data(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode_bands(data, 5)


# ---------------------------------------------------------------------------------------------------- transforms
@settings(deadline=None, max_examples=20)
@given(
    stored=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.sampled_from([2, 4, 7]),
    training=st.booleans(),
    crop=st.sampled_from(['padded', 'resized']),
)
def test_every_channel_is_transformed_like_a_gray_image(stored, size, channels, training, crop):
    """The random draws are those of a gray image, whose pixels are Pillow's."""
    array, options = pixels(*stored, channels), ('DATA.IMAGE_SIZE', size, 'DATA.CROP', crop)
    found = build_transform(config_of(channels, *options), training).image(Bands.of(array), np.random.default_rng(3))
    assert found.shape == (*size, channels)
    gray = build_transform(get_config(None, ['DATA.IMAGE_CHANNELS', 1, *PLAIN_TRAINING, *options]), training)
    for channel in range(channels):
        expected = gray.image(Image.fromarray(array[..., channel]), np.random.default_rng(3))
        np.testing.assert_array_equal(found[..., channel], expected[..., 0])


def test_resizing_does_not_weight_colors_by_alpha():
    array = pixels(8, 8, 4)
    array[..., 3] = 0
    found = np.asarray(Bands.of(array).resize((4, 4), BICUBIC))
    assert found[..., :3].std() > 10, 'Pillow gives black'


def test_segmentation_of_many_channels():
    """Multispectral images with label maps: OpenCV resizes all channels."""
    keys = (
        'TRAIN.TASK',
        'segmentation',
        'MODEL.TYPE',
        'upernet',
        'DATA.CROP_SIZE',
        (16, 24),
        'DATA.IMAGE_SCALE',
        (48, 24),
    )
    sample = Sample(Bands.of(pixels(30, 40, 6)), {'labels': LabelMap(pixels(30, 40, 1)[..., 0])})
    with pytest.raises(UserError, match='set it to False for DATA.IMAGE_CHANNELS 6'):
        dense_transform(config_of(6, *keys), True)
    config = config_of(6, *keys, 'TRAIN.PHOTOMETRIC', False)
    for training in (True, False):
        image, targets = dense_transform(config, training)(sample, np.random.default_rng(0))
        assert image.shape[2] == 6 and (not training or image.shape == (16, 24, 6))


# ---------------------------------------------------------------------------------------------------- refused
def test_color_operations_are_refused_at_the_start():
    for options, named in (
        ([], 'TRAIN.RAND_AUGMENT False and TRAIN.COLOR_JITTER 0'),
        (['TRAIN.RAND_AUGMENT', False], 'TRAIN.COLOR_JITTER 0'),
        (
            ['TRAIN.RAND_AUGMENT', False, 'TRAIN.COLOR_JITTER', 0, 'TRAIN.AUTO_AUGMENT', True],
            'TRAIN.AUTO_AUGMENT False',
        ),
    ):
        statistics = ['DATA.IMAGENET_MEAN', [0.5] * 4, 'DATA.IMAGENET_STD', [0.5] * 4]
        config = get_config(None, ['DATA.IMAGE_CHANNELS', 4, *statistics, *options])
        with pytest.raises(UserError, match=f'not for 4 channels .*: set {named}'):
            build_transform(config, training=True)
        build_transform(config, training=False)
    with pytest.raises(UserError, match='DATA.VIEWS 2 changes the colors of RGB and gray images, not of 4 channels'):
        two_view_transform(config_of(4))


def test_detection_is_refused():
    with pytest.raises(UserError, match='TRAIN.TASK detection reads RGB and gray images'):
        build_task(config_of(4, 'TRAIN.TASK', 'detection', 'TRAIN.RANDOM_ERASE_PROB', 0))


@pytest.mark.parametrize(('channels', 'numbers'), [(4, 3), (2, 3), (3, 4), (3, 1), (1, 2), (5, 1)])
def test_mean_and_deviation_must_have_a_number_per_channel(channels, numbers):
    for key, other in (('MEAN', 'STD'), ('STD', 'MEAN')):
        options = ['DATA.IMAGE_CHANNELS', channels, f'DATA.IMAGENET_{other}', [0.5] * channels]
        with pytest.raises(UserError, match=rf'DATA.IMAGENET_{key} is .* must have {channels} numbers'):
            get_config(None, [*options, f'DATA.IMAGENET_{key}', [0.5] * numbers])


# ---------------------------------------------------------------------------------------------------- data sets
@pytest.mark.parametrize('channels', [2, 4, 5])
def test_a_folder_to_the_model(tmp_path, channels):
    """Files of class folders, and of a list, to normalized batches; random erasing covers all channels."""
    arrays = {}
    for number in range(4):
        file = tmp_path / 'train' / f'class{number % 2}' / f'{number}.npy'
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays[number] = pixels(20, 24, channels, number)
        np.save(file, arrays[number])
    (tmp_path / 'train_list.txt').write_text('train/class0/0.npy 0\ntrain/class1/1.npy 1\n')
    options = (
        'DATA.DATA_PATH',
        str(tmp_path),
        'DATA.IMAGE_SIZE',
        (12, 16),
        'DATA.BATCH_SIZE',
        4,
        'DATA.NUM_WORKERS',
        0,
    )
    for name, count in (('folder', 4), ('list', 2)):
        config = config_of(channels, *options, 'DATA.DATASET', name, 'TRAIN.RANDOM_ERASE_PROB', 1.0)
        data = build_dataset(config, 'train')
        assert len(data) == count
        np.testing.assert_array_equal(np.asarray(first_images(data, 1).picture(0)), arrays[0])
        assert data.load(0).mode == 'RGB'
        with build_dataloader(config, data, training=True) as loader:
            batch = next(loader.epoch(0))
        assert batch.images.shape == (count, 12, 16, channels)
        images = to_device(batch, config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD).images
        assert images.shape == [count, channels, 12, 16]
        erased = images.numpy() != (batch.images.transpose(0, 3, 1, 2) / 255 - 0.4) / 0.2
        assert erased.any((2, 3)).all()


@pytest.mark.parametrize('kind', ['lmdb', 'zip'])
def test_packed_arrays(tmp_path, kind, capsys):
    """Arrays of a list, packed by the tools, are read like files."""
    for number in range(2):
        np.save(tmp_path / f'{number}.npy', pixels(9, 8, 5, number))
    (tmp_path / 'train_list.txt').write_text('0.npy 0\n1.npy 1\n')
    tool = {'lmdb': make_lmdb, 'zip': make_zip}[kind]
    tool.main(['-data_path', str(tmp_path), '-dataset', 'list', '-split', 'train'])
    data = build_dataset(config_of(5, 'DATA.DATASET', kind, 'DATA.DATA_PATH', str(tmp_path)), 'train')
    for number in range(2):
        np.testing.assert_array_equal(np.asarray(data.picture(number)), pixels(9, 8, 5, number))


def test_arrays_are_no_images_of_one_or_three_channels(tmp_path):
    """They stay files of another kind there."""
    folder = tmp_path / 'train' / 'a'
    folder.mkdir(parents=True)
    np.save(folder / 'features.npy', pixels(4, 4, 3))
    Image.fromarray(pixels(4, 4, 3)).save(folder / 'image.png')
    data = build_dataset(get_config(None, ['DATA.DATASET', 'folder', 'DATA.DATA_PATH', str(tmp_path)]), 'train')
    assert len(data) == 1 and any('1 .npy' in note for note in data.notes)


def test_data_without_files():
    """CIFAR and the like: opaque RGB for four channels, refused for others."""
    data = build_dataset(config_of(4, 'DATA.DATASET', 'digits'), 'val')
    assert (np.asarray(data.picture(0))[..., 3] == 255).all()


# ---------------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize('channels', [1, 2, 3, 4, 6])
def test_pictures_show_the_first_channels(channels):
    array = pixels(5, 6, channels)
    shown = np.asarray(as_image(array))
    np.testing.assert_array_equal(shown, array[..., 0] if channels < 3 else array[..., :3])
    assert image_grid([(array, array)]).mode == 'RGB'
    np.testing.assert_array_equal(Bands.of(array).convert('RGB'), as_image(array).convert('RGB'))
