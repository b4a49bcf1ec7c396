# SPDX-License-Identifier: Apache-2.0
"""Batches do not depend on workers, processes or resuming; workers that die, hang or outlive their parent."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from datasets import build_dataloader, build_dataset
from datasets.images import UnreadableImage
from datasets.loader import Loader
from datasets.samplers import EvalSampler, RepeatedSampler, TrainSampler
from datasets.subset import first_images
from datasets.transforms import build_transform, two_view_transform
from datasets.workers import WorkerError
from tests.conftest import ROOT
from tools import make_lmdb, make_zip
from utils.errors import UserError


def make_loader(config, training=True, rank=0, world_size=1) -> Loader:
    dataset = build_dataset(config, 'train' if training else 'val')
    return build_dataloader(config, dataset, training, rank, world_size)


def arrays(batch) -> list:
    erase = batch.erase or (np.zeros(0, 'int64'), np.zeros(0, 'float32'))
    return [batch.images, batch.targets['label'], batch.indices, *erase, batch.skipped]


def assert_same_batches(first, second) -> None:
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(other)))


# ---------------------------------------------------------------------------------------------------- sameness
def test_worker_count_changes_nothing(list_data, make_config):
    """Bit by bit, over two epochs, with erasing, every augmentation and an incomplete last batch."""
    path = list_data(30)
    keys = {'DATA__INTERPOLATION': 'random', 'TRAIN__RANDOM_ERASE_PROB': 0.5, 'TRAIN__RANDOM_ERASE_COUNT': 2}
    reference = make_loader(make_config(path, **keys))
    epochs = [list(reference.epoch(epoch)) for epoch in (0, 1)]
    assert [len(batch) for batch in epochs[0]] == [4] * 7 + [2]
    assert any(batch.erase is not None for batch in epochs[0])
    assert not np.array_equal(epochs[0][0].indices, epochs[1][0].indices)
    for workers in (1, 3):
        with make_loader(make_config(path, DATA__NUM_WORKERS=workers, **keys)) as loader:
            for epoch, batches in enumerate(epochs):
                assert_same_batches(loader.epoch(epoch), batches)


def test_seed_changes_everything(list_data, make_config):
    path = list_data(8)
    batches = [next(make_loader(make_config(path, SEED=seed)).epoch(0)) for seed in (0, 1)]
    assert not np.array_equal(batches[0].images, batches[1].images)


def test_resume_inside_an_epoch(list_data, make_config):
    config = make_config(list_data(30), DATA__NUM_WORKERS=2)
    with make_loader(config) as loader:
        whole = list(loader.epoch(5))
    with make_loader(config) as loader:
        assert_same_batches(loader.epoch(5, start_batch=3), whole[3:])
        assert list(loader.epoch(5, start_batch=loader.num_batches)) == []


def test_process_count_changes_nothing(list_data, make_config):
    """Two processes with half the batch see, together, the same augmented images in the same batches."""
    path = list_data(24)
    (one,) = [list(make_loader(make_config(path, DATA__BATCH_SIZE=8)).epoch(2))]
    two = [list(make_loader(make_config(path), rank=rank, world_size=2).epoch(2)) for rank in (0, 1)]
    assert len(one) == len(two[0]) == len(two[1]) == 3
    for whole, left, right in zip(one, *two):
        merged = np.stack([left.images, right.images], 1).reshape(whole.images.shape)
        assert np.array_equal(merged, whole.images)
        assert np.array_equal(np.stack([left.indices, right.indices], 1).reshape(-1), whole.indices)


def test_evaluation_counts_each_image_once(list_data, make_config):
    """Seven images on three ranks, in batches of two: unequal shares, no padding, order of the list."""
    config = make_config(list_data(7), DATA__BATCH_SIZE_EVAL=2)
    loaders = [make_loader(config, training=False, rank=rank, world_size=3) for rank in range(3)]
    indices = [[batch.indices.tolist() for batch in loader.epoch(0)] for loader in loaders]
    assert indices == [[[0, 3], [6]], [[1, 4]], [[2, 5]]]
    assert [loader.num_batches for loader in loaders] == [2, 1, 1]
    assert {loader.num_samples for loader in loaders} == {7}
    assert [loaders[1].batch_size_at(i) for i in range(3)] == [6, 1, 0]
    dataset = loaders[0].dataset
    for batch in loaders[0].epoch(0):
        assert np.array_equal(batch.targets['label'], dataset.labels[batch.indices])


def test_repeated_augmentation(list_data, make_config, monkeypatch):
    """Copies of an image are augmented differently."""
    monkeypatch.setattr(RepeatedSampler, 'MULTIPLE', 8)
    config = make_config(list_data(12), TRAIN__REPEATED_AUG=3, TRAIN__RAND_AUGMENT=False)
    batch = next(make_loader(config).epoch(0))
    assert len(set(batch.indices[:3])) == 1
    assert not np.array_equal(batch.images[0], batch.images[1])
    assert not np.array_equal(batch.images[1], batch.images[2])
    with pytest.raises(UserError, match='REPEATED_AUG needs at least 8'):
        make_loader(make_config(list_data(7), TRAIN__REPEATED_AUG=3))


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 50), st.integers(1, 5), st.integers(1, 9), st.booleans(), st.booleans())
def test_global_batch_sizes(size, world, batch_size, training, drop_last):
    """batch_size_at counts what the ranks really get, and adds up to num_samples."""

    class Maker:
        dataset = None

    sampler = TrainSampler(size, world, 0) if training else EvalSampler(size, world)
    loaders = [Loader(Maker, sampler, batch_size, rank=rank, drop_last=drop_last) for rank in range(world)]
    most = max(loader.num_batches for loader in loaders)
    counts = [
        [
            max(0, min(batch_size, loader._length(loader._rank) - i * batch_size)) if i < loader.num_batches else 0
            for i in range(most)
        ]
        for loader in loaders
    ]
    assert [loaders[0].batch_size_at(i) for i in range(most)] == [sum(column) for column in zip(*counts)]
    assert sum(map(loaders[0].batch_size_at, range(most))) == loaders[0].num_samples
    if training:
        assert len({loader.num_batches for loader in loaders}) == 1


def test_drop_last(list_data, make_config):
    path = list_data(7)
    loader = make_loader(make_config(path, TRAIN__DROP_LAST=True))
    assert (loader.num_batches, loader.num_samples) == (1, 4)
    assert [len(batch) for batch in loader.epoch(0)] == [4]
    assert make_loader(make_config(path, TRAIN__DROP_LAST=True), training=False).num_samples == 7
    with pytest.raises(UserError, match='7 images, fewer than one batch of 8'):
        make_loader(make_config(path, TRAIN__DROP_LAST=True, DATA__BATCH_SIZE=8))


def test_erasing_of_the_second_half(list_data, make_config):
    path = list_data(8)
    keys = {'TRAIN__RANDOM_ERASE_PROB': 1.0, 'TRAIN__RANDOM_ERASE_MODE': 'const'}
    for split, expected in ((False, {0, 1, 2, 3}), (True, {2, 3})):
        batch = next(make_loader(make_config(path, TRAIN__RANDOM_ERASE_SPLIT=split, **keys)).epoch(0))
        positions, values = batch.erase
        assert set(positions // (3 * 16 * 16)) == expected
        assert len(np.unique(positions)) == len(positions)
        assert (values == 0).all()


# ---------------------------------------------------------------------------------------------------- iteration
@pytest.mark.parametrize('workers', [0, 2])
def test_leaving_an_epoch_early(list_data, make_config, workers):
    """What was under way does not turn up in the next epoch; the left iterator says that it has ended."""
    config = make_config(list_data(30), DATA__NUM_WORKERS=workers)
    expected = list(make_loader(make_config(list_data(30))).epoch(1))
    with make_loader(config) as loader:
        for count in range(4):
            left = loader.epoch(0)
            for _ in range(count):
                next(left)
            assert_same_batches(loader.epoch(1), expected)
            with pytest.raises(RuntimeError, match='newer epoch'):
                next(left)


def test_workers_stay_and_close(list_data, make_config, children):
    """The same processes serve all epochs, and are gone after close(); a closed loader can start again."""
    config = make_config(list_data(8), DATA__NUM_WORKERS=2)
    with make_loader(config) as loader:
        list(loader.epoch(0))
        first = children()
        list(loader.epoch(1))
        assert children() == first
        assert len(first) == 2
    assert not children() & first
    expected = list(make_loader(make_config(list_data(8))).epoch(0))
    assert_same_batches(loader.epoch(0), expected)
    again = children()
    assert len(again) == 2
    del loader
    assert not children() & again


def test_batches_are_copies(list_data, make_config):
    """A batch that is kept is not overwritten by later ones."""
    config = make_config(list_data(20), DATA__NUM_WORKERS=1, DATA__PREFETCH=1)
    with make_loader(config) as loader:
        kept = list(loader.epoch(0))
        for batch, fresh in zip(kept, loader.epoch(0)):
            assert np.array_equal(batch.images, fresh.images)
            fresh.images[:] = 0
        assert_same_batches(loader.epoch(0), kept)


def test_no_fork(list_data, make_config, monkeypatch, caplog, children):
    monkeypatch.setattr('multiprocessing.get_all_start_methods', lambda: ['spawn'])
    loader = make_loader(make_config(list_data(4), DATA__NUM_WORKERS=2))
    assert 'cannot fork' in caplog.text
    assert len(list(loader.epoch(0))) == 1
    assert not children()


# ---------------------------------------------------------------------------------------------------- bad images
@pytest.mark.parametrize('workers', [0, 2])
def test_bad_image_ends_the_run(list_data, make_config, workers):
    with make_loader(make_config(list_data(9, broken=(5,)), DATA__NUM_WORKERS=workers)) as loader:
        with pytest.raises(UserError, match=r"picture 5\.png' \(number 5 of .*train_list\.txt.*BAD_IMAGE"):
            list(loader.epoch(0))
        with pytest.raises(UserError, match='picture 5'):
            list(loader.epoch(1))


@pytest.mark.parametrize('workers', [0, 2])
def test_bad_image_is_replaced_in_training(list_data, make_config, caplog, workers):
    """By the next readable one, always the same; batch sizes stay; each replacement is counted and logged."""
    path = list_data(9, broken=(5, 6, 8))
    with make_loader(make_config(path, DATA__NUM_WORKERS=workers, DATA__BAD_IMAGE='skip')) as loader:
        with caplog.at_level(logging.WARNING):
            batches = list(loader.epoch(0))
        assert_same_batches(loader.epoch(0), batches)
    assert [len(batch) for batch in batches] == [4, 4, 1]
    indices = np.concatenate([batch.indices for batch in batches])
    assert sorted(indices) == [0, 0, 1, 2, 3, 4, 7, 7, 7]
    assert np.array_equal(np.concatenate([batch.targets['label'] for batch in batches]), indices % 3)
    assert sum(batch.skipped for batch in batches) == 4
    assert caplog.text.count('picture 5.png') == 1


def test_bad_image_is_left_out_of_evaluation(list_data, make_config):
    path = list_data(9, broken=(0, 4, 5, 6, 7))
    loader = make_loader(make_config(path, DATA__BAD_IMAGE='skip'), training=False)
    batches = list(loader.epoch(0))
    assert [batch.indices.tolist() for batch in batches] == [[1, 2, 3], [], [8]]
    assert [batch.skipped for batch in batches] == [1, 4, 0]
    assert batches[1].images.shape == (0, 16, 16, 3)


def test_nothing_but_bad_images(list_data, make_config):
    path = list_data(40, broken=tuple(range(40)))
    with pytest.raises(UserError, match=r'16 images in a row.*picture \d+\.png'):
        next(make_loader(make_config(path, DATA__BAD_IMAGE='skip')).epoch(0))


@pytest.mark.parametrize('workers', [0, 1])
def test_other_errors_name_the_image(list_data, make_config, workers):
    loader = make_loader(make_config(list_data(4), DATA__NUM_WORKERS=workers))

    def fail(image, rng):
        raise ZeroDivisionError('by design')

    loader._maker.transform.steps = [fail]
    with loader, pytest.raises(RuntimeError, match=r'ZeroDivisionError .*picture \d\.png.*by design'):
        next(loader.epoch(0))


@pytest.mark.parametrize('bad', [MemoryError(), UnreadableImage('the step found damage')])
def test_what_a_step_cannot_do_is_skipped(list_data, make_config, bad):
    """Too little memory for one image is a fault of that image."""

    def step(image, rng):
        if np.asarray(image)[0, 0, 0] == np.random.default_rng(2).integers(0, 256, (20, 24, 3), np.uint8)[0, 0, 0]:
            raise bad
        return np.zeros((16, 16, 3), np.uint8)

    for keys in ({}, {'DATA__BAD_IMAGE': 'skip'}):
        loader = make_loader(make_config(list_data(4), **keys), training=False)
        loader._maker.transform.steps = [step]
        if keys:
            (batch,) = loader.epoch(0)
            assert (batch.indices.tolist(), batch.skipped) == ([0, 1, 3], 1)
        else:
            with pytest.raises(UserError, match=r'picture 2\.png.*(more memory|damage)'):
                next(loader.epoch(0))


# ---------------------------------------------------------------------------------------------------- orientation
@pytest.fixture(scope='module')
def turned(tmp_path_factory):
    """A phone's picture in train/a and val/a, as it is stored and turned, as lists, LMDB and zip files too."""
    root = tmp_path_factory.mktemp('turned')
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((360, 240), Image.Resampling.BICUBIC)
    for split in ('train', 'val'):
        (root / split / 'a').mkdir(parents=True)
        image.save(root / split / 'a' / 'x.jpg', quality=95, exif=exif)
        image.save(root / split / 'a' / 'y.png', exif=exif)
        (root / f'{split}_list.txt').write_text(f'{split}/a/x.jpg 0\n{split}/a/y.png 0\n')
    for tool in (make_lmdb, make_zip):
        tool.main(['-data_path', str(root), '-dataset', 'folder'])
    return root, image


