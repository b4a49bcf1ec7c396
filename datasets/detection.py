# SPDX-License-Identifier: Apache-2.0
"""Images with objects: a class, a box and a mask each, from annotations in COCO's format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datasets.classes import builtin_classes
from datasets.coco import Annotations, Category, coco_categories, read_annotations
from datasets.dataset import FileStorage, Images
from datasets.folder import data_path
from datasets.polygons import bounds, clipped, coco_masks, decoded_rle, mask_polygons
from datasets.registry import register_dataset
from datasets.sample import Placement, Sample
from datasets.scenes import NAMES, scenes_folder
from utils.environment import expand_user
from utils.errors import UserError

OBJECTS = 'objects'  # target of a sample; a batch has the three below
BOXES, CLASSES, MASKS = 'boxes', 'classes', 'masks'
_COCO = {
    split: (os.path.join('annotations', f'instances_{split}2017.json'), f'{split}2017') for split in ('train', 'val')
}
_SMALLEST = 1e-5  # pixels; objects whose box has a shorter side are dropped


@dataclass(frozen=True)
class Objects:
    """The objects of an image.

    Attributes:
        polygons: of each object, a list of one polygon or more, [k, 2] float64.
        classes: [n] int64.
    """

    polygons: tuple[list[np.ndarray], ...]
    classes: np.ndarray

    def placed(self, placement: Placement) -> Objects:
        """See `datasets.sample.Target`; parts outside the image are kept, see `clipped`."""
        moved = tuple([placement.points(polygon) for polygon in polygons] for polygons in self.polygons)
        return Objects(moved, self.classes)

    def clipped(self, size: tuple[int, int]) -> Objects:
        """Clip to an image of `size` (width, height) and drop objects that are outside."""
        inside = [clipped(polygons, size) for polygons in self.polygons]
        kept = [index for index, polygons in enumerate(inside) if polygons and _is_area(bounds(polygons))]
        return Objects(tuple(inside[index] for index in kept), self.classes[kept])

    def boxes(self) -> np.ndarray:
        """Return the smallest box around each object, [n, 4] float32: (left, top, right, bottom)."""
        return np.array([bounds(polygons) for polygons in self.polygons], 'float32').reshape(-1, 4)

    def targets(self) -> dict[str, Any]:
        """Return the targets of a batch by name."""
        return {BOXES: self.boxes(), CLASSES: self.classes, MASKS: Outlines(self.polygons)}


def _is_area(box: np.ndarray) -> bool:
    return bool((box[2:] - box[:2] > _SMALLEST).all())


class Outlines:
    """The ragged target MASKS."""

    def __init__(self, polygons: Sequence[list[np.ndarray]]):
        self.polygons = list(polygons)

    def array(self) -> list[list[np.ndarray]]:
        """Return a list of polygons [k, 2] float64 per object."""
        return self.polygons


class DetectionDataset(Images):
    """Images with objects.

    Args:
        annotations: see `read_annotations`.
        folder: folder of the images.
        training: drop images without objects or with crowds only.
        skip_missing: drop images whose file is missing; False: `check` raises an error.

    Attributes:
        num_classes: number of classes.
        class_names: one per class.
        categories: id and name of each class.
        image_ids: [N] int64, ids in the annotations.
    """

    def __init__(self, annotations: Annotations, folder: str, training: bool, skip_missing: bool = False):
        places, notes, self._fault = _used(annotations, folder, training, skip_missing)
        storage = FileStorage(folder, [annotations.files[place] for place in places])
        super().__init__(storage, f"'{annotations.path}'", [*annotations.notes, *notes])
        self.categories = annotations.categories
        self.class_names = [category.name for category in self.categories]
        self.num_classes = len(self.class_names)
        self.image_ids = annotations.image_ids[places]
        self._annotations, self._places = annotations, places
        self._classes = {category.id: number for number, category in enumerate(self.categories)}

    def sample(self, index: int, exif_rotate: bool = False) -> Sample:
        """Return image and objects. Raises UserError if the image size differs from the annotations."""
        picture = self.picture(index, exif_rotate)
        width, height = (int(side) for side in self._size(index)[::-1])
        if tuple(picture.size) != (width, height):
            rotated = ' after its EXIF rotation (DATA.EXIF_ROTATE)' if exif_rotate else ''
            raise UserError(
                f"image '{self.describe(index)}' has {' x '.join(map(str, picture.size))} pixels{rotated}, but "
                f"'{self._annotations.path}' says {width} x {height} (image {self.image_ids[index]}); both must be equal."
            )
        return Sample(picture, {OBJECTS: self.objects(index)})

    def objects(self, index: int) -> Objects:
        """Return the objects of image `index` that have a mask, without crowds."""
        found = [entry for entry in self._entries(index) if entry['segmentation'] and not entry['iscrowd']]
        classes = [self._classes[entry['category_id']] for entry in found]
        return Objects(tuple(_polygons(entry['segmentation']) for entry in found), np.array(classes, np.int64))

    def check_targets(self, index: int) -> None:
        """See `Images`."""
        with self.naming(index):
            self.sample(index)

    def check(self) -> None:
        """Raise UserError for missing images. The constructor does not, so that tools find all faults."""
        if self._fault:
            raise UserError(self._fault)

    def truth(self, indices: Sequence[int]) -> dict[str, list]:
        """Return images, objects and categories in COCO's format, to evaluate some of the images.

        Crowds and objects without mask are included. Ids start from 1, since pycocotools ignores an object with id 0.
        """
        images = [
            {'id': int(self.image_ids[index]), 'height': int(height), 'width': int(width)}
            for index, (height, width) in ((index, self._size(index)) for index in indices)
        ]
        objects = [
            {**_evaluated(entry, self._size(index)), 'image_id': int(self.image_ids[index])}
            for index in indices
            for entry in self._entries(index)
        ]
        annotations = [{**entry, 'id': number} for number, entry in enumerate(objects, 1)]
        categories = [category._asdict() for category in self.categories]
        return {'info': {}, 'images': images, 'annotations': annotations, 'categories': categories}

    def _entries(self, index: int) -> list[dict]:
        return self._annotations.objects_of(int(self._places[index]))

    def _size(self, index: int) -> np.ndarray:
        """(height, width)."""
        return self._annotations.sizes[self._places[index]]


def _used(
    annotations: Annotations, folder: str, training: bool, skip_missing: bool
) -> tuple[np.ndarray, list[str], str]:
    """Return the indices of the images to use, notes on all others, and what is wrong; an empty string: nothing."""
    notes, used = [], np.ones(len(annotations.files), bool)
    if training:
        used &= annotations.usable > 0
        if not used.all():
            notes.append(
                f"'{annotations.path}': {(~used).sum()} of {len(used)} images have no object to learn, and are left out."
            )
    missing = _missing(folder, annotations.files) & used
    if not missing.any():
        return np.flatnonzero(used), notes, ''
    names = [annotations.files[index] for index in np.flatnonzero(missing)]
    text = f"{len(names)} of {len(used)} images of '{annotations.path}' are missing in '{folder}', such as '{names[0]}'"
    if skip_missing and len(names) < used.sum():
        return np.flatnonzero(used & ~missing), [*notes, f'{text}; they are left out.'], ''
    return np.flatnonzero(used), notes, f'{text}; add them, or set DATA.BAD_IMAGE to skip where a few are missing.'


def _missing(folder: str, names: Sequence[str]) -> np.ndarray:
    """Return which files do not exist, [N] bool; each folder is listed once."""
    listed: dict[str, set[str]] = {}
    result = np.zeros(len(names), bool)
    for number, name in enumerate(names):
        parent, base = os.path.split(os.path.join(folder, name))
        if parent not in listed:
            listed[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        result[number] = base not in listed[parent]
    return result


def _polygons(segmentation: list | dict) -> list[np.ndarray]:
    if isinstance(segmentation, dict):
        return mask_polygons(decoded_rle(segmentation))
    return [np.array(polygon, 'float64').reshape(-1, 2) for polygon in segmentation]


def _evaluated(entry: dict, size: np.ndarray) -> dict:
    """Return an object as pycocotools needs it: with a mask, possibly empty, and an area."""
    height, width = (int(side) for side in size)
    entry = {**entry, 'segmentation': entry['segmentation'] or {'size': [height, width], 'counts': [height * width]}}
    if 'area' not in entry:
        masks, mask = coco_masks(), entry['segmentation']
        if isinstance(mask, list) or isinstance(mask['counts'], list):
            mask = masks.frPyObjects(mask, height, width)
        entry['area'] = float(masks.area(masks.merge(mask) if isinstance(mask, list) else mask))
    return entry


# ---------------------------------------------------------------------------------------------------- layouts
@register_dataset('coco')
def build_coco(config, split: str) -> DetectionDataset:
    """COCO 2017: `DATA_PATH/annotations/instances_{train,val}2017.json`, `DATA_PATH/{train,val}2017/`."""
    return _build(config, data_path(config), *_COCO[split], split)


@register_dataset('detection')
def build_detection(config, split: str) -> DetectionDataset:
    """Own annotations in COCO's format, DATA.ANNOTATION_FILES and DATA.IMAGE_FOLDERS below DATA_PATH."""
    return _build(config, data_path(config), *_own(config, split), split)


