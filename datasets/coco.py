# SPDX-License-Identifier: Apache-2.0
"""Annotations in COCO's format (https://cocodataset.org/#format-data): a JSON file of images, objects and categories.

A file is checked when it is read: what contradicts the format is an error with file, id and reason. What COCO's own tools
accept, such as boxes that stick out of their image, is accepted and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from datasets.dataset import PackedStrings
from datasets.images import MAX_PIXELS, MAX_SIDE
from utils.errors import UserError
from utils.files import read_regular
from utils.text import NAME, printable

MAX_JSON = 2 << 30  # bytes; instances_train2017.json has 470 MB
MAX_NUMBER = 1e15  # of an area or a side; larger integers may have no float
MAX_COORDINATE = 1 << 18  # pixels, four times the largest side: drawing a mask takes memory for each pixel of an edge
MAX_SHIFT = 60  # bits of a number of an RLE
POINTS = 3  # a polygon with fewer has no area
_SLACK = 1.0  # pixels that a box may stick out of its image before it is counted; annotation tools round
_QUOTED = 60  # characters of a value in a message
GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # ids below 91 that no category of COCO has
_SENTENCES = {
    'unlisted': '{} objects belong to images that the file does not list, and are ignored',
    'short': '{} polygons have fewer than three points, and are dropped',
    'maskless': '{} objects have no mask; training leaves them out, and evaluation counts them as missed masks',
    'outside': '{} boxes stick out of their images; training clips them, evaluation takes them as they are',
    'flat': '{} objects have no area; training leaves them out, evaluation takes them as they are',
}


class Category(NamedTuple):
    """A class of objects: its id in the file, and its name."""

    id: int
    name: str


@dataclass(frozen=True)
class Annotations:
    """Content of a file.

    Attributes:
        path: of the file.
        categories: sorted by id; class k of a model is number k of them.
        image_ids: [N] int64.
        sizes: (height, width) of the images, [N, 2] int64.
        files: names of the images, relative to their folder.
        objects: of each image, JSON text of a list of COCO's objects; `segmentation` is a list of sound polygons or an RLE.
        usable: [N] int64, objects per image that are no crowd and have a mask.
        notes: sentences on what was accepted.
    """

    path: str
    categories: list[Category]
    image_ids: np.ndarray
    sizes: np.ndarray
    files: list[str]
    objects: PackedStrings
    usable: np.ndarray
    notes: list[str] = field(default_factory=list)

    def objects_of(self, index: int) -> list[dict[str, Any]]:
        """Return the objects of image `index`."""
        return json.loads(self.objects[index])


def read_annotations(path: str) -> Annotations:
    """Read and check a file.

    Raises:
        UserError: a file that is missing or no JSON, or an entry that contradicts the format; names file, id and reason.
    """
    return _Reader(path).read()


def coco_categories(names: Sequence[str]) -> list[Category]:
    """Return COCO's own categories, whose ids have gaps."""
    return [Category(number, name) for number, name in zip((i for i in range(1, 91) if i not in GAPS), names)]


