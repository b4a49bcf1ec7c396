# SPDX-License-Identifier: Apache-2.0
"""DATA.CACHE: what is held in memory by whom, and that it is what lies on the disk."""

import multiprocessing
import shutil
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config import get_config
from datasets import Dataset, build_dataloader, build_dataset, cache
from datasets.cache import CachedStorage, PackedBytes
from datasets.dataset import FileStorage
from datasets.images import Jpeg, open_image
from datasets.samplers import EvalSampler, PartSampler, TrainSampler
from tests.conftest import golden
from utils.errors import UserError

COMBINATIONS = golden('ms_mlp-cachepart').meta['combos']


# ---------------------------------------------------------------------------------------------------- who sees what
@pytest.mark.parametrize(('size', 'world', 'batch'), COMBINATIONS)
def test_parts_like_ms_mlp(size, world, batch):
    """Shares of training and validation, batches of validation; training gives each rank as many batches as the smallest."""
    reference = golden('ms_mlp-cachepart')
    name = f'out/n{size}_w{world}'
    exact, padded = PartSampler(size, world, 0, drop_last=True), PartSampler(size, world, 0, drop_last=False)
    for rank in range(world):
        share = [index for index in reference[f'{name}_sampler'][rank] if index >= 0]
        assert np.flatnonzero(reference[f'{name}_cached'][rank]).tolist() == share
        assert EvalSampler(size, world).epoch(0, rank)[0].tolist() == share
        assert -(-len(share) // batch) == reference[f'{name}_val_steps_b{batch}'][rank]
        for epoch in range(3):
            assert sorted(set(padded.epoch(epoch, rank)[0])) == share
            assert set(exact.epoch(epoch, rank)[0]) <= set(share)
    steps = {exact.length(rank) // batch for rank in range(world)}
    assert steps == {min(reference[f'{name}_train_steps_b{batch}'])}
    order = TrainSampler(size, 1, 0).epoch(0, 0)[0]
    for rank in range(world):  # without parts: one order for all ranks, padded from its start
        places = reference[f'{name}_distributed_noshuffle'][rank]
        assert TrainSampler(size, world, 0).epoch(0, rank)[0].tolist() == order[places].tolist()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 5), st.booleans())
def test_part_sampler(size, world, epoch, drop_last):
    """Equal lengths; a rank's own images, each before any is repeated; with one process what TrainSampler deals."""
    if size < world:
        with pytest.raises(UserError, match=f'{size} images for {world} processes'):
            PartSampler(size, world, 3, drop_last)
        return
    sampler = PartSampler(size, world, 3, drop_last)
    for rank in range(world):
        indices, repeats = sampler.epoch(epoch, rank)
        own = np.arange(rank, size, world)
        assert len(indices) == len(repeats) == sampler.length(rank) == sampler.length(0)
        assert set(indices) <= set(own)
        assert len(set(zip(indices, repeats))) == len(indices)
        assert sorted(indices[: len(own)]) == own.tolist() or drop_last
    if world == 1:
        assert [a.tolist() for a in sampler.epoch(epoch, 0)] == [
            a.tolist() for a in TrainSampler(size, 1, 3).epoch(epoch, 0)
        ]


