# SPDX-License-Identifier: Apache-2.0
"""Data sets of semantic segmentation in their published layouts, and any folder of images and label maps."""

from __future__ import annotations

import os

from datasets.classes import ClassTable, builtin_classes, read_classes
from datasets.dataset import FileStorage
from datasets.folder import data_path, read_lines
from datasets.registry import register_dataset
from datasets.segmentation import PLAIN, LabelCoding, SegmentationDataset
from datasets.walk import images_below
from utils.errors import UserError

CLASSES = 'classes.txt'
BUILTIN = ('ade20k', 'voc2012', 'cityscapes')
# Values of Cityscapes' labelIds maps in the order of the classes; other values of 0 to 33 are ignored.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@register_dataset('segmentation')
def build_segmentation(config, split: str) -> SegmentationDataset:
    """Any folder with `images/<split>/**`, `annotations/<split>/**.png` of the same names, and `classes.txt`."""
    root = data_path(config)
    return segmentation_folder(config, root, split, read_classes(os.path.join(root, CLASSES)))


@register_dataset('ade20k')
def build_ade20k(config, split: str) -> SegmentationDataset:
    """ADE20K: the folder ADEChallengeData2016; the value 0 of its maps is ignored."""
    folder = {'train': 'training', 'val': 'validation'}[split]
    return segmentation_folder(
        config, data_path(config), folder, builtin_classes('ade20k'), LabelCoding(reduce_zero=True)
    )


@register_dataset('voc2012')
def build_voc(config, split: str) -> SegmentationDataset:
    """Pascal VOC 2012: the folder VOCdevkit/VOC2012, 1464 training images."""
    return _voc(config, split, 'SegmentationClass')


@register_dataset('voc2012aug')
def build_augmented_voc(config, split: str) -> SegmentationDataset:
    """Pascal VOC 2012 with SBD's maps in SegmentationClassAug: 10582 training images, listed in trainaug.txt."""
    maps = 'SegmentationClassAug' if split == 'train' else 'SegmentationClass'
    return _voc(config, 'trainaug' if split == 'train' else split, maps)


def _voc(config, name: str, maps: str) -> SegmentationDataset:
    root = data_path(config)
    path = os.path.join(root, 'ImageSets', 'Segmentation', f'{name}.txt')
    names = [line.strip() for _, line in read_lines(path, 'DATA_PATH is the folder VOCdevkit/VOC2012')]
    images = [os.path.join('JPEGImages', f'{name}.jpg') for name in names]
    return _paired(
        config, root, images, [os.path.join(maps, f'{name}.png') for name in names], builtin_classes('voc2012')
    )


@register_dataset('cityscapes')
def build_cityscapes(config, split: str) -> SegmentationDataset:
    """Cityscapes: the folders leftImg8bit and gtFine; maps of train ids if they exist, else of label ids."""
    root, ending = data_path(config), '_leftImg8bit.png'
    found = _files(os.path.join(root, 'leftImg8bit', split))
    names = [name[: -len(ending)] for name in found if name.endswith(ending)]
    if not names:
        raise UserError(f"'{os.path.join(root, 'leftImg8bit', split)}' holds no image that ends in {ending}.")
    images = [os.path.join('leftImg8bit', split, f'{name}{ending}') for name in names]
    maps = [os.path.join('gtFine', split, f'{name}_gtFine_labelTrainIds.png') for name in names]
    others = [path.replace('labelTrainIds', 'labelIds') for path in maps]
    if len(_missing(root, maps)) <= len(_missing(root, others)):
        return _paired(config, root, images, maps, builtin_classes('cityscapes'))
    labels = {value: label for label, value in enumerate(_CITYSCAPES_IDS)}
    coding = LabelCoding(ids=[labels.get(value) for value in range(_CITYSCAPES_IDS[-1] + 1)])
    return _paired(config, root, images, others, builtin_classes('cityscapes'), coding)


def segmentation_folder(
    config, root: str, split: str, classes: ClassTable, coding: LabelCoding = PLAIN
) -> SegmentationDataset:
    """Build a data set of images below `root/images/split` and maps of the same names below `root/annotations/split`."""
    images, maps = (os.path.join(root, folder, split) for folder in ('images', 'annotations'))
    names = _files(images)
    if not names:
        raise UserError(f"'{images}' holds no image.")
    stems = [os.path.splitext(name)[0] for name in names]
    twice = _first_twice(stems)
    if twice:
        raise UserError(f"two images in '{images}' have the name '{twice}' with different extensions; rename one.")
    annotated = {os.path.splitext(name)[0]: name for name in _files(maps)}
    left_over = len(annotated.keys() - stems)
    notes = [f"{left_over} label maps in '{maps}' belong to no image."] if left_over else []
    paths = [os.path.join('annotations', split, annotated.get(stem, f'{stem}.png')) for stem in stems]
    names = [os.path.join('images', split, name) for name in names]
    return _paired(config, root, names, paths, classes, coding, notes)


def _files(folder: str) -> list[str]:
    """List the image files below a folder, relative to it."""
    return [os.path.normpath(path) for path in images_below(folder)[0]]


def _first_twice(names: list[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _paired(
    config, root: str, images: list[str], maps: list[str], classes: ClassTable, coding: LabelCoding = PLAIN, notes=()
) -> SegmentationDataset:
    """Build a data set of image files and map files in the same order."""
    missing, storages = _missing(root, maps), (FileStorage(root, images), FileStorage(root, maps))
    return paired(config, *storages, f"'{root}'", classes, coding, notes, missing)


def paired(
    config, images, maps, source: str, classes: ClassTable, coding: LabelCoding, notes=(), missing=()
) -> SegmentationDataset:
    """Build a data set of images and maps from two storages, by DATA.IGNORE_INDEX and DATA.REDUCE_ZERO_LABEL."""
    data = config.DATA
    coding = coding._replace(reduce_zero=coding.reduce_zero or data.REDUCE_ZERO_LABEL)
    return SegmentationDataset(images, maps, source, classes, coding, data.IGNORE_INDEX, notes, missing)


def _missing(root: str, paths: list[str]) -> list[int]:
    """Return the indices of missing files; each folder is listed once."""
    listed: dict[str, set[str]] = {}
    missing = []
    for index, path in enumerate(paths):
        folder, name = os.path.split(os.path.join(root, path))
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder]:
            missing.append(index)
    return missing