PLAIN = {
    'TRAIN__RAND_AUGMENT': False,
    'TRAIN__COLOR_JITTER': 0.0,
    'TRAIN__HFLIP': 0.0,
    'TRAIN__RANDOM_ERASE_PROB': 0.0,
}


@pytest.mark.parametrize('rotate', [False, True])
@pytest.mark.parametrize('storage', ['folder', 'list', 'zip', 'lmdb', 'cache', 'subset'])
@pytest.mark.parametrize(
    ('training', 'keys'), [(False, {}), (True, {}), (True, {'DATA__FAST_RESIZE': False}), ('views', {})]
)
def test_exif_rotate(turned, make_config, training, keys, storage, rotate):
    """The same batches as from turned files, wherever they lie; without the key as from files that are not turned."""
    root, image = turned
    keys = {**PLAIN, **keys, 'DATA__EXIF_ROTATE': rotate, 'DATA__CACHE': 'full' if storage == 'cache' else 'no'}
    kind = storage if storage in ('list', 'zip', 'lmdb') else 'folder'
    config = make_config(root, DATA__DATASET=kind, **keys)
    dataset = build_dataset(config, 'train' if training else 'val')
    if storage == 'subset':
        dataset = first_images(dataset, 1)
    transform = two_view_transform(config) if training == 'views' else build_transform(config, training)
    (batch,) = build_dataloader(config, dataset, bool(training), transform=transform).epoch(0)
    upright = image.transpose(Image.Transpose.ROTATE_270) if rotate else image
    for pixels, index in zip(batch.images, batch.indices):
        rng = np.random.default_rng([config.SEED, 0, int(index), 0])
        difference = np.abs(pixels.astype(int) - transform.image(upright, rng))
        assert difference.mean() < (6 if index == 0 else 1e-9)  # the first one is a JPEG file


