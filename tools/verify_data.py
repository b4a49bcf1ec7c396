#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check a data set before a long run.

    python tools/verify_data.py -dataset folder -data_path ./flowers -report flowers.json
    python tools/verify_data.py -cfg ./configs/gmlp_s16_224.yaml -data_path /dataset/imagenet -num_workers 8

Reads and decodes every image with its label map or objects as training does. Problems are wrong lines or labels in lists,
classes without images, unreadable images, duplicates within a split, and the same file in training and validation. The exit
status is 0 without problems, else 1.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start(paddle=False)

import argparse
import concurrent.futures
import hashlib
import multiprocessing
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

from config import get_config, update_config
from datasets import Dataset, Images, build_dataset, resolve_num_classes
from datasets.bands import PLAIN
from datasets.dataset import EncodedStorage, describe_empty, empty_classes
from datasets.images import UnreadableImage
from tools._output import add_output_file
from utils.cli import exit_status, run
from utils.errors import UserError
from utils.files import atomic_write, json_text
from utils.flags import flag_parser
from utils.processes import die_with_parent
from utils.signals import handle_signals

PARTS = ('train', 'val')
_CHUNK = 32  # images per task of a worker
_SHOWN = 10  # problems of a kind on the screen
_DIGEST = 16  # bytes


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config = update_config(get_config(), args)
    try:
        report = verify(config)
    except KeyboardInterrupt as error:
        print('interrupted; no report is written.', file=sys.stderr)
        return exit_status(error)
    show(report)
    with atomic_write(args.report, 'w') as file:
        file.write(json_text(report, indent=1))
    print(f'{args.report}: {len(report["problems"])} problems')
    return 1 if report['problems'] else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser(
        'Check that all images of a data set are readable, and that there are no duplicates.',
        ('-cfg', '-dataset', '-data_path', '-num_classes', '-num_workers'),
    )
    add_output_file(
        parser, flag='-report', dest='report', what='file to write the report to', default='verify_data.json'
    )
    return parser.parse_args(argv)


def verify(config) -> dict:
    """Return the report: `parts` with counts, and `problems`, each with a `kind` and its location."""
    datasets, problems = open_parts(config)
    parts, digests = {}, {}
    for part, dataset in datasets.items():
        digests[part], faults = check_images(dataset, part, config.DATA.NUM_WORKERS)
        problems += faults
        parts[part] = {**count(dataset), 'unreadable': len(faults)}
    problems += find_empty(datasets)
    problems += find_copies(datasets, digests)
    return {
        'dataset': config.DATA.DATASET,
        'data_path': config.DATA.DATA_PATH,
        'parts': parts,
        'notes': [note for part, dataset in datasets.items() for note in notes_on(part, dataset)],
        'problems': problems,
    }


def open_parts(config) -> tuple[dict[str, Images], list[dict]]:
    """Open the splits, training first, which sets the number of classes. Return them and the problems of the others."""
    datasets, problems = {}, []
    for part in PARTS:
        try:
            datasets[part] = build_dataset(config, part)
            config.MODEL.NUM_CLASSES = resolve_num_classes(config, datasets[part])
        except UserError as error:
            problems.append({'kind': 'list', 'part': part, 'reason': str(error)})
    if not datasets:
        raise UserError(problems[0]['reason'])
    return datasets, problems


def count(dataset: Images) -> dict:
    if not isinstance(dataset, Dataset):
        return {'images': len(dataset), 'classes': dataset.num_classes}
    number, first = empty_classes(dataset, dataset.num_classes)
    _, per_class = np.unique(dataset.labels, return_counts=True)
    return {
        'images': len(dataset),
        'classes': dataset.num_classes,
        'empty_classes': first,
        'images_per_class': [0 if number else int(per_class.min()), int(per_class.max())],
    }


def find_empty(datasets: dict[str, Images]) -> list[dict]:
    """Report classes of a training list without images; validation may lack classes.

    For classes with names, this is a note and no problem.
    """
    train = datasets.get('train')
    unnamed = isinstance(train, Dataset) and train.class_names is None
    reason = describe_empty(train, train.num_classes) if unnamed else ''
    return [{'kind': 'empty', 'part': 'train', 'reason': reason}] if reason else []


def notes_on(part: str, dataset: Images) -> list[str]:
    named = part == 'train' and isinstance(dataset, Dataset) and dataset.class_names is not None
    notes = [*dataset.notes, *([describe_empty(dataset, dataset.num_classes)] if named else [])]
    return [f'{part}: {note}' for note in notes if note]


