#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure how many training images per second the data pipeline prepares on this machine.

    python tools/benchmark_data.py
    python tools/benchmark_data.py -images 512 -rounds 9 -workers 0 2 4 8 -json data.json

Images are generated photographs, JPEG files of 500 x 375 pixels (4:2:0, quality 92). The first table compares the pipeline on
one core with that of a PyTorch recipe, the second one storages and numbers of workers. docs/data.md explains the columns.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse
import contextlib
import functools
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import PIL
from PIL import Image

from config import get_config
from datasets import Loader, build_dataloader, build_dataset
from datasets.augment import BICUBIC, RandAugment, StyleSampler
from datasets.batch import to_device
from datasets.images import FORMATS
from datasets.transforms import RandomResizedCrop
from tools import make_lmdb, make_zip
from tools._output import add_output_file
from utils.cli import run
from utils.environment import processor_name
from utils.errors import UserError
from utils.files import atomic_write, json_text
from utils.sizes import Side, image_size_flag, size_pair
from utils.temporary import temporary_folder

SIZE = (500, 375)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPES = {
    'crop, flip': {'TRAIN.RAND_AUGMENT': False, 'TRAIN.COLOR_JITTER': 0.0},
    'crop, flip, RandAugment': {'TRAIN.RAND_AUGMENT': True},
}
SHRUNK, MAX_SIDE = 'shrunk', 320  # folder of images that -max_side has shrunk
PIPELINES = {'LeanViT': {}, 'LeanViT, exact': {'DATA.FAST_RESIZE': False}}
STORAGES = {
    'folder': {'DATA.DATASET': 'folder'},
    'lmdb': {'DATA.DATASET': 'lmdb'},
    'zip': {'DATA.DATASET': 'zip'},
    'zip, CACHE full': {'DATA.DATASET': 'zip', 'DATA.CACHE': 'full'},
}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    info = {
        'processor': processor_name(),
        'pillow': PIL.__version__,
        'images': args.images,
        'image_size': args.image_size,
    }
    print(', '.join(f'{key} {value}' for key, value in info.items()))
    with temporary_folder('benchmark-data') as folder:
        write_photographs(os.path.join(folder, 'train'), args.images)
        with contextlib.redirect_stdout(io.StringIO()):
            for tool in (make_lmdb, make_zip):
                tool.main(['-data_path', folder, '-dataset', 'folder', '-split', 'train'])
            shrink = ['-max_side', str(MAX_SIDE), '-output', os.path.join(folder, SHRUNK)]
            make_zip.main(['-data_path', folder, '-dataset', 'folder', '-split', 'train', *shrink])
        result = {'environment': info, **measure_one_core(folder, args), 'loader': measure_loaders(folder, args)}
    print_tables(result)
    if args.json:
        with atomic_write(args.json, 'w') as file:
            file.write(json_text(result, indent=1))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add('-images', type=int, default=128, metavar='N', help='number of images (default: 128)')
    add('-rounds', type=int, default=5, metavar='N', help='timed rounds (default: 5)')
    add('-workers', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='numbers of workers (default: 0 1 2)')
    add('-image_size', type=image_size_flag, default=224, metavar='N or H,W', help='size of the input (default: 224)')
    add('-batch_size', type=int, default=32, metavar='N', help='images per batch (default: 32)')
    add_output_file(parser, flag='-json', dest='json', what='also write the results to this file')
    args = parser.parse_args(argv)
    for name in ('images', 'rounds', 'image_size', 'batch_size'):
        if min(size_pair(getattr(args, name))) < 1:
            raise UserError(f'-{name} is {getattr(args, name)}, but must be at least 1.')
    if min(args.workers) < 0:
        raise UserError(f'-workers is {min(args.workers)}, but must be at least 0.')
    return args


