#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write train_list.txt and val_list.txt from class folders, one line per image: relative path, blank, label.

    python tools/make_lists.py -data_path /data/flowers              from train/<class>/ and val/<class>/
    python tools/make_lists.py -data_path /data/flowers -split 0.1   from <class>/ (or train/<class>/), 10 % for validation
    python tools/make_lists.py -data_path /data/flowers -per_class 20   20 training images per class

Classes are numbered in sorted order. -split takes the same fraction of each class. Draws have a fixed seed.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start(paddle=False)

import argparse
import os
import sys

import numpy as np

from datasets.folder import class_folders, list_path, listed_images
from utils.cli import run
from utils.errors import UserError
from utils.files import atomic_write

Entries = list[tuple[str, int]]  # (path relative to the data folder, label)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    names, parts = split_folder(args.data_path, args.split, args.seed) if args.split else read_folders(args.data_path)
    if args.per_class:
        parts['train'] = few_of_each(names, parts['train'], args.per_class, args.seed)
    files = {split: list_path(args.data_path, split) for split in parts}
    for path in files.values():
        if os.path.exists(path) and not args.force:
            raise UserError(f"'{path}' exists; -force overwrites it.")
    contents = {split: format_list(entries) for split, entries in parts.items()}
    for split, path in files.items():
        with atomic_write(path) as file:
            file.write(contents[split])
        used = len({label for _, label in parts[split]})
        print(f'{path}: {len(parts[split])} images, {used} of {len(names)} classes')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('-data_path', metavar='DIR', required=True, help='folder that holds the images')
    parser.add_argument('-split', metavar='FRACTION', type=float, help='fraction of each class for validation')
    parser.add_argument('-per_class', metavar='N', type=int, help='maximum of training images per class')
    parser.add_argument('-seed', metavar='N', type=int, default=0, help='seed of the draws (default: 0)')
    parser.add_argument('-force', action='store_true', help='overwrite existing list files')
    args = parser.parse_args(argv)
    if args.split is not None and not 0 < args.split < 1:
        raise UserError(f'-split is {args.split}, but must be between 0 and 1.')
    if args.per_class is not None and args.per_class < 1:
        raise UserError(f'-per_class is {args.per_class}, but must be at least 1.')
    return args


def read_folders(root: str) -> tuple[list[str], dict[str, Entries]]:
    """Return the class names, and the entries below `root/train` and `root/val`."""
    if not os.path.isdir(os.path.join(root, 'val')) and os.path.isdir(root):
        raise UserError(f"'{root}' has no val/; -split 0.1 takes a tenth of the images for validation instead.")
    names = class_folders(os.path.join(root, 'train'))
    return names, {'train': entries_below(root, 'train', names), 'val': entries_below(root, 'val', names)}


def split_folder(root: str, fraction: float, seed: int) -> tuple[list[str], dict[str, Entries]]:
    """Return the class names, and the entries below `root/train`, else below `root`, in two disjoint splits."""
    if os.path.isdir(os.path.join(root, 'val')):
        raise UserError(f"'{root}' has a validation split in val/ already; remove -split.")
    part = 'train' if os.path.isdir(os.path.join(root, 'train')) else ''
    names = class_folders(os.path.join(root, part))
    entries = entries_below(root, part, names)
    labels = np.array([label for _, label in entries])
    held_out = np.zeros(len(entries), bool)
    rng = np.random.default_rng(seed)
    for label in range(len(names)):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise UserError(f"class '{names[label]}' has a single image, which cannot be split.")
        held_out[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return names, {
        'train': [entry for entry, out in zip(entries, held_out) if not out],
        'val': [entry for entry, out in zip(entries, held_out) if out],
    }


def few_of_each(names: list[str], entries: Entries, count: int, seed: int) -> Entries:
    """Draw `count` entries of each class, in their order."""
    rng, chosen = np.random.default_rng(seed), []
    labels = np.array([label for _, label in entries])
    for label, name in enumerate(names):
        members = np.flatnonzero(labels == label)
        if len(members) < count:
            raise UserError(f"class '{name}' has {len(members)} training images, fewer than -per_class {count}.")
        chosen += sorted(rng.permutation(members)[:count].tolist())
    return [entries[index] for index in sorted(chosen)]


def entries_below(root: str, part: str, names: list[str]) -> Entries:
    """List the images of each class in `root/part`, with paths relative to `root`. Prints the skipped files."""
    paths, labels, left_out = listed_images(os.path.join(root, part), names)
    if left_out:
        print(left_out, file=sys.stderr)
    return [(os.path.join(part, path), label) for path, label in zip(paths, labels)]


def format_list(entries: Entries) -> bytes:
    for path, _ in entries:
        if path != path.strip() or len(path.splitlines()) != 1:
            raise UserError(f'{path!r} has a line break or begins or ends with a blank; rename it.')
    return b''.join(os.fsencode(f'{path} {label}\n') for path, label in entries)


if __name__ == '__main__':
    run(main)