def test_parts_are_shuffled_anew():
    sampler = PartSampler(40, 2, 0, False)
    first, second = (sampler.epoch(epoch, 1)[0].tolist() for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_part_and_repeated_augmentation(list_data, make_config):
    config = make_config(list_data(12), TRAIN__REPEATED_AUG=3, DATA__CACHE='part')
    with pytest.raises(UserError, match=r'REPEATED_AUG distributes .* DATA\.CACHE to full or no'):
        build_dataloader(config, build_dataset(config, 'train'), True, 0, 2)


# ---------------------------------------------------------------------------------------------------- what is held
@pytest.mark.parametrize(
    ('mode', 'split', 'held'),
    [
        ('no', 'train', None),
        ('full', 'train', [0, 1, 2, 3, 4, 5, 6]),
        ('part', 'train', [1, 4]),
        ('no', 'val', None),
        ('full', 'val', [1, 4]),
        ('part', 'val', [1, 4]),
    ],
)
def test_held_images(list_data, make_config, mode, split, held):
    """By rank 1 of 3, of seven images."""
    config = make_config(list_data(7), DATA__CACHE=mode)
    dataset = build_dataset(config, split)
    storage = build_dataloader(config, dataset, split == 'train', 1, 3).dataset.storage
    if held is None:
        assert storage is dataset.storage
    else:
        assert [index for index in range(7) if index in storage.files] == held
        assert all(storage.files[index] == dataset.storage.read(index) for index in held)


def test_training_and_validation_are_kept_apart(tmp_path, write_image, make_config):
    """The same names with other pictures in both parts, held at the same time; the files go once they are held."""
    for split, first in (('train', 0), ('val', 100)):
        for number in range(6):
            write_image(tmp_path / split / 'a' / f'{number}.png', first + number)
    config = make_config(tmp_path, DATA__DATASET='folder', DATA__CACHE='full')
    datasets = {split: build_dataset(config, split) for split in ('train', 'val')}
    files = {split: [dataset.storage.read(i) for i in range(6)] for split, dataset in datasets.items()}
    assert files['train'] != files['val']
    loaders = {split: build_dataloader(config, dataset, split == 'train') for split, dataset in datasets.items()}
    shutil.rmtree(tmp_path / 'train')
    shutil.rmtree(tmp_path / 'val')
    for split, loader in loaders.items():
        assert [loader.dataset.storage.read(i) for i in range(6)] == files[split]
        assert sum(len(batch) for batch in loader.epoch(0)) == 6


def test_unreadable_images_stay_so(list_data, make_config):
    """Missing and damaged images are met when they are wanted, as without a cache."""
    path = list_data(9, broken=(4,))
    (path / 'images' / 'picture 2.png').unlink()
    config = make_config(path, DATA__CACHE='full', DATA__BAD_IMAGE='skip')
    loader = build_dataloader(config, build_dataset(config, 'val'), training=False)
    assert [batch.indices.tolist() for batch in loader.epoch(0)] == [[0, 1, 3], [5, 6, 7], [8]]
    with pytest.raises(UserError, match=r'picture 2\.png.*No such file'):
        loader.dataset.load(2)


SMALL_MODES = ('L', 'RGB', 'RGBA', 'P', 'I;16')


@pytest.fixture
def pictures(tmp_path):
    """Files of a few modes, sizes and formats: a storage, and the files of small images that are no JPEG."""
    rng = np.random.default_rng(0)
    small = []
    for mode in SMALL_MODES:
        pixels = rng.integers(0, 256, (32, 7), 'uint8')
        image = (
            Image.fromarray(pixels.astype('uint16') * 250) if mode == 'I;16' else Image.fromarray(pixels).convert(mode)
        )
        small.append(f'{mode[0]}{len(small)}.png')
        image.save(tmp_path / small[-1])
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (8, 5, 3), 'uint8')).save(tmp_path / 'turned.png', exif=turned)
    Image.fromarray(rng.integers(0, 256, (33, 8, 3), 'uint8')).save(tmp_path / 'large.png')
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), 'uint8')).save(tmp_path / 'small.jpg')
    return FileStorage(str(tmp_path), [*small, 'turned.png', 'large.png', 'small.jpg']), len(small)


def test_small_images_are_decoded_once(pictures, monkeypatch):
    """Their pixels are those of the file, and no later picture decodes it."""
    storage, small = pictures
    expected = [np.asarray(storage.open(index)) for index in range(small + 1)]
    cached = CachedStorage(storage, range(len(storage)))
    monkeypatch.setattr('datasets.dataset.open_image', lambda *_: pytest.fail('decoded again'))
    for index, pixels in enumerate(expected):
        picture = cached.picture(index)
        assert picture.mode == 'RGB'
        assert np.array_equal(picture, pixels)