def write_photographs(folder: str, count: int) -> None:
    """Write crops of scikit-learn's two photographs, with camera noise, to two class folders."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for name in 'ab':
        os.makedirs(os.path.join(folder, name))
    for number in range(count):
        photograph = photographs[number % 2]
        width = int(rng.integers(300, photograph.width * 7 // 8))
        height = width * SIZE[1] // SIZE[0]
        left, top = int(rng.integers(photograph.width - width)), int(rng.integers(photograph.height - height))
        part = photograph.resize(SIZE, BICUBIC, (left, top, left + width, top + height))
        noisy = np.asarray(part) + rng.normal(0, 1.0, (SIZE[1], SIZE[0], 3))
        path = os.path.join(folder, 'ab'[number % 2], f'{number:05d}.jpg')
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92, subsampling='4:2:0')


def make_loader(folder: str, args: argparse.Namespace, *options: dict, workers: int = 0) -> Loader:
    """Build a training loader as a launcher does."""
    keys = {'DATA.DATA_PATH': folder, 'DATA.IMAGE_SIZE': args.image_size, 'DATA.CROP': 'resized'}
    keys |= {'DATA.BATCH_SIZE': args.batch_size, 'DATA.NUM_WORKERS': workers, 'TRAIN.RANDOM_ERASE_PROB': 0.0}
    keys |= {'DATA.IMAGENET_MEAN': MEAN, 'DATA.IMAGENET_STD': STD}
    for option in options:
        keys |= option
    config = get_config(None, [item for pair in keys.items() for item in pair])
    return build_dataloader(config, build_dataset(config, 'train'), training=True)


# ---------------------------------------------------------------------------------------------------- one core
class Reference:
    """Pipeline of a PyTorch recipe: Pillow decodes, crops, resizes and flips, then ToTensor, Normalize and collate.

    It uses the same random numbers as LeanViT's loader, so both give the same images.
    """

    def __init__(self, paths: list[str], size: Side, randaugment: bool):
        self.paths = paths
        self.size = size_pair(size)[::-1]
        self.box = RandomResizedCrop(size, (0.08, 1.0), (3 / 4, 4 / 3), (BICUBIC,)).box
        styles = StyleSampler('timm', 'bicubic', tuple(round(255 * value) for value in MEAN))
        self.augment = RandAugment(2, 9, styles) if randaugment else None

    def picture(self, index: int) -> Image.Image:
        rng = np.random.default_rng([0, 0, index, 0])
        with open(self.paths[index], 'rb') as file:
            image = Image.open(file, formats=FORMATS).convert('RGB')
        image = image.crop(self.box(*image.size, rng)).resize(self.size, BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.augment(image, rng) if self.augment else image

    def image(self, index: int) -> np.ndarray:
        """Return [3, H, W] float32, normalized."""
        pixels = np.ascontiguousarray(np.array(self.picture(index)).transpose(2, 0, 1)).astype(np.float32)
        pixels /= 255
        pixels -= np.array(MEAN, np.float32).reshape(-1, 1, 1)
        pixels /= np.array(STD, np.float32).reshape(-1, 1, 1)
        return pixels

    def epoch(self, order: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Return batches [B, 3, H, W] of the given indices."""
        return (np.stack([self.image(index) for index in batch]) for batch in order)


def measure_one_core(folder: str, args: argparse.Namespace) -> dict:
    """Measure images per second of CPU time: the reference, and LeanViT's loader without worker processes."""
    rows, epochs = [], []
    for recipe, keys in RECIPES.items():
        loaders = {name: make_loader(folder, args, STORAGES['folder'], keys, more) for name, more in PIPELINES.items()}
        shrunk = {'DATA.DATASET': 'zip', 'DATA.DATA_PATH': os.path.join(folder, SHRUNK)}
        loaders[f'LeanViT, -max_side {MAX_SIDE}'] = make_loader(folder, args, keys, shrunk)
        batches = list(loaders['LeanViT'].epoch(0))
        dataset = loaders['LeanViT'].dataset
        paths = [dataset.describe(index) for index in range(len(dataset))]
        reference = Reference(paths, args.image_size, keys['TRAIN.RAND_AUGMENT'])
        rows.append({'recipe': recipe, 'pipeline': 'reference'})
        epochs.append(functools.partial(reference.epoch, [batch.indices for batch in batches]))
        for name, loader in loaders.items():
            rows.append({'recipe': recipe, 'pipeline': name, 'difference': difference(reference, loader)})
            epochs.append(functools.partial(loader.epoch, 0))
    epochs.append(lambda: (to_device(batch, MEAN, STD) for batch in batches))
    *seconds, normalizing = processor_seconds(epochs, len(batches), args.rounds)
    base = {row['recipe']: time_taken for row, time_taken in zip(rows, seconds) if row['pipeline'] == 'reference'}
    for row, time_taken in zip(rows, seconds):
        row['images_per_second'] = args.images / time_taken
        row['ratio'] = base[row['recipe']] / time_taken
        if row['pipeline'] != 'reference':
            row['ratio_normalized'] = base[row['recipe']] / (time_taken + normalizing)
    return {'one_core': rows, 'normalizing_ms': 1000 * normalizing / args.images}


