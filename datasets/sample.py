# SPDX-License-Identifier: Apache-2.0
"""Samples: an image and its targets in a transform.

A geometric operation draws one `Placement`, which is applied to the image and to all targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

IMAGE = 'image'  # name of the plane that holds the images
VALID = 'valid'  # target: (height, width) of an image without its padding at the right and bottom
IMAGE_SIZE = 'image_size'  # target: (height, width) of the stored image
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Plane:
    """An array of the same shape and type for each image of a batch."""

    name: str
    shape: tuple[int, ...]
    dtype: str = 'uint8'


class Placement(NamedTuple):
    """A geometric operation: a box of the source is cropped, resized and mirrored.

    Attributes:
        box: (left, top, right, bottom) in pixels of the source; the part outside the source is padding.
        size: (width, height) of the result.
        mirrored: True for a horizontal flip.
        resample: resampling filter of the image, if it is drawn; label maps always use nearest neighbor.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    mirrored: bool = False
    resample: Any = None

    def points(self, xy: np.ndarray) -> np.ndarray:
        """Map points [..., 2], (x, y) in pixels, from the source to the result."""
        left, top, right, bottom = self.box
        scale = np.array([self.size[0] / (right - left), self.size[1] / (bottom - top)])
        moved = (np.asarray(xy, 'float64') - (left, top)) * scale
        if self.mirrored:
            moved[..., 0] = self.size[0] - moved[..., 0]
        return moved


class Target(Protocol):
    """A target that geometric operations change with the image."""

    def placed(self, placement: Placement) -> Target:
        """Apply a geometric operation."""

    def array(self) -> np.ndarray:
        """Return the target as a batch holds it."""


@dataclass(frozen=True)
class LabelMap:
    """A class per pixel.

    Attributes:
        pixels: [H, W] uint8 or int32.
        ignored: label of padding and of other pixels that the loss ignores.
    """

    pixels: np.ndarray
    ignored: int = 255

    def placed(self, placement: Placement) -> LabelMap:
        """Apply a geometric operation by nearest neighbor."""
        left, top, right, bottom = (int(edge) for edge in placement.box)
        width, height = placement.size
        columns, rows = left + nearest(right - left, width), top + nearest(bottom - top, height)
        if placement.mirrored:
            columns = columns[::-1]
        inside = [(index >= 0) & (index < side) for index, side in zip((rows, columns), self.pixels.shape)]
        result = np.full((height, width), self.ignored, self.pixels.dtype)
        result[np.ix_(*inside)] = self.pixels[np.ix_(rows[inside[0]], columns[inside[1]])]
        return LabelMap(result, self.ignored)

    def array(self) -> np.ndarray:
        """Return [H, W]."""
        return self.pixels


def nearest(old: int, new: int) -> np.ndarray:
    """Return the source index floor(i * old / new) of each of `new` pixels, with the rounding of OpenCV's INTER_NEAREST."""
    return np.minimum(np.floor(np.arange(new) * (1.0 / (new / old))).astype(int), old - 1)


@dataclass(frozen=True)
class Boxes:
    """Axis-aligned boxes.

    Attributes:
        corners: [n, 4] float, (left, top, right, bottom) in pixels. After a crop they may exceed the image. The task clips
            them and drops small ones, together with the other targets of the object.
    """

    corners: np.ndarray

    def placed(self, placement: Placement) -> Boxes:
        """Apply a geometric operation; a flip swaps left and right, so that left <= right."""
        moved = placement.points(self.corners.reshape(-1, 2, 2))
        return Boxes(np.concatenate([moved.min(1), moved.max(1)], axis=1))

    def array(self) -> np.ndarray:
        """Return [n, 4] float32."""
        return self.corners.astype('float32')


@dataclass(frozen=True)
class Polygons:
    """Outlines of n objects, each a list of polygons [k, 2] of points (x, y) in pixels."""

    objects: tuple[tuple[np.ndarray, ...], ...]

    def placed(self, placement: Placement) -> Polygons:
        return Polygons(tuple(tuple(map(placement.points, polygons)) for polygons in self.objects))

    def array(self) -> np.ndarray:
        """Return [n] lists of arrays [k, 2] float32."""
        result = np.empty(len(self.objects), object)
        result[:] = [[polygon.astype('float32') for polygon in polygons] for polygons in self.objects]
        return result


class Sample(NamedTuple):
    """An image and its targets by name; geometric operations do not change targets that are no `Target`.

    Attributes:
        image: input of a transform (a Pillow image or a `Jpeg`), or its output [H, W, C] uint8.
        targets: targets by name.
    """

    image: Any
    targets: Mapping[str, Any] = NOTHING

    def placed(self, placement: Placement) -> Mapping[str, Any]:
        """Return the targets after a geometric operation."""
        return {
            name: target.placed(placement) if hasattr(target, 'placed') else target
            for name, target in self.targets.items()
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the targets as a batch holds them."""
        return {
            name: target.array() if hasattr(target, 'array') else np.asarray(target)
            for name, target in self.targets.items()
        }