def test_other_images_are_decoded_when_needed(pictures):
    """JPEG files, of which a transform may decode a part; larger images; images that are rotated by their EXIF data."""
    storage, small = pictures
    with mock.patch('datasets.cache.open_image', wraps=open_image) as opened:
        cached = CachedStorage(storage, range(len(storage)))
    assert opened.call_count == small + 2  # not the large one: the start would take as long as an epoch
    turned, large, jpeg = range(small, small + 3)
    assert (cached.picture(turned).size, cached.picture(turned, True).size) == ((5, 8), (8, 5))
    assert isinstance(cached.picture(jpeg), Jpeg)
    with mock.patch('datasets.dataset.open_image', wraps=open_image) as opened:
        for index in (turned, large, jpeg):
            assert np.array_equal(
                cached.picture(index, True).convert('RGB'), storage.picture(index, True).convert('RGB')
            )
    assert opened.call_count == 6


def test_arrays_are_not_cached():
    """Data that are in memory anyway."""

    class Squares:
        def __len__(self):
            return 3

    dataset = Dataset(Squares(), [0, 1, 1], source='squares')
    assert cache.cache_images(dataset, np.arange(3), False) is dataset


# ---------------------------------------------------------------------------------------------------- memory
@settings(deadline=None, derandomize=True)
@given(st.dictionaries(st.integers(0, 30), st.binary(max_size=40)))
def test_packed_bytes(items):
    """What was put in, over map after map of 32 bytes."""
    packed = PackedBytes(31)
    packed.MAP_SIZE = 32
    for index, data in items.items():
        packed[index] = data
    assert {index: packed[index] for index in range(31) if index in packed} == items


def test_workers_share_the_cache(list_data, make_config):
    """A forked process that reads every image twice gets hardly any memory of its own."""
    dataset = build_dataset(make_config(list_data(1)), 'train')
    size, count = 1 << 16, 512

    class Large(type(dataset.storage)):
        def __len__(self):
            return count

        def read(self, index):
            return bytes([index % 256]) * size

    storage = CachedStorage(Large('', []), range(count))
    parent, child = multiprocessing.Pipe()

    def read_all():
        before = private_bytes()
        same = all(storage.read(index) == bytes([index % 256]) * size for index in [*range(count)] * 2)
        child.send((same, private_bytes() - before))

    process = multiprocessing.get_context('fork').Process(target=read_all)
    process.start()
    same, grown = parent.recv()
    process.join()
    assert same
    assert grown < size * count / 10


def private_bytes() -> int:
    """Memory of this process that no other one has mapped."""
    with open('/proc/self/smaps_rollup') as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith('Private_'))


@pytest.mark.parametrize('mode', ['full', 'part'])
def test_too_little_memory(list_data, make_config, monkeypatch, mode):
    """Said before the kernel ends the process."""
    monkeypatch.setattr(cache, 'free_memory', lambda: 1000)
    config = make_config(list_data(5), DATA__CACHE=mode)
    with pytest.raises(UserError, match=r'images of .*train_list\.txt.* do not fit into memory .*DATA\.CACHE'):
        build_dataloader(config, build_dataset(config, 'train'), training=True)


def test_free_memory():
    assert 1 << 20 < cache.free_memory() < 1 << 50


# ---------------------------------------------------------------------------------------------------- the key
@pytest.mark.parametrize(('text', 'value'), [('no', 'no'), ("'no'", 'no'), ('part', 'part'), ('full', 'full')])
def test_yaml(tmp_path, text, value):
    """A bare `no` means False to YAML."""
    (tmp_path / 'a.yaml').write_text(f'DATA: {{CACHE: {text}}}')
    configs = get_config(str(tmp_path / 'a.yaml')), get_config(None, ['DATA.CACHE', value])
    assert [config.DATA.CACHE for config in configs] == [value, value]


def test_other_values():
    for value in ('some', 'yes', True):
        with pytest.raises(UserError, match=r'DATA\.CACHE'):
            get_config(None, ['DATA.CACHE', value])