# ---------------------------------------------------------------------------------------------------- images
def check_images(dataset: Images, part: str, workers: int) -> tuple[np.ndarray, list[dict]]:
    """Return digests [N, 2] uint64, 0 for unusable images, and the problems of these."""
    digests = np.zeros((len(dataset), _DIGEST), np.uint8)
    problems = []
    with tqdm(total=len(dataset), desc=part, unit='image', disable=None) as bar:
        for index, digest, reason in checked(dataset, workers):
            if reason is None:
                digests[index] = np.frombuffer(digest, np.uint8)
            else:
                image = dataset.describe(index)
                problems.append({'kind': 'unreadable', 'part': part, 'image': image, 'index': index, 'reason': reason})
            bar.update()
    return digests.view(np.uint64), problems


def checked(dataset: Images, workers: int) -> Iterator[tuple[int, bytes, str | None]]:
    """Yield (index, digest, reason why it is unusable or None) of each image, in order."""
    if workers == 0:
        yield from (check_image(dataset, index) for index in range(len(dataset)))
        return
    chunks = [range(begin, min(begin + _CHUNK, len(dataset))) for begin in range(0, len(dataset), _CHUNK)]
    executor = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context('fork'), initializer=_start_worker, initargs=(dataset,)
    )
    try:
        results = executor.map(_check_chunk, chunks)
        for chunk in chunks:
            try:
                yield from next(results)
            except BrokenProcessPool:
                raise UserError(
                    f"a worker died at or soon after the image '{dataset.describe(chunk[0])}'; was it killed for lack of "
                    'memory? Try fewer -num_workers.'
                ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def check_image(dataset: Images, index: int) -> tuple[int, bytes, str | None]:
    """Read and decode one image with the code of training."""
    storage = dataset.storage
    try:
        picture = storage.open(index) if dataset.channels in PLAIN else dataset.picture(index)
        content = storage.read(index) if isinstance(storage, EncodedStorage) else picture.tobytes()
        dataset.check_targets(index)
    except (UnreadableImage, UserError) as error:
        return index, b'', str(error)
    return index, hashlib.blake2b(content, digest_size=_DIGEST).digest(), None


_dataset: Images  # in a worker


def _start_worker(dataset: Images) -> None:
    global _dataset
    _dataset = dataset
    die_with_parent()
    handle_signals(signal.SIG_IGN)  # the main process handles them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the executor stops its workers with it


def _check_chunk(chunk: range) -> list[tuple[int, bytes, str | None]]:
    return [check_image(_dataset, index) for index in chunk]


# ---------------------------------------------------------------------------------------------------- copies
def find_copies(datasets: dict[str, Images], digests: dict[str, np.ndarray]) -> list[dict]:
    """Find files that occur more than once: `leak` across splits, `duplicate` within one."""
    everything = np.concatenate(list(digests.values()))
    _, group, sizes = np.unique(everything, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    usable = everything.any(axis=1)
    members: dict[int, list[int]] = {}
    for position in np.flatnonzero(usable & (sizes[group] > 1)):
        members.setdefault(int(group[position]), []).append(int(position))
    problems = []
    for positions in members.values():
        copies = [origin(position, datasets) for position in positions]
        problems.append(
            {
                'kind': 'leak' if len({part for part, _ in copies}) > 1 else 'duplicate',
                'parts': [part for part, _ in copies],
                'images': [datasets[part].describe(index) for part, index in copies],
                'labels': [label_of(datasets[part], index) for part, index in copies],
            }
        )
    return problems


def label_of(dataset: Images, index: int) -> int | None:
    """Return the class of an image; None for an image with a label map."""
    return int(dataset.labels[index]) if isinstance(dataset, Dataset) else None


def origin(position: int, datasets: dict[str, Images]) -> tuple[str, int]:
    """Return split and index of an image from its position in all splits."""
    for part, dataset in datasets.items():
        if position < len(dataset):
            return part, position
        position -= len(dataset)
    raise IndexError(position)


# ---------------------------------------------------------------------------------------------------- on the screen
def show(report: dict) -> None:
    for part, counts in report['parts'].items():
        per_class = ' of {} to {}'.format(*counts['images_per_class']) if 'images_per_class' in counts else ''
        print(f'{part}: {counts["images"]} images in {counts["classes"]} classes{per_class}')
    for note in report['notes']:
        print(note)
    kinds = Counter(problem['kind'] for problem in report['problems'])
    for kind, number in kinds.items():
        problems = [problem for problem in report['problems'] if problem['kind'] == kind]
        for problem in problems[:_SHOWN]:
            print(f'{kind}: {sentence(problem)}')
        if number > _SHOWN:
            print(f'{kind}: {number - _SHOWN} more, see the report')


def sentence(problem: dict) -> str:
    if problem['kind'] in ('list', 'empty'):
        return problem['reason']
    if problem['kind'] == 'unreadable':
        return f'{problem["image"]}: {problem["reason"]}'
    labels = '' if len(set(problem['labels'])) == 1 else f', with different labels {problem["labels"]}'
    return f'the same file: {", ".join(problem["images"])}{labels}'


if __name__ == '__main__':
    run(main)
