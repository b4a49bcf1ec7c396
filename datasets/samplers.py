# SPDX-License-Identifier: Apache-2.0
"""Which images a process sees in an epoch, in which order. Pure functions of (seed, epoch, rank)."""

from __future__ import annotations

import numpy as np

from utils.errors import UserError


class TrainSampler:
    """A permutation of the data per epoch, continued from its start to a multiple of the world size, dealt out by rank.

    Batch i of all ranks together holds the same images for any number of processes with the same global batch.
    """

    def __init__(self, size: int, world_size: int, seed: int):
        self.size = size
        self.world_size = world_size
        self.seed = seed

    def length(self, rank: int) -> int:
        """Images of one epoch on `rank`."""
        return -(-self.size // self.world_size)

    def epoch(self, epoch: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices [n] int64 and, for each, how often the epoch drew that image before [n] int64."""
        places = deal(self.size, self.world_size, rank)
        return permutation(self.size, self.seed, epoch)[places % self.size], places // self.size


class RepeatedSampler(TrainSampler):
    """Repeated augmentation, https://arxiv.org/abs/1901.09335, as in DeiT.

    Each image is drawn `repeats` times in a row, the copies augmented independently; an epoch ends after about as many
    samples as there are images (a multiple of 256), so that it sees about a third of the images at 3 repeats.
    """

    GRAIN = 256

    def __init__(self, size: int, world_size: int, seed: int, repeats: int = 3):
        super().__init__(size, world_size, seed)
        self.repeats = repeats
        if self.length(0) == 0:
            raise UserError(
                f'TRAIN.REPEATED_AUG needs at least {max(self.GRAIN, world_size)} training images, but there are {size}; '
                'set it to 0.'
            )

    def length(self, rank: int) -> int:
        return self.size // self.GRAIN * self.GRAIN // self.world_size

    def epoch(self, epoch: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        draws = self.repeats * self.size
        places = deal(draws, self.world_size, rank)[: self.length(rank)] % draws
        return permutation(self.size, self.seed, epoch)[places // self.repeats], places % self.repeats


class PartSampler(TrainSampler):
    """Each rank trains on its own share for ever, the images i with i % world_size == rank, in the order of the epoch's
    permutation (DATA.CACHE part). One process sees what `TrainSampler` gives it.

    Shares differ by one image where the world size does not divide the number of images: with `drop_last` the surplus is left
    out, otherwise ranks without one see their first image again, so that all take equally many steps.
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
        places = np.arange(self.length(rank))
        return own[places % len(own)], places // len(own)


class EvalSampler:
    """Every image exactly once, dealt out by rank without padding: ranks may get unequal numbers."""

    def __init__(self, size: int, world_size: int):
        self.size = size
        self.world_size = world_size

    def length(self, rank: int) -> int:
        return len(range(rank, self.size, self.world_size))

    def epoch(self, epoch: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
        indices = np.arange(rank, self.size, self.world_size)
        return indices, np.zeros_like(indices)


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch, [size] int64."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def deal(count: int, world_size: int, rank: int) -> np.ndarray:
    """Places rank, rank + world_size, ... below the next multiple of `world_size`; those from `count` on start over."""
    return np.arange(rank, -(-count // world_size) * world_size, world_size)