def processor_seconds(epochs: Sequence[Callable[[], Iterator]], batches: int, rounds: int) -> list[float]:
    """Return the CPU time of each epoch: the sum over its batches of the median over the rounds, after a warm-up round.

    The epochs alternate batch by batch, so that other load on the machine slows all of them alike.
    """
    seconds = np.zeros((len(epochs), rounds + 1, batches))
    for round_ in range(rounds + 1):
        running = [epoch() for epoch in epochs]
        for batch in range(batches):
            for index, iterator in enumerate(running):
                started = time.process_time()
                next(iterator)
                seconds[index, round_, batch] = time.process_time() - started
    return np.median(seconds[:, 1:], axis=1).sum(axis=1).tolist()


def difference(reference: Reference, loader: Loader) -> float:
    """Return the mean absolute difference of the pixels of the first batch, of 255."""
    batch = next(loader.epoch(0))
    expected = np.stack([np.asarray(reference.picture(index), np.int16) for index in batch.indices])
    return float(np.abs(batch.images - expected).mean())


# ---------------------------------------------------------------------------------------------------- loader
def measure_loaders(folder: str, args: argparse.Namespace) -> list[dict]:
    """Measure images per second of wall time, best of the rounds, for each storage and number of workers (crop, flip)."""
    rows, loaders = [], []
    with contextlib.ExitStack() as stack:
        for storage, keys in STORAGES.items():
            for workers in args.workers:
                loader = make_loader(folder, args, RECIPES['crop, flip'], keys, workers=workers)
                rows.append({'storage': storage, 'workers': workers, 'images_per_second': 0.0})
                loaders.append(stack.enter_context(loader))
        for round_ in range(args.rounds + 1):  # the first round starts the workers
            for row, loader in zip(rows, loaders):
                started = time.perf_counter()
                count = sum(len(batch) for batch in loader.epoch(round_))
                if round_:
                    row['images_per_second'] = max(row['images_per_second'], count / (time.perf_counter() - started))
    return rows


def print_tables(result: dict) -> None:
    print('\none core                   images per second of processor time, ratio to the reference')
    for row in result['one_core']:
        print(f'{row["recipe"]:24s} {row["pipeline"]:23s} {row["images_per_second"]:8.1f} {row["ratio"]:6.2f}', end='')
        if row['pipeline'] != 'reference':
            print(f'   normalized {row["ratio_normalized"]:.2f}, pixels differ by {row["difference"]:.2f}', end='')
        print()
    print(f'normalizing a batch on this CPU: {result["normalizing_ms"]:.2f} ms per image')
    rows = result['loader']
    workers = sorted({row['workers'] for row in rows})
    print(
        f'\nloader, images per second {"":7s}'
        + ''.join(f'{count:6d} worker{"s" * (count != 1):1s}' for count in workers)
    )
    for storage in STORAGES:
        speeds = {row['workers']: row['images_per_second'] for row in rows if row['storage'] == storage}
        print(f'{storage:33s}' + ''.join(f'{speeds[count]:14.1f}' for count in workers))


if __name__ == '__main__':
    run(main)
