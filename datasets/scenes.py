# SPDX-License-Identifier: Apache-2.0
"""Embedded scenes of handwritten digits for dense prediction, with label maps and boxes, without a download.

Each scene shows scikit-learn's digits on a textured background, in random number, size, position and color; later digits
cover earlier ones. Scenes are written once in the layout of user data:

    $LEANVIT_CACHE/digit_scenes-3/classes.txt                      ground, 0 to 9
                                  images/{train,val}/NNNN.png
                                  annotations/{train,val}/NNNN.png label maps
                                  annotations/instances_{train,val}.json     objects in COCO's format

Boxes and masks of objects are those of their visible pixels.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets.classes import default_palette, read_classes
from datasets.dataset import Dataset, FileStorage
from datasets.embedded import load_digits, written_once
from datasets.polygons import mask_polygons
from datasets.registry import register_dataset
from datasets.segmentation import SegmentationDataset
from datasets.segmentation_layouts import CLASSES, segmentation_folder

NAMES = ('ground', *map(str, range(10)))
SCENES = {'train': 3000, 'val': 200}
SIDE = 64  # side of a scene in pixels
_DIGITS = (2, 4)  # range of their number in a scene
_SIDES = (30, 48)  # range of the side of a digit, pixels
_VERSION = 3  # of the files
_SEED = 1
_HELD_OUT = 5  # every fifth digit appears in validation scenes only
_INK = 96  # threshold, of 255: brighter pixels of an enlarged digit belong to it
_LEAST = 0.4  # minimum visible fraction of a digit that is listed as an object


@register_dataset('digit_scenes')
def build_scenes(config, split: str) -> SegmentationDataset:
    """Embedded scenes of digits; ignores DATA_PATH."""
    root = scenes_folder()
    return segmentation_folder(config, root, split, read_classes(os.path.join(root, CLASSES)))


@register_dataset('scene_images')
def build_images(config, split: str) -> Dataset:
    """Embedded scenes as images of a single class, for pre-training without labels; ignores DATA_PATH."""
    folder = os.path.join(scenes_folder(), 'images', split)
    names = sorted(os.listdir(folder))
    return Dataset(FileStorage(folder, names), np.zeros(len(names), np.int64), f"'{folder}'", class_names=['scene'])


def scenes_folder() -> str:
    """Return the folder of the scenes, which the first call writes."""
    return written_once(f'digit_scenes-{_VERSION}', _write_scenes)


class Scene(NamedTuple):
    """A scene.

    Attributes:
        image: [SIDE, SIDE, 3] uint8.
        labels: [SIDE, SIDE] uint8, 0 for the background, k + 1 for the digit k.
        objects: (label, mask of the visible pixels [SIDE, SIDE] bool) of each sufficiently visible digit.
    """

    image: np.ndarray
    labels: np.ndarray
    objects: list[tuple[int, np.ndarray]]


def make_scene(digits: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> Scene:
    """Compose a scene from digits [n, 8, 8] uint8 with the classes `targets` [n]."""
    image = _ground(rng)
    owner, stamps = np.full((SIDE, SIDE), -1), []
    for _ in range(rng.integers(_DIGITS[0], _DIGITS[1] + 1)):
        number, side = int(rng.integers(len(digits))), int(rng.integers(_SIDES[0], _SIDES[1] + 1))
        ink = np.asarray(Image.fromarray(digits[number]).resize((side, side), Image.Resampling.BICUBIC)) > _INK
        top, left = (int(start) for start in rng.integers(-side // 6, SIDE - side + side // 6 + 1, 2))
        rows, columns = np.nonzero(ink)
        inside = (rows + top >= 0) & (rows + top < SIDE) & (columns + left >= 0) & (columns + left < SIDE)
        rows, columns = rows[inside] + top, columns[inside] + left
        image[rows, columns] = rng.integers(150, 256, 3) + rng.normal(0, 6, (len(rows), 3))
        owner[rows, columns] = len(stamps)
        stamps.append((int(targets[number]) + 1, int(ink.sum())))
    labels = np.array([label for label, _ in stamps] + [0], 'uint8')[owner]  # -1 is the background
    visible = [(label, owner == index, full) for index, (label, full) in enumerate(stamps)]
    objects = [(label, mask) for label, mask, full in visible if mask.sum() >= _LEAST * full]
    return Scene(np.clip(image, 0, 255).astype('uint8'), labels, objects)


def _ground(rng: np.random.Generator) -> np.ndarray:
    """Draw a dark background of smooth blotches and noise, [SIDE, SIDE, 3] float64."""
    blotches = Image.fromarray(rng.integers(20, 110, (6, 6, 3)).astype('uint8'))
    smooth = np.asarray(blotches.resize((SIDE, SIDE), Image.Resampling.BICUBIC), 'float64')
    return smooth + rng.normal(0, 8, (SIDE, SIDE, 1))


def _write_scenes(folder: str) -> None:
    data = load_digits()
    pixels, held_out = np.round(data.images * (255 / 16)).astype('uint8'), np.arange(len(data.target)) % _HELD_OUT == 0
    for number, (split, count) in enumerate(SCENES.items()):
        mine = held_out if split == 'val' else ~held_out
        rng = np.random.default_rng([_SEED, number])
        scenes = [make_scene(pixels[mine], data.target[mine], rng) for _ in range(count)]
        _write_split(folder, split, scenes)
    with open(os.path.join(folder, CLASSES), 'w', encoding='utf-8') as file:
        file.writelines(f'{name}\n' for name in NAMES)


def _write_split(folder: str, split: str, scenes: list[Scene]) -> None:
    palette = default_palette(256).tobytes()
    for kind in ('images', 'annotations'):
        os.makedirs(os.path.join(folder, kind, split))
    for number, scene in enumerate(scenes):
        name = f'{number:04d}.png'
        Image.fromarray(scene.image).save(os.path.join(folder, 'images', split, name))
        labels = Image.fromarray(scene.labels)
        labels.putpalette(palette)
        labels.save(os.path.join(folder, 'annotations', split, name))
    with open(os.path.join(folder, 'annotations', f'instances_{split}.json'), 'w', encoding='utf-8') as file:
        json.dump(_coco(scenes), file)


def _coco(scenes: list[Scene]) -> dict:
    """Return the objects in COCO's format; the digit k has the category id k + 1, as in the label maps."""
    objects = [(number, *found) for number, scene in enumerate(scenes) for found in scene.objects]
    return {
        'images': [
            {'id': number, 'file_name': f'{number:04d}.png', 'width': SIDE, 'height': SIDE}
            for number in range(len(scenes))
        ],
        'annotations': [
            {'id': index, 'image_id': number, 'category_id': label, 'iscrowd': 0, **_shape(mask)}
            for index, (number, label, mask) in enumerate(objects, 1)
        ],
        'categories': [{'id': label, 'name': name} for label, name in enumerate(NAMES) if label],
    }


def _shape(mask: np.ndarray) -> dict:
    """Box, area and polygons of a mask [SIDE, SIDE]."""
    rows, columns = np.nonzero(mask)
    left, top = int(columns.min()), int(rows.min())
    box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
    polygons = [polygon.astype(int).reshape(-1).tolist() for polygon in mask_polygons(mask)]
    return {'bbox': box, 'area': len(rows), 'segmentation': polygons}