def _load(path: str) -> Mapping[str, Any]:
    try:
        content = json.loads(read_regular(path, MAX_JSON).decode('utf-8-sig'))
    except FileNotFoundError:
        raise UserError(
            f"the annotations '{path}' are missing; set -data_path (DATA.DATA_PATH), or DATA.ANNOTATION_FILES for -dataset "
            'detection.'
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the annotations '{path}': {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise UserError(f"'{path}' is no JSON file ({printable(error, NAME)}); copy or export it again.") from None
    if not isinstance(content, dict):
        raise UserError(
            f"'{path}' holds {_quoted(content)}, but COCO's format is an object with images and annotations."
        )
    return content


def _quoted(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return 'a nested value'
    return text if len(text) <= _QUOTED else f'{text[:_QUOTED]}...'


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_NUMBER for value in values
    )


class _Reader:
    """Reads one file and counts what it accepts."""

    def __init__(self, path: str):
        self.path = path
        self.counts: Counter[str] = Counter()

    def read(self) -> Annotations:
        content = _load(self.path)
        categories = self.categories(self.entries(content, 'categories'))
        images = self.images(self.entries(content, 'images'))
        objects, usable = self.objects(self.entries(content, 'annotations'), images, {c.id for c in categories})
        notes = [f"'{self.path}': {_SENTENCES[kind].format(n)}." for kind, n in sorted(self.counts.items())]
        return Annotations(
            self.path,
            categories,
            np.array(list(images), np.int64),
            np.array([(height, width) for _, height, width in images.values()], np.int64).reshape(-1, 2),
            [name for name, *_ in images.values()],
            PackedStrings(json.dumps(entries) for entries in objects),
            np.array(usable, np.int64),
            notes,
        )

    def error(self, entry: str, reason: str) -> UserError:
        return UserError(f"'{self.path}', {entry}: {reason}.")

    def entries(self, content: Mapping[str, Any], name: str) -> list[dict]:
        """Return a list of the file, whose entries are objects."""
        entries = content.get(name)
        if not isinstance(entries, list):
            found = 'is missing' if entries is None else f'is {_quoted(entries)}'
            raise UserError(f"'{self.path}': the list '{name}' {found}; COCO's format needs it, even empty.")
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise self.error(f'number {number} of {name}', f'{_quoted(entry)} is no object with fields')
        return entries

    def id_of(self, entry: Mapping[str, Any], number: int, kind: str, seen) -> int:
        """Return the id of an entry, which must be unique."""
        identity = entry.get('id')
        if not _is_whole(identity):
            raise self.error(f'{kind} number {number}', f'its id is {_quoted(identity)}, but must be a whole number')
        if identity in seen:
            raise self.error(f'{kind} {identity}', 'two entries have this id; give each its own')
        return identity

    def categories(self, entries: list[dict]) -> list[Category]:
        found: dict[int, str] = {}
        for number, entry in enumerate(entries):
            identity = self.id_of(entry, number, 'category', found)
            if not isinstance(entry.get('name'), str):
                raise self.error(
                    f'category {identity}', f'its name is {_quoted(entry.get("name"))}, but must be a text'
                )
            found[identity] = entry['name']
        if not found:
            raise UserError(f"'{self.path}' has no categories, so there is nothing to detect.")
        return [Category(identity, found[identity]) for identity in sorted(found)]

    def images(self, entries: list[dict]) -> dict[int, tuple[str, int, int]]:
        """Return file name, height and width by id."""
        found: dict[int, tuple[str, int, int]] = {}
        for number, entry in enumerate(entries):
            identity = self.id_of(entry, number, 'image', found)
            name, height, width = (entry.get(key) for key in ('file_name', 'height', 'width'))
            if not isinstance(name, str) or not name or '\0' in name:
                raise self.error(
                    f'image {identity}', f'its file_name is {_quoted(name)}, but must be the name of a file'
                )
            for side, value in (('height', height), ('width', width)):
                if not _is_whole(value) or not 1 <= value <= MAX_SIDE:
                    raise self.error(
                        f'image {identity}', f'its {side} is {_quoted(value)}, but must be a number of pixels'
                    )
            if height * width > MAX_PIXELS:
                raise self.error(f'image {identity}', f'its {height} x {width} pixels are more than {MAX_PIXELS}')
            found[identity] = name, height, width
        return found

    def objects(self, entries: list[dict], images: Mapping[int, tuple], categories: set[int]):
        """Return the objects, and the number of usable ones, in the order of the images."""
        grouped: dict[int, list[dict]] = {identity: [] for identity in images}
        usable, seen = Counter(), set()
        for number, entry in enumerate(entries):
            identity = self.id_of(entry, number, 'annotation', seen)
            seen.add(identity)
            image = entry.get('image_id')
            if not _is_whole(image):
                raise self.error(
                    f'annotation {identity}', f'its image_id is {_quoted(image)}, but must be a whole number'
                )
            if image not in images:
                self.counts['unlisted'] += 1
                continue
            found = self.object(entry, identity, categories, images[image][1:])
            grouped[image].append(found)
            usable[image] += not found['iscrowd'] and bool(found['segmentation'])
        return grouped.values(), [usable[identity] for identity in images]

    def object(self, entry: Mapping[str, Any], identity: int, categories: set[int], size: tuple[int, int]) -> dict:
        """Return the fields that training and evaluation read."""
        where = f'annotation {identity}'
        category, box, crowd, area = (entry.get(key) for key in ('category_id', 'bbox', 'iscrowd', 'area'))
        if not _is_whole(category) or category not in categories:
            raise self.error(where, f'its category_id is {_quoted(category)}, which no category of the file has')
        if not _are_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
            raise self.error(
                where, f'its bbox is {_quoted(box)}, but must be [left, top, width, height], none infinite'
            )
        if crowd not in (None, 0, 1):
            raise self.error(where, f'its iscrowd is {_quoted(crowd)}, but must be 0 or 1')
        if area is not None and (not _are_numbers([area]) or area < 0):
            raise self.error(where, f'its area is {_quoted(area)}, but must be a number of 0 or more')
        (left, top, width, height), (rows, columns) = box, size
        self.counts['flat'] += not width * height
        sticks_out = min(left, top) < -_SLACK or left + width > columns + _SLACK or top + height > rows + _SLACK
        self.counts['outside'] += sticks_out
        mask = self.mask(entry.get('segmentation'), where, size)
        self.counts['maskless'] += not mask
        self.counts += Counter()  # without zeros
        common = {'id': identity, 'category_id': category, 'bbox': box, 'iscrowd': int(crowd or 0)}
        return {**common, 'segmentation': mask, **({} if area is None else {'area': area})}

    def mask(self, value: Any, where: str, size: tuple[int, int]) -> list[list[float]] | dict | None:
        """Return polygons of three points or more, or an RLE; an empty list: there is no mask."""
        if isinstance(value, dict):
            check = _check_rle(value, size)
            if check:
                raise self.error(where, check)
            return {'size': list(size), 'counts': value['counts']}
        if value is None:
            return []
        if not isinstance(value, list) or not all(map(_are_numbers, value)):
            raise self.error(
                where,
                f'its segmentation is {_quoted(value)}, but must be a list of polygons [x, y, x, y, ...] or an RLE',
            )
        if any(abs(number) > MAX_COORDINATE for polygon in value for number in polygon):
            raise self.error(where, f'its segmentation has coordinates beyond {MAX_COORDINATE}')
        sound = [polygon for polygon in value if len(polygon) >= 2 * POINTS and len(polygon) % 2 == 0]
        self.counts['short'] += len(value) - len(sound)
        return sound


def _check_rle(rle: Mapping[str, Any], size: tuple[int, int]) -> str:
    """Return what is wrong with a run-length encoding, or an empty string."""
    if rle.get('size') != list(size):
        return f'its RLE has the size {_quoted(rle.get("size"))}, but its image {list(size)} (height, width)'
    counts = rle.get('counts')
    if isinstance(counts, str):
        counts = decoded_counts(counts)
    if not isinstance(counts, list) or not all(_is_whole(count) and count >= 0 for count in counts):
        return 'its RLE has no counts that can be read'
    if sum(counts) != size[0] * size[1]:
        return f'the counts of its RLE cover {sum(counts)} pixels, but its image has {size[0] * size[1]}'
    return ''


def decoded_counts(text: str) -> list[int] | None:
    """Return the run lengths of a compressed RLE; None: the text is not one.

    A number is written in groups of five bits, the lowest first, each plus 48 as a character; bit 5 says that more follow,
    and bit 4 of the last one is the sign. From the third number on, each is a difference to the one two before.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text.encode('utf-8', 'replace'):
        code -= 48
        if not 0 <= code < 64 or shift > MAX_SHIFT:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return None if shift else counts
