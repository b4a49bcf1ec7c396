# SPDX-License-Identifier: Apache-2.0
"""LMDB files: our own, those of pyarrow's serialize(), damaged ones, and the tool that writes them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import lmdb
import numpy as np
import pytest

from datasets import build_dataloader, build_dataset, resolve_num_classes
from datasets.arrow import deserialize
from datasets.lmdb import pack_record, unpack_record
from datasets.lmdb_file import LmdbFile
from tests.conftest import ROOT, golden
from tools import make_lmdb
from utils.errors import UserError


def stored(reference, key) -> bytes:
    return reference[key].astype('uint8').tobytes()


@pytest.fixture
def upstream(tmp_path):
    """EViT's val.lmdb of three images."""
    reference = golden('evit-lmdb')
    path = tmp_path / 'val.lmdb'
    with writing(path) as transaction:
        for number in range(3):
            transaction.put(str(number).encode(), stored(reference, f'in/rec{number}'))
        transaction.put(b'__keys__', stored(reference, 'in/keys'))
        transaction.put(b'__len__', stored(reference, 'in/len'))
    return path


@contextlib.contextmanager
def writing(path, size=1 << 24):
    """A transaction that changes an LMDB file."""
    environment = lmdb.open(str(path), subdir=False, map_size=size, lock=False)
    with environment, environment.begin(write=True) as transaction:
        yield transaction


def convert(path, output, *args) -> int | None:
    return make_lmdb.main(['-data_path', str(path), '-output', str(output), '-dataset', 'list', *args])


# ---------------------------------------------------------------------------------------------------- pyarrow's format
def test_arrow_values():
    reference = golden('evit-lmdb')
    for number in range(3):
        image, label = deserialize(stored(reference, f'in/rec{number}'))
        assert image == stored(reference, f'out/rec{number}/image')
        assert label == reference[f'out/rec{number}/label'][0]
    assert deserialize(stored(reference, 'in/keys')) == [b'0', b'1', b'2']
    assert deserialize(stored(reference, 'in/len')) == 3


def test_arrow_damage_is_a_value_error():
    """Cut or altered anywhere: a value or ValueError, nothing else, and no time or memory lost."""
    record = stored(golden('evit-lmdb'), 'in/rec0')
    rng = np.random.default_rng(0)
    failures = 0
    for trial in range(3000):
        damaged = bytearray(record)
        for place in rng.integers(0, 900, rng.integers(1, 6)):
            damaged[place] = rng.integers(256)
        try:
            deserialize(bytes(damaged[: rng.integers(len(damaged))] if trial % 3 == 0 else damaged))
        except ValueError:
            failures += 1
    assert failures > 1000


def test_upstream_file(upstream, make_config):
    """Labels are collected once and kept; images are those of the records."""
    config = make_config(upstream.parent, DATA__DATASET='lmdb')
    dataset = build_dataset(config, 'val')
    assert dataset.labels.tolist() == [7, 0, 999]
    assert (dataset.num_classes, dataset.class_names) == (1000, None)
    assert resolve_num_classes(config, dataset) == 1000
    assert dataset.load(1).mode == 'RGB'
    kept = upstream.parent / 'val.lmdb.labels.npy'
    assert np.load(kept).tolist() == [7, 0, 999]
    np.save(kept, np.array([1, 2, 3]))
    assert build_dataset(config, 'val').labels.tolist() == [1, 2, 3]
    os.utime(kept, (1, 1))  # older than the data: not theirs
    assert build_dataset(config, 'val').labels.tolist() == [7, 0, 999]
    kept.write_bytes(b'damaged')
    assert build_dataset(config, 'val').labels.tolist() == [7, 0, 999]


def test_upstream_file_with_workers(upstream, make_config):
    batches = {}
    for workers in (0, 2):
        config = make_config(upstream.parent, DATA__DATASET='lmdb', DATA__NUM_WORKERS=workers, DATA__BATCH_SIZE=1)
        with build_dataloader(config, build_dataset(config, 'val'), training=False) as loader:
            batches[workers] = list(loader.epoch(0))
    for inline, worker in zip(batches[0], batches[2]):
        assert np.array_equal(inline.images, worker.images)
        assert inline.targets['label'] == worker.targets['label']


