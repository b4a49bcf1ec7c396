# SPDX-License-Identifier: Apache-2.0
"""One item of a data set, with its targets, on its way through a transform.

A geometric operation is drawn once. It is described by a `Placement`, which the image and every target then follow.
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
    """Where the pixels of an image go: a box of the source is resized to the size of the result, then mirrored.

    Attributes:
        box: (left, top, right, bottom) in the source, pixels; what lies outside of the source is padding.
        size: (width, height) of the result.
        mirrored: left and right are exchanged.
        resample: filter for the image, where that is drawn too; label maps are always resized by nearest neighbor.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    mirrored: bool = False
    resample: Any = None

    def points(self, xy: np.ndarray) -> np.ndarray:
        """Points [..., 2] in the source, as (x, y) in pixels -> the same points in the result."""
        left, top, right, bottom = self.box
        scale = np.array([self.size[0] / (right - left), self.size[1] / (bottom - top)])
        moved = (np.asarray(xy, 'float64') - (left, top)) * scale
        if self.mirrored:
            moved[..., 0] = self.size[0] - moved[..., 0]
        return moved


class Target(Protocol):
    """A target that follows the image through geometric operations."""

    def placed(self, placement: Placement) -> Target:
        """The target of the image that `placement` results in."""

    def array(self) -> np.ndarray:
        """What a batch holds."""


@dataclass(frozen=True)
class LabelMap:
    """A class per pixel.

    Attributes:
        pixels: [H, W] uint8 or int32.
        ignored: class of pixels that the loss ignores, which padding gets.
    """

    pixels: np.ndarray
    ignored: int = 255

    def placed(self, placement: Placement) -> LabelMap:
        """Resized by nearest neighbor."""
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
        """[H, W]."""
        return self.pixels


def nearest(old: int, new: int) -> np.ndarray:
    """Index of the source pixel of each of `new` pixels, floor(i * old / new), rounded as OpenCV's INTER_NEAREST rounds."""
    return np.minimum(np.floor(np.arange(new) * (1.0 / (new / old))).astype(int), old - 1)


@dataclass(frozen=True)
class Boxes:
    """Axis-aligned boxes.

    Attributes:
        corners: [n, 4] float, (left, top, right, bottom) in pixels. They may stick out of the image after a crop: the task
            clips them, and drops what is too small, where it knows which other targets belong to them.
    """

    corners: np.ndarray

    def placed(self, placement: Placement) -> Boxes:
        """Mirroring exchanges left and right, so that left <= right stays true."""
        moved = placement.points(self.corners.reshape(-1, 2, 2))
        return Boxes(np.concatenate([moved.min(1), moved.max(1)], axis=1))

    def array(self) -> np.ndarray:
        """[n, 4] float32."""
        return self.corners.astype('float32')


@dataclass(frozen=True)
class Polygons:
    """Outlines of n objects, each a list of polygons [k, 2] of points (x, y) in pixels."""

    objects: tuple[tuple[np.ndarray, ...], ...]

    def placed(self, placement: Placement) -> Polygons:
        return Polygons(tuple(tuple(map(placement.points, polygons)) for polygons in self.objects))

    def array(self) -> np.ndarray:
        """[n] lists of arrays [k, 2] float32."""
        result = np.empty(len(self.objects), object)
        result[:] = [[polygon.astype('float32') for polygon in polygons] for polygons in self.objects]
        return result


class Sample(NamedTuple):
    """A picture and its targets by name; targets that are no `Target` do not depend on geometry.

    Attributes:
        image: what a transform starts from (a Pillow image or a `Jpeg`), and the array [H, W, C] uint8 it ends with.
        targets: by name.
    """

    image: Any
    targets: Mapping[str, Any] = NOTHING

    def placed(self, placement: Placement) -> Mapping[str, Any]:
        """The targets after a geometric operation."""
        return {
            name: target.placed(placement) if hasattr(target, 'placed') else target
            for name, target in self.targets.items()
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The targets as a batch holds them."""
        return {
            name: target.array() if hasattr(target, 'array') else np.asarray(target)
            for name, target in self.targets.items()
        }
