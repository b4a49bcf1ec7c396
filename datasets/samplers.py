# SPDX-License-Identifier: Apache-2.0
"""Samplers: the images of a rank in an epoch and their order, as pure functions of (seed, epoch, rank)."""

from __future__ import annotations

import numpy as np

from utils.errors import UserError


class TrainSampler:
    """A random permutation of the data per epoch; rank r of w takes positions r, r + w, ...

    The permutation is padded from its start to a multiple of the world size. The images of global batch i do not depend on
    the world size if the global batch size is the same.
    """

    def __init__(self, size: int, world_size: int, seed: int):
        self.size = size
        self.world_size = world_size
        self.seed = seed

    def length(self, rank: int) -> int:
        """Return the number of images of one epoch on `rank`."""
        return -(-self.size // self.world_size)

    def epoch(self, epoch: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Return indices [n] of integers, and for each the number of earlier draws of that image in the epoch [n] int64."""
        order = permutation(self.size, self.seed, epoch)
        own = np.ascontiguousarray(order[rank :: self.world_size])
        padding = rank_positions(self.length(rank), self.world_size, rank)[len(own) :]
        repeats = np.zeros(self.length(rank), np.int64)
        if len(padding):
            own = np.concatenate([own, order[padding % self.size]])
            repeats[-len(padding) :] = padding // self.size
        return own, repeats


class RepeatedSampler(TrainSampler):
    """Repeated augmentation, https://arxiv.org/abs/1901.09335, as in DeiT.

    Each image is drawn `repeats` times in a row, and each copy is augmented independently. An epoch has about as many samples
    as there are images, rounded down to a multiple of 256, so with 3 repeats it covers a third of the images.
    """

    MULTIPLE = 256

    def __init__(self, size: int, world_size: int, seed: int, repeats: int = 3):
        super().__init__(size, world_size, seed)
        self.repeats = repeats
        if self.length(0) == 0:
            raise UserError(
                f'TRAIN.REPEATED_AUG needs at least {max(self.MULTIPLE, world_size)} training images, but there are {size}; '
                'set it to 0.'
            )

    def length(self, rank: int) -> int:
        return self.size // self.MULTIPLE * self.MULTIPLE // self.world_size

    def epoch(self, epoch: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        positions = rank_positions(self.length(rank), self.world_size, rank) % (self.repeats * self.size)
        return permutation(self.size, self.seed, epoch)[positions // self.repeats], positions % self.repeats


class PartSampler(TrainSampler):
    """Each rank trains only on the images i with i % world_size == rank, in the order of the epoch's permutation.

    For DATA.CACHE part. A single process gets the same order as from `TrainSampler`. If the numbers of images per rank
    differ, `drop_last` drops the surplus; otherwise ranks with fewer images repeat their first one.
    """

    def __init__(self, size: int, world_size: int, seed: int, drop_last: bool):
        super().__init__(size, world_size, seed)
        self.drop_last = drop_last
        if size < world_size:
            raise UserError(f'DATA.CACHE part has {size} images for {world_size} processes; set it to full or no.')

    def length(self, rank: int) -> int:
        return self.size // self.world_size if self.drop_last else super().length(rank)

    def epoch(self, epoch: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(self.size, self.seed, epoch)
        own = order[order % self.world_size == rank]
        positions = np.arange(self.length(rank))
        return own[positions % len(own)], positions // len(own)


class EvalSampler:
    """Every image exactly once: rank r of w takes images r, r + w, ... without padding."""

    def __init__(self, size: int, world_size: int):
        self.size = size
        self.world_size = world_size

    def length(self, rank: int) -> int:
        return len(range(rank, self.size, self.world_size))

    def epoch(self, epoch: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        indices = np.arange(rank, self.size, self.world_size)
        return indices, np.zeros_like(indices)


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch, [size] int32, or int64 where the size needs it; the random numbers are the same."""
    order = np.arange(size, dtype=np.int32 if size < 1 << 31 else np.int64)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


def rank_positions(count: int, world_size: int, rank: int) -> np.ndarray:
    """Return the positions of a rank, rank, rank + world_size, ..., [count]."""
    return np.arange(rank, rank + count * world_size, world_size)
