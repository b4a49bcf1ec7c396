# SPDX-License-Identifier: Apache-2.0
"""Folders of runs as files, without training, and a strict reader of pages."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from config import get_config

VOID = ('meta', 'img', 'br')
LOG = (
    '11/26 10:00:00 MASTER_LOG Epoch[{epoch:03d}/003], Step[{step:04d}/0010], Lr: {lr:.6f}, Loss: 0.9 (0.9), Avg Acc: 0.5, '
    'Grad Norm: 1.5, Images/s: 41, ETA: 35 s, Memory: 1.5 GiB, keep_rate: 0.7\n'
)


class Page(HTMLParser):
    """A page whose elements must all be closed in order.

    Attributes:
        elements: (tag, attributes) in order.
        texts: text by the innermost tag.
    """

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f'never closed: {self._open}'

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f'an attribute twice: {attrs}'
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f'</{tag}> closes nothing'

    def handle_data(self, data):
        if data.strip() and self._open:
            self.texts.append((self._open[-1], data))

    @property
    def sections(self) -> list[str]:
        return [attributes['id'] for tag, attributes in self.elements if tag == 'section']

    @property
    def text(self) -> str:
        return '\n'.join(text for tag, text in self.texts if tag != 'style')

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attributes[name] for found, attributes in self.elements if found == tag and name in attributes]


def write_run(folder: Path, *opts, name: str = 'tiny', epochs: int = 3, info: bool = True, offset: float = 0.0) -> Path:
    """A finished run of a classifier, without weights."""
    folder.mkdir(parents=True)
    config = get_config(opts=['MODEL.NAME', name, 'MODEL.NUM_CLASSES', 3, 'TRAIN.BASE_LR', 0.002, *opts])
    (folder / 'config.yaml').write_text(config.dump())
    rows, lines = [], []
    for epoch in range(1, epochs + 1):
        common = {'epoch': epoch, 'step': 10 * epoch, 'images': 100, 'skipped': 0, 'seconds': 2.0}
        loss = 1 / epoch + offset
        rows.append(
            {'kind': 'train', **common, 'lr': 1e-3 / epoch, 'loss': loss, 'acc1': 0.5, 'images_per_second': 50.0}
        )
        rows.append({'kind': 'val', **common, 'loss': loss / 2, 'acc1': 0.8 - 0.1 * abs(epoch - 2), 'acc5': 1.0})
        lines += [LOG.format(epoch=epoch, step=step, lr=1e-3 / epoch) for step in (0, 9)]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (folder / 'log.txt').write_text(''.join(lines))
    if info:
        (folder / 'run.json').write_text(json.dumps({
            'commands': ['main_single_gpu.py -cfg=tiny.yaml'], 'environment': {'python': '3.11.7', 'device': 'CPU'},
            'sources': {'TRAIN.BASE_LR': 'configs/tiny.yaml:7', 'MODEL.NAME': '-opts'},
        }))  # fmt: skip
    return folder


def write_images(folder: Path, names=('cat', 'dog', 'fly')) -> Path:
    """A validation folder with two images of each class, and one training image."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 1), ('val', 2)):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 255, (12, 16, 3), 'uint8')
                Image.fromarray(pixels).save(folder / split / name / f'{number}.png')
    return folder


def write_predictions(run: Path, images: list[str], predicted=(0, 1, 1, 1, 2, 0), names=('cat', 'dog', 'fly')) -> None:
    """predictions.csv and classes.csv of six images, two of each class; image 5 is the most confident mistake."""
    with open(run / 'predictions.csv', 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['index', 'image', 'label', 'class1', 'name1', 'probability1', 'error'])
        for index, image in enumerate(images):
            number = predicted[index]
            writer.writerow([index, image, index // 2, number, names[number], 0.4 + 0.1 * index, ''])
    with open(run / 'classes.csv', 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['class', 'name', 'acc1', 'images'])
        writer.writerows([[number, name, (0.5, 1.0, 0.5)[number], 2] for number, name in enumerate(names)])


def predicted_run(folder: Path, data: Path, *opts, names=('cat', 'dog', 'fly'), **options) -> Path:
    """A run with predictions for the images of `write_images`."""
    run = write_run(folder, 'DATA.DATASET', 'folder', 'DATA.DATA_PATH', str(data), *opts, **options)
    write_predictions(
        run, [str(data / 'val' / name / f'{k}.png') for name in sorted(names) for k in (0, 1)], names=names
    )
    return run