# ---------------------------------------------------------------------------------------------------- our format
def test_same_images_as_the_files(list_data, make_config, tmp_path, capsys):
    """Training batches from the LMDB equal those from the files bit for bit, with and without workers."""
    path = list_data(20)
    assert convert(path, tmp_path / 'out') is None
    assert sorted(os.listdir(tmp_path / 'out')) == ['train.lmdb', 'val.lmdb']
    assert 'train.lmdb: 20 images, 3 classes' in capsys.readouterr().out
    config = make_config(path)
    with build_dataloader(config, build_dataset(config, 'train'), training=True) as loader:
        expected = list(loader.epoch(0))
    for workers in (0, 3):
        config = make_config(tmp_path / 'out', DATA__DATASET='lmdb', DATA__NUM_WORKERS=workers)
        dataset = build_dataset(config, 'train')
        assert dataset.load(3).size == (24, 20)  # read here first: workers must still open their own
        with build_dataloader(config, dataset, training=True) as loader:
            batches = list(loader.epoch(0))
            assert len(batches) == len(expected)
            for one, other in zip(expected, batches):
                assert np.array_equal(one.images, other.images)
                assert np.array_equal(one.targets['label'], other.targets['label'])


def test_class_names(tmp_path, write_image, make_config):
    for name in ('train/b/0.png', 'train/a/1.png', 'val/b/2.png'):
        write_image(tmp_path / name)
    make_lmdb.main(['-data_path', str(tmp_path), '-dataset', 'folder'])
    dataset = build_dataset(make_config(tmp_path, DATA__DATASET='lmdb'), 'val')
    assert (dataset.class_names, dataset.labels.tolist()) == (['a', 'b'], [1])


def test_any_name(tmp_path, write_image, make_config):
    """A folder and a class whose names are not UTF-8."""
    folder = tmp_path / 'dat\udce9'
    for split in ('train', 'val'):
        write_image(folder / split / 'klass\udce9' / '0.png')
    make_lmdb.main(['-data_path', str(folder), '-dataset', 'folder'])
    dataset = build_dataset(make_config(folder, DATA__DATASET='lmdb'), 'val')
    assert (len(dataset), dataset.class_names) == (1, ['klass\udce9'])
    assert dataset.storage.open(0).size == (24, 20)


def test_record():
    record = pack_record(b'image', 12)
    assert unpack_record(record) == (b'image', 12)
    assert unpack_record(pack_record(b'', 0)) == (b'', 0)
    for damaged in (record[:-1], record[:3], b'', record[:-1] + b'x'):
        with pytest.raises(ValueError, match='record'):
            unpack_record(damaged)


# ---------------------------------------------------------------------------------------------------- the tool
def test_continues_after_an_interruption(list_data, make_config, tmp_path, monkeypatch, capsys):
    """Nothing has the final name before the end; images stored before are not read again."""
    path, output = list_data(20), tmp_path / 'out'
    monkeypatch.setattr(make_lmdb, '_CHUNK', 3)
    read = []
    original = make_lmdb.records_of

    def records_of(dataset, index):
        if len(read) == 10:
            raise KeyboardInterrupt
        read.append(index)
        return original(dataset, index)

    monkeypatch.setattr(make_lmdb, 'records_of', records_of)
    assert convert(path, output, '-split', 'train') == 130
    assert os.listdir(output) == ['train.lmdb.partial']
    read.clear()
    monkeypatch.setattr(make_lmdb, 'records_of', lambda dataset, index: read.append(index) or original(dataset, index))
    assert convert(path, output, '-split', 'train') is None
    assert read == list(range(9, 20))
    assert 'continues after 9 images' in capsys.readouterr().out
    assert os.listdir(output) == ['train.lmdb']
    assert len(build_dataset(make_config(output, DATA__DATASET='lmdb'), 'train')) == 20