# ---------------------------------------------------------------------------------------------------- dying, hanging
def all_children() -> set[int]:
    with open(f'/proc/self/task/{os.getpid()}/children') as file:
        return {int(number) for number in file.read().split()}


@pytest.fixture
def children():
    """Returns the process ids of the children that this process has since the test began."""
    before = all_children()
    return lambda: all_children() - before


class Trouble:
    """A storage that behaves until it comes to image `index`."""

    def __init__(self, storage, index, happen):
        self.storage, self.index, self.happen = storage, index, happen

    def __len__(self):
        return len(self.storage)

    def open(self, index):
        if index == self.index:
            self.happen()
        return self.storage.open(index)

    def describe(self, index):
        return self.storage.describe(index)


def test_killed_worker(list_data, make_config, children):
    """As by the kernel when memory is short: a sentence that names the image, at once."""
    loader = make_loader(make_config(list_data(20), DATA__NUM_WORKERS=2), training=False)
    loader.dataset.storage = Trouble(loader.dataset.storage, 13, lambda: os.kill(os.getpid(), signal.SIGKILL))
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r'worker died .*picture 13\.png.*memory') as caught:
        list(loader.epoch(0))
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, RuntimeError)
    assert time.monotonic() - started < 5
    assert not children()


def test_worker_killed_between_epochs(list_data, make_config, children):
    with make_loader(make_config(list_data(8), DATA__NUM_WORKERS=2)) as loader:
        list(loader.epoch(0))
        os.kill(min(children()), signal.SIGKILL)
        with pytest.raises(WorkerError, match='worker died'):
            for epoch in range(1000):  # until the parent has noticed
                list(loader.epoch(epoch))
        assert len(list(loader.epoch(0))) == 2  # new workers


