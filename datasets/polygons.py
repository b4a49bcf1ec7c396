# SPDX-License-Identifier: Apache-2.0
"""Outlines of objects: polygons [k, 2] of points (x, y) in pixels."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np


@functools.cache
def geometry():
    """Import shapely on first use."""
    import shapely

    return shapely


@functools.cache
def coco_masks():
    """Import pycocotools.mask on first use."""
    from pycocotools import mask

    return mask


def clipped(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> list[np.ndarray]:
    """Return the parts of polygons inside an image of `size` (width, height), each as a polygon.

    A polygon that crosses itself is repaired by a buffer of width 0, and holes are dropped, as in detectron2.
    """
    shapely = geometry()
    window = shapely.box(0, 0, *size)
    shapes = shapely.buffer([shapely.polygons(polygon) for polygon in polygons], 0.0)
    parts = shapely.get_parts(shapely.intersection(shapes, window))
    areas = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]
    outlines = [shapely.get_coordinates(ring) for ring in shapely.get_exterior_ring(areas)]
    return [outline[:-1] for outline in outlines if len(outline)]  # the last point repeats the first


def bounds(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """Return the smallest box around polygons, [4] float64: (left, top, right, bottom)."""
    points = np.concatenate(polygons)
    return np.concatenate([points.min(0), points.max(0)])


def mask_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Return polygons along the pixel edges of a mask [H, W]; together they cover exactly its pixels.

    Polygons have no holes: a region with holes is cut into pieces without.
    """
    shapely = geometry()
    edges = np.diff(np.pad(mask.astype('int8'), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    union = shapely.union_all(shapely.box(starts, rows, ends, rows + 1))
    regions = shapely.get_parts(shapely.simplify(union, 0.0))  # without points inside of straight lines
    return [_outline(piece) for region in regions for piece in _without_holes(region)]


def _outline(region) -> np.ndarray:
    return geometry().get_coordinates(geometry().get_exterior_ring(region))[:-1]


def _without_holes(region) -> Iterator:
    """Yield a region, or the pieces on both sides of a vertical line through its first hole."""
    shapely = geometry()
    if region.is_empty:
        return
    if not shapely.get_num_interior_rings(region):
        yield region
        return
    left, top, right, bottom = region.bounds
    hole = shapely.get_interior_ring(region, 0).bounds
    middle = round((hole[0] + hole[2]) / 2)
    for window in (shapely.box(left, top, middle, bottom), shapely.box(middle, top, right, bottom)):
        parts = shapely.get_parts(shapely.intersection(region, window))
        for part in parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]:
            yield from _without_holes(part)


def decoded_rle(rle: dict) -> np.ndarray:
    """Return the mask [H, W] uint8 of an RLE, whose counts are a list of run lengths or compressed text."""
    masks = coco_masks()
    if isinstance(rle['counts'], list):
        rle = masks.frPyObjects(rle, *rle['size'])
    return masks.decode(rle)