@pytest.mark.parametrize('change', ['list', 'cut', 'garbage'])
def test_other_partial_file_is_begun_anew(list_data, make_config, tmp_path, monkeypatch, change):
    path, output = list_data(9), tmp_path / 'out'
    with monkeypatch.context() as patch:
        patch.setattr(make_lmdb, 'verify', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert convert(path, output, '-split', 'train') == 130
    partial = output / 'train.lmdb.partial'
    if change == 'list':
        lines = (path / 'train_list.txt').read_text().splitlines()
        (path / 'train_list.txt').write_text('\n'.join(lines[::-1]))
    elif change == 'cut':
        os.truncate(partial, partial.stat().st_size // 2)
    else:
        partial.write_bytes(b'garbage' * 5000)
    assert convert(path, output, '-split', 'train') is None
    dataset = build_dataset(make_config(output, DATA__DATASET='lmdb'), 'train')
    expected = build_dataset(make_config(path), 'train')
    assert dataset.labels.tolist() == expected.labels.tolist()
    assert np.array_equal(dataset.load(0), expected.load(0))


def test_map_grows(list_data, tmp_path, monkeypatch):
    monkeypatch.setattr(make_lmdb, '_FIRST_SIZE', 1 << 15)
    assert convert(list_data(40), tmp_path / 'out', '-split', 'val') is None
    assert (tmp_path / 'out' / 'val.lmdb').stat().st_size > 1 << 16


def test_verification(list_data, tmp_path, monkeypatch):
    """What comes back differently than it was written does not get the final name."""
    original = make_lmdb.put_all

    def put_all(environment, items):
        original(environment, [(key, value[:-1] + b'?' if key == b'4' else value) for key, value in items])

    monkeypatch.setattr(make_lmdb, 'put_all', put_all)
    with pytest.raises(UserError, match='train.lmdb.partial.*record 4.*checksum'):
        convert(list_data(9), tmp_path / 'out')
    assert not (tmp_path / 'out' / 'train.lmdb').exists()


def test_a_file_that_is_cut_off_while_it_is_read(list_data, tmp_path, make_config):
    """Reading the memory map behind the end of the file would end the process with SIGBUS."""
    convert(list_data(40), tmp_path / 'out')
    dataset = build_dataset(make_config(tmp_path / 'out', DATA__DATASET='lmdb'), 'val')
    dataset.load(0)
    path = tmp_path / 'out' / 'val.lmdb'
    size = path.stat().st_size
    os.truncate(path, 8192)
    with pytest.raises(UserError, match=f'cut off: it has 8192 bytes of {size}'):
        dataset.load(39)


def test_tool_mistakes(list_data, tmp_path):
    path, output = list_data(4), tmp_path / 'out'
    (path / 'images' / 'picture 2.png').unlink()
    with pytest.raises(UserError, match=r"picture 2\.png'.*No such file"):
        convert(path, output)
    path = list_data(4)
    assert convert(path, output) is None
    with pytest.raises(UserError, match='-force overwrites'):
        convert(path, output)
    assert convert(path, output, '-force') is None
    (output / 'val.lmdb').unlink()
    busy = make_lmdb.partial_file(str(output / 'val.lmdb.partial'), b'x')
    with busy, pytest.raises(UserError, match='another process'):
        convert(path, output, '-split', 'val')


def test_killed_and_continued(tmp_path, write_image, make_config):
    """The command, killed without warning in the middle and run again."""
    for number in range(400):
        path = tmp_path / 'train' / str(number % 4) / f'{number}.png'
        write_image(path, number, size=(8, 8))
    command = [sys.executable, os.path.join(ROOT, 'tools', 'make_lmdb.py'), '-data_path', str(tmp_path)]
    command += ['-dataset', 'folder', '-split', 'train']
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / 'train.lmdb.partial'
    while first.poll() is None and not (partial.exists() and partial.stat().st_size > 20000):
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.run([*command, '-force'], capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    dataset = build_dataset(make_config(tmp_path, DATA__DATASET='lmdb'), 'train')
    expected = build_dataset(make_config(tmp_path, DATA__DATASET='folder'), 'train')
    assert dataset.labels.tolist() == expected.labels.tolist()
    assert all(np.array_equal(dataset.load(i), expected.load(i)) for i in range(0, 400, 37))


# ---------------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize('bytes_kept', [0, 10, 5000, 40960, -4096, -1])
def test_cut_off_file(list_data, make_config, tmp_path, bytes_kept):
    convert(list_data(30), tmp_path / 'out', '-split', 'val')
    path = tmp_path / 'out' / 'val.lmdb'
    os.truncate(path, bytes_kept if bytes_kept >= 0 else path.stat().st_size + bytes_kept)
    with pytest.raises(UserError, match=r"val\.lmdb' (is cut off|is not an LMDB file)"):
        build_dataset(make_config(tmp_path / 'out', DATA__DATASET='lmdb'), 'val')


def test_other_files(list_data, make_config, tmp_path):
    config = make_config(tmp_path, DATA__DATASET='lmdb')
    with pytest.raises(UserError, match=r"train\.lmdb' does not exist; .*make_lmdb"):
        build_dataset(config, 'train')
    (tmp_path / 'val.lmdb').write_bytes(os.urandom(20000))
    with pytest.raises(UserError, match='not an LMDB file'):
        build_dataset(config, 'val')
    os.remove(tmp_path / 'val.lmdb')

    def write(**items):
        with writing(tmp_path / 'val.lmdb') as transaction:
            for key, value in items.items():
                transaction.put(key.encode(), value)

    write(a=b'b')
    with pytest.raises(UserError, match='is not complete'):
        build_dataset(config, 'val')
    write(__len__=b'nonsense')
    with pytest.raises(UserError, match='is damaged: not a value serialized by pyarrow'):
        build_dataset(config, 'val')
    write(__format__=b'leanvit-lmdb-9')
    with pytest.raises(UserError, match='unknown format leanvit-lmdb-9'):
        build_dataset(config, 'val')


def test_damaged_record(list_data, make_config, tmp_path):
    """A flipped bit and a missing record are reported by key, or skipped, like any unreadable image."""
    convert(list_data(6), tmp_path / 'out')
    with writing(tmp_path / 'out' / 'val.lmdb') as transaction:
        record = bytearray(transaction.get(b'2'))
        record[100] ^= 1
        transaction.put(b'2', bytes(record))
        transaction.delete(b'4')
    config = make_config(tmp_path / 'out', DATA__DATASET='lmdb', DATA__BAD_IMAGE='skip')
    dataset = build_dataset(config, 'val')
    with pytest.raises(UserError, match=r'val\.lmdb, key 2.*checksum'):
        dataset.load(2)
    with pytest.raises(UserError, match=r'val\.lmdb, key 4.*no record 4'):
        dataset.load(4)
    indices = [batch.indices.tolist() for batch in build_dataloader(config, dataset, training=False).epoch(0)]
    assert indices == [[0, 1, 3], [5]]


# ---------------------------------------------------------------------------------------------------- the reader
def test_reader_equals_the_library(tmp_path):
    """A tree of several levels, with keys of any length and values in and beyond their pages, before and after deletions."""
    rng = np.random.default_rng(0)
    path, expected = tmp_path / 'x.lmdb', {}
    for _ in range(1500):
        key = rng.bytes(int(rng.integers(1, 200)))
        expected[key] = rng.bytes(
            int(rng.choice([0, 1, 50, 2000, 2040, 4080, 4096, 20000], p=[0.1, 0.2, 0.3, 0.2, 0.1, 0.04, 0.04, 0.02]))
        )
    with writing(path, 1 << 26) as transaction:
        for key, value in expected.items():
            transaction.put(key, value)
    for start in range(3):  # some pages become free, others are used again
        with writing(path, 1 << 26) as transaction:
            for key in list(expected)[start::7]:
                transaction.delete(key)
                del expected[key]
    file = LmdbFile(str(path))
    assert file.entries == len(expected)
    assert all(file.get(key) == value for key, value in expected.items())
    others = {b'', b'\xff' * 300, *(key[:-1] for key in expected), *(key + b'\0' for key in expected)}
    assert all(file.get(key) is None for key in others - expected.keys())


def test_damage_is_a_value_error(tmp_path):
    """The library would follow wrong offsets and end this process."""
    path, rng = tmp_path / 'x.lmdb', np.random.default_rng(0)
    with writing(path) as transaction:
        for number in range(300):
            transaction.put(str(number).encode(), rng.bytes(int(rng.choice([10, 500, 9000], p=[0.5, 0.4, 0.1]))))
    data, failures = path.read_bytes(), 0
    pages = len(data) // 4096
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 200)):
            damaged[4096 * rng.integers(pages) + rng.choice([rng.integers(64), rng.integers(4096)])] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            file = LmdbFile(str(path))
        except ValueError:
            failures += 1
            continue
        for number in range(0, 300, 17):
            try:
                file.get(str(number).encode())
            except ValueError:
                failures += 1
    assert failures > 50


def test_other_kinds_of_trees_are_refused(tmp_path):
    path = tmp_path / 'x.lmdb'
    with writing(path) as transaction:
        transaction.put(b'key', b'value')
    data = bytearray(path.read_bytes())
    assert LmdbFile(str(path)).get(b'key') == b'value'
    for page in (0, 4096):
        data[page + 16 + 24 + 48 + 4] = 0x04  # duplicate keys
    path.write_bytes(data)
    with pytest.raises(ValueError, match='another kind'):
        LmdbFile(str(path))