def test_hung_worker(list_data, make_config, children):
    """A sentence with the time-out key and the image; the hung process is ended."""
    loader = make_loader(make_config(list_data(20), DATA__NUM_WORKERS=2, DATA__TIMEOUT=0.7), training=False)
    loader.dataset.storage = Trouble(loader.dataset.storage, 6, lambda: time.sleep(60))
    batches = loader.epoch(0)
    assert next(batches).indices.tolist() == [0, 1, 2, 3]
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r'DATA\.TIMEOUT = 0\.7.*picture 6\.png'):
        next(batches)
    assert time.monotonic() - started < 3
    assert not children()


SCRIPT = """
    import json, os, sys, time
    from config import get_config
    from datasets import build_dataloader, build_dataset
    config = get_config(None, json.loads(sys.argv[1]))
    loader = build_dataloader(config, build_dataset(config, 'train'), True)
    batches = loader.epoch(0)
    next(batches)
    print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True)
    %s
"""


def run_script(config_path, ending: str) -> subprocess.Popen:
    opts = ['DATA.DATASET', 'list', 'DATA.DATA_PATH', str(config_path), 'DATA.IMAGE_SIZE', 16]
    opts += ['DATA.BATCH_SIZE', 4, 'DATA.NUM_WORKERS', 2]
    command = [sys.executable, '-c', textwrap.dedent(SCRIPT % ending), json.dumps(opts)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_gone(processes: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(process) for process in processes):
            return True
        time.sleep(0.02)
    return False


def alive(process: int) -> bool:
    try:
        with open(f'/proc/{process}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_workers_die_with_their_parent(list_data):
    """A training process that is killed leaves nothing behind."""
    parent = run_script(list_data(12), 'time.sleep(60)')
    workers = [int(number) for number in parent.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(alive, workers))
    parent.kill()
    parent.communicate()
    assert wait_until_gone(workers)


def test_workers_ignore_signals_to_the_group(list_data):
    """Ctrl-C and a scheduler's SIGTERM reach every process; workers go on until the training process is done."""
    parent = run_script(list_data(12), 'time.sleep(0.5); print(len(list(batches)), flush=True)')
    workers = [int(number) for number in parent.stdout.readline().split()]
    for worker in workers:
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
    output, errors = parent.communicate(timeout=20)
    assert (output.strip(), parent.returncode) == ('2', 0), errors
    assert wait_until_gone(workers)


def test_leaving_without_close(list_data):
    """A program that ends or fails in the middle of an epoch does not hang."""
    for ending, code in (('', 0), ('raise SystemExit(3)', 3), ('1 / 0', 1)):
        parent = run_script(list_data(12), ending)
        output, errors = parent.communicate(timeout=20)
        assert parent.returncode == code, errors
        assert wait_until_gone([int(number) for number in output.split()])


def test_hung_read_without_workers(list_data, make_config):
    """The training process itself does not hang; the next epoch reads again."""
    loader = make_loader(make_config(list_data(8), DATA__TIMEOUT=0.5), training=False)
    storage = loader.dataset.storage
    loader.dataset.storage = Trouble(storage, 6, lambda: time.sleep(30))
    with pytest.raises(
        WorkerError, match=r"no batch came from the storage within DATA\.TIMEOUT = 0\.5.*picture 6\.png'"
    ):
        list(loader.epoch(0))
    loader.dataset.storage = storage
    assert len(list(loader.epoch(1))) == 2