@register_dataset('digit_objects')
def build_objects(config, split: str) -> DetectionDataset:
    """The embedded scenes with their objects; DATA_PATH is not used."""
    return _build(config, scenes_folder(), *_SCENES[split], split)


_SCENES = {
    split: (os.path.join('annotations', f'instances_{split}.json'), os.path.join('images', split))
    for split in ('train', 'val')
}


def _own(config, split: str) -> tuple[str, str]:
    number = ('train', 'val').index(split)
    return config.DATA.ANNOTATION_FILES[number], config.DATA.IMAGE_FOLDERS[number]


def _build(config, root: str, annotations: str, images: str, split: str) -> DetectionDataset:
    found = read_annotations(os.path.join(root, annotations))
    return DetectionDataset(found, os.path.join(root, images), split == 'train', config.DATA.BAD_IMAGE == 'skip')


def known_categories(config) -> list[Category] | None:
    """Return the classes of DATA.DATASET if they are known without its images."""
    if config.DATA.DATASET == 'coco':
        return coco_categories(builtin_classes('coco').names)
    if config.DATA.DATASET == 'digit_objects':
        return [Category(label, name) for label, name in enumerate(NAMES) if label]
    path = os.path.join(expand_user(config.DATA.DATA_PATH), _own(config, 'val')[0])
    own = config.DATA.DATASET == 'detection' and os.path.isfile(path)
    return read_annotations(path).categories if own else None
