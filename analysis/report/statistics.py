# SPDX-License-Identifier: Apache-2.0
"""Statistics of the predictions of a classifier."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BINS = 15  # of a reliability diagram, as in arXiv 1706.04599, section 5


class Calibration(NamedTuple):
    """Reliability diagram of a classifier (https://arxiv.org/abs/1706.04599, section 2).

    Attributes:
        counts: images per bin of confidence, [bins]; bin m holds confidences in (m / bins, (m + 1) / bins].
        confidences: mean confidence per bin, [bins]; NaN: no image.
        accuracies: accuracy per bin, [bins]; NaN: no image.
        error: expected calibration error (ECE), equation 3 of the paper.
    """

    counts: np.ndarray
    confidences: np.ndarray
    accuracies: np.ndarray
    error: float


def calibrate(confidences: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """Compute the reliability diagram of confidences [N] in [0, 1] and hits [N] bool."""
    places = np.clip(np.ceil(confidences * bins).astype('int64') - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    with np.errstate(invalid='ignore'):
        means, hits = (np.bincount(places, values, bins) / counts for values in (confidences, correct))
    gaps = np.nan_to_num(np.abs(means - hits)) * counts
    return Calibration(counts, means, hits, float(gaps.sum() / max(counts.sum(), 1)))


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, size: int) -> np.ndarray:
    """Count images by class (row) and predicted class (column), [size, size]."""
    return np.bincount(labels * size + predicted, minlength=size * size).reshape(size, size)


class Confusion(NamedTuple):
    """Number of images of class `label` that are predicted as class `predicted`, of `images` of the class."""

    label: int
    predicted: int
    count: int
    images: int


def most_confused(labels: np.ndarray, predicted: np.ndarray, limit: int) -> list[Confusion]:
    """Return the most frequent confusions, the most frequent first."""
    wrong = np.stack([labels, predicted])[:, labels != predicted]
    pairs, counts = np.unique(wrong, axis=1, return_counts=True)
    order = np.argsort(-counts, kind='stable')[:limit]
    images = np.bincount(labels)
    return [Confusion(*pairs[:, k].tolist(), int(counts[k]), int(images[pairs[0, k]])) for k in order]


def confident_mistakes(labels: np.ndarray, predicted: np.ndarray, confidences: np.ndarray, limit: int) -> np.ndarray:
    """Return the places of the mistakes with the largest confidences, [at most limit], in falling order."""
    wrong = np.flatnonzero(labels != predicted)
    return wrong[np.argsort(-confidences[wrong], kind='stable')][:limit]
