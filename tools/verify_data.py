#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks a data set before a long run meets its faults.

    python tools/verify_data.py -dataset folder -data_path ./flowers -report flowers.json
    python tools/verify_data.py -cfg ./configs/gmlp_s16_224.yaml -data_path /dataset/imagenet -num_workers 8

Reads and decodes every image, with its label map or objects, as training does. Problems are lists with bad lines or labels or without images of a class,
images that cannot be used, the same file twice in a part, and the same file in training and validation. Exit status: 0 without
problems, 1 with some.
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

from config import flag_parser, get_config, update_config
from datasets import Dataset, Images, build_dataset, resolve_num_classes
from datasets.dataset import EncodedStorage, describe_empty, empty_classes
from datasets.images import UnreadableImage
from tools._output import add_output_file
from utils.cli import exit_status, handle_signals, run
from utils.errors import UserError
from utils.files import atomic_write, json_text
from utils.processes import die_with_parent

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
        'Check that all images of a data set can be used, and that none is there twice.',
        ('-cfg', '-dataset', '-data_path', '-num_classes', '-num_workers'),
    )
    add_output_file(
        parser, flag='-report', dest='report', what='file to write the report to', default='verify_data.json'
    )
    return parser.parse_args(argv)


def verify(config) -> dict:
    """The report: `parts` with counts, and `problems`, each with a `kind` and what is needed to find it."""
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
    """The parts that can be opened, and why others cannot. Training comes first and says how many classes there are."""
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
    """Classes up to the largest label of a training list that nothing is learned about; validation may lack classes.

    Where classes have names, those without an image are a note.
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
    """Digests [N, 2] uint64, 0 where there is none, and what is wrong with those."""
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
    """(index, digest, what is wrong or None) of each image, in order."""
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
    """Reads and decodes one image with the code that training uses."""
    storage = dataset.storage
    try:
        picture = storage.open(index)
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
    handle_signals(signal.SIG_IGN)  # the main process's business
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the executor ends its workers


def _check_chunk(chunk: range) -> list[tuple[int, bytes, str | None]]:
    return [check_image(_dataset, index) for index in chunk]


# ---------------------------------------------------------------------------------------------------- copies
def find_copies(datasets: dict[str, Images], digests: dict[str, np.ndarray]) -> list[dict]:
    """Files that are there more than once: `leak` across parts, `duplicate` within one."""
    everything = np.concatenate(list(digests.values()))
    _, group, sizes = np.unique(everything, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    usable = everything.any(axis=1)
    members: dict[int, list[int]] = {}
    for place in np.flatnonzero(usable & (sizes[group] > 1)):
        members.setdefault(int(group[place]), []).append(int(place))
    problems = []
    for places in members.values():
        copies = [origin(place, datasets) for place in places]
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
    """Class of an image; None where it has a class per pixel."""
    return int(dataset.labels[index]) if isinstance(dataset, Dataset) else None


def origin(place: int, datasets: dict[str, Images]) -> tuple[str, int]:
    """Part and index of an image by its place in all parts."""
    for part, dataset in datasets.items():
        if place < len(dataset):
            return part, place
        place -= len(dataset)
    raise IndexError(place)


# ---------------------------------------------------------------------------------------------------- on the screen
def show(report: dict) -> None:
    for part, facts in report['parts'].items():
        per_class = ' of {} to {}'.format(*facts['images_per_class']) if 'images_per_class' in facts else ''
        print(f'{part}: {facts["images"]} images in {facts["classes"]} classes{per_class}')
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
