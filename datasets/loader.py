# SPDX-License-Identifier: Apache-2.0
"""Data loader: worker processes prepare the batches of an epoch.

A worker gets the indices of a whole batch and writes its pixels into shared memory, so that no pixel is pickled. The seed of
an image is (SEED, epoch, index, repeat), so batches do not depend on the number of workers or ranks, or on a resume.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import multiprocessing
from collections.abc import Iterable, Iterator

import numpy as np

from datasets.cache import cache_images
from datasets.dataset import BadImageError, Images
from datasets.erasing import RandomErasing
from datasets.sample import IMAGE, Sample
from datasets.samplers import EvalSampler, PartSampler, RepeatedSampler, TrainSampler
from datasets.transforms import Transform, build_transform
from datasets.workers import BatchMemory, Job, WorkerPool, WorkerThread
from utils.errors import UserError

_LOG = logging.getLogger(__name__)

# An unreadable training image is replaced by the next one; this many in a row are an error.
_TRIES = 16

_MEMORIES_HERE = 2  # without workers: a batch in use, and the next one


@dataclasses.dataclass
class Batch:
    """A batch of arrays; `datasets.batch.to_device` converts them to tensors.

    Attributes:
        images: [b, H, W, C] uint8, with several views [b, views, H, W, C]; or a list of b images of different sizes.
        targets: by name: an array [b, ...], or a list of b arrays of different sizes.
        indices: [b] int64, indices of the images in the data set.
        erase: random erasing after normalization: unique flat positions [e] int64 in images of layout [b, C, H, W] and
            their values [e] float32; or None.
        skipped: number of unreadable images that were replaced (training) or dropped (evaluation, where b may be 0).
    """

    images: np.ndarray | list
    targets: dict
    indices: np.ndarray
    erase: tuple[np.ndarray, np.ndarray] | None = None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.indices)


@dataclasses.dataclass
class Filled:
    """Result of a worker beside the shared memory: one entry per image, and the messages of skipped images."""

    indices: list[int] = dataclasses.field(default_factory=list)
    erased: list[int] = dataclasses.field(default_factory=list)  # number of erased values
    ragged: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)  # targets without a fixed shape
    skipped: list[str] = dataclasses.field(default_factory=list)


class BatchMaker:
    """Reads, transforms and collates the images of a batch, in a worker process or in the training process."""

    def __init__(
        self, dataset: Images, transform: Transform, training: bool, seed: int, skip: bool, exif_rotate: bool = False
    ):
        self.dataset = dataset
        self.transform = transform
        self.training = training
        self.seed = seed
        self.skip = skip
        self.exif_rotate = exif_rotate
        self.erasing: RandomErasing | None = None
        self.erase_second_half_only = False

    def __call__(self, job: Job, memory: BatchMemory) -> Filled:
        """Fill `memory` with a batch; erased positions are relative to their image."""
        filled = Filled()
        end = 0
        for position, (index, repeat) in enumerate(zip(job.indices.tolist(), job.repeats.tolist())):
            memory.current = index
            found = self._prepare(index, [self.seed, job.epoch, index, repeat], filled.skipped)
            if found is None:
                continue
            index, sample, rng = found
            filled.ragged.append(_write(sample, memory.planes, len(filled.indices)))
            erase = self._erase(position, len(job.indices), rng)
            count = 0
            if erase is not None:
                count = len(erase[0])
                memory.positions[end : end + count], memory.values[end : end + count] = erase
                end += count
            filled.indices.append(index)
            filled.erased.append(count)
        memory.current = -1
        return filled

    def _prepare(self, index: int, seed: list[int], skipped: list[str]):
        """Return (index, transformed sample, random generator) for `index`, or None to drop the image."""
        for step in range(_TRIES if self.training else 1):
            candidate = (index + step) % len(self.dataset)
            rng = np.random.default_rng(seed)
            try:
                with self.dataset.naming(candidate):
                    sample = self.dataset.sample(candidate, self.exif_rotate)
                    return candidate, self.transform(sample, rng), rng
            except BadImageError as error:
                if not self.skip:
                    raise UserError(f'{error} Repair or remove it, or set DATA.BAD_IMAGE to skip.') from None
                skipped.append(str(error))
            except UserError:
                raise
            except Exception as error:
                raise RuntimeError(
                    f"{type(error).__name__} while preparing image '{self.dataset.describe(candidate)}': {error}"
                ) from error
        if self.training:
            raise UserError(f'{_TRIES} images in a row cannot be read; the last one: {skipped[-1]}')
        return None

    def _erase(self, position: int, batch_size: int, rng: np.random.Generator):
        if self.erasing is None or (self.erase_second_half_only and position < batch_size // 2):
            return None
        return self.erasing(self.transform.planes[0].shape, rng)


def _write(sample: Sample, planes: dict[str, np.ndarray], position: int) -> dict[str, np.ndarray]:
    """Copy the arrays of a sample to their planes; return the arrays without a plane."""
    ragged = {}
    for name, array in {IMAGE: sample.image, **sample.arrays()}.items():
        if name in planes:
            planes[name][position] = array
        else:
            ragged[name] = array
    return ragged


class Loader:
    """Iterates over batches; built by `build_dataloader`.

    The first `epoch()` call starts worker processes, which run until `close()` or the end of the `with` block. On Linux they
    end with the thread that made this call.

    Args:
        sampler: chooses the images of this rank in an epoch.
        batch_size: images per rank and batch; the last batch of an epoch may be smaller.
        drop_last: drop an incomplete last batch.
        workers: number of processes; 0 prepares batches in a thread of this process, one ahead.
        prefetch: batches per worker that are prepared in advance.
        timeout: seconds to wait for a batch; 0: no limit.
    """

    def __init__(
        self,
        maker: BatchMaker,
        sampler: TrainSampler | EvalSampler,
        batch_size: int,
        *,
        rank: int = 0,
        drop_last: bool = False,
        workers: int = 0,
        prefetch: int = 2,
        timeout: float = 0.0,
    ):
        if workers and 'fork' not in multiprocessing.get_all_start_methods():
            _LOG.warning('this system cannot fork processes: images are loaded in the training process.')
            workers = 0
        self.dataset = maker.dataset
        self.batch_size = batch_size
        self._maker = maker
        self._sampler = sampler
        self._rank = rank
        self._drop_last = drop_last
        self._workers = workers
        self._prefetch = prefetch
        self._timeout = timeout
        self._thread: WorkerThread | None = None
        self._pool: WorkerPool | None = None
        self._latest = 0
        self._reported: set[str] = set()

    @property
    def num_samples(self) -> int:
        """Images of one epoch over all ranks; in training including the padding to equal numbers per rank."""
        return sum(self._length(rank) for rank in range(self._sampler.world_size))

    @property
    def num_batches(self) -> int:
        """Batches of one epoch on this rank. Equal on all ranks in training; in evaluation they may differ."""
        return -(-self._length(self._rank) // self.batch_size)

    def batch_size_at(self, index: int) -> int:
        """Return the number of images in batch `index` of an epoch over all ranks."""
        begin = index * self.batch_size
        lengths = [self._length(rank) for rank in range(self._sampler.world_size)]
        return sum(min(max(length - begin, 0), self.batch_size) for length in lengths)

    def _length(self, rank: int) -> int:
        return _used(self._sampler.length(rank), self.batch_size, self._drop_last)

    def epoch(self, epoch: int, start_batch: int = 0, borrow: bool = False) -> Iterator[Batch]:
        """Return an iterator over the batches of an epoch from `start_batch` on. Ends the iterator of an earlier call.

        Args:
            borrow: images and targets of fixed shape are views of shared memory, which the next step of the iterator
                overwrites; False: copies.

        Raises (while iterating):
            UserError: an image is unreadable, or a worker died or does not answer; the text names the current images.
        """
        indices, repeats = self._sampler.epoch(epoch, self._rank)
        begins = range(start_batch * self.batch_size, self._length(self._rank), self.batch_size)
        pieces = (slice(begin, begin + self.batch_size) for begin in begins)
        jobs = (Job(epoch, indices[piece], repeats[piece]) for piece in pieces)
        self._latest += 1
        if self._workers == 0:
            return self._only_latest(self._made_here(jobs, borrow), self._latest)
        if self._pool is None or self._pool.closed:
            memories = [self._new_memory() for _ in range(self._workers * self._prefetch)]
            self._pool = WorkerPool(self._maker, memories, self._workers, self._timeout, self.dataset.describe)
        finished = self._pool.run(jobs)
        return self._only_latest((self._collect(*done, borrow) for done in finished), self._latest)

    def _only_latest(self, batches: Iterator[Batch], number: int) -> Iterator[Batch]:
        while True:
            if number != self._latest:
                raise RuntimeError('a newer epoch() or close() call has ended this iterator')
            batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _new_memory(self) -> BatchMemory:
        planes = self._maker.transform.planes
        erasing = 0 if self._maker.erasing is None else math.prod(planes[0].shape)
        return BatchMemory(self.batch_size, planes, erasing)

    def _made_here(self, jobs: Iterable[Job], borrow: bool) -> Iterator[Batch]:
        """Yield the batches of the jobs; a thread prepares the next one meanwhile."""
        if self._thread is None:
            memories = [self._new_memory() for _ in range(_MEMORIES_HERE)]
            self._thread = WorkerThread(self._maker, memories, self._timeout, self.dataset.describe)
        finished = self._thread.run(jobs)
        while True:
            try:
                done = next(finished, None)
            except BaseException:  # after an interrupt or a timeout, the result of this job is still to come
                self._end_thread()
                raise
            if done is None:
                return
            yield self._collect(*done, borrow)

    def _end_thread(self) -> None:
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def _collect(self, filled: Filled, memory: BatchMemory, borrow: bool) -> Batch:
        """Return the batch in the memory, which a worker will use again; with `borrow` without a copy."""
        for message in sorted(set(filled.skipped) - self._reported):
            _LOG.warning('skipped: %s', message)
            self._reported.add(message)
        indices = np.array(filled.indices, dtype=np.int64)
        count = sum(filled.erased)
        erase = None
        if count:
            starts = np.arange(len(indices), dtype=np.int64) * math.prod(self._maker.transform.planes[0].shape)
            erase = memory.positions[:count] + np.repeat(starts, filled.erased), memory.values[:count].copy()
        arrays = {name: plane[: len(indices)] for name, plane in memory.planes.items()}
        if not borrow:
            arrays = {name: array.copy() for name, array in arrays.items()}
        ragged = filled.ragged[0] if filled.ragged else {}
        arrays.update({name: [arrays[name] for arrays in filled.ragged] for name in ragged})
        arrays.update({name: column[indices] for name, column in self.dataset.columns.items()})
        images = arrays.pop(IMAGE, [])
        return Batch(images, targets=arrays, indices=indices, erase=erase, skipped=len(filled.skipped))

    def close(self) -> None:
        """Stop the worker processes. A later `epoch()` starts new ones."""
        self._latest += 1
        self._end_thread()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error) -> None:
        self.close()


def build_dataloader(
    config,
    dataset: Images,
    training: bool,
    rank: int = 0,
    world_size: int = 1,
    transform: Transform | None = None,
) -> Loader:
    """Build the loader that DATA and TRAIN describe, for rank `rank` of `world_size`.

    Args:
        transform: converts a sample to the arrays of a batch, of which the first plane gets random erasing; None: the
            transform of image classification.
    """
    data, train = config.DATA, config.TRAIN
    transform = build_transform(config, training) if transform is None else transform
    if data.CACHE != 'no':
        all_of_it = training and data.CACHE == 'full'
        indices = np.arange(len(dataset)) if all_of_it else np.arange(rank, len(dataset), world_size)
        dataset = cache_images(dataset, indices, show_progress=rank == 0)
    maker = BatchMaker(dataset, transform, training, config.SEED, data.BAD_IMAGE == 'skip', data.EXIF_ROTATE)
    if training and train.RANDOM_ERASE_PROB > 0:
        maker.erasing = RandomErasing(train.RANDOM_ERASE_PROB, train.RANDOM_ERASE_MODE, train.RANDOM_ERASE_COUNT)
        maker.erase_second_half_only = train.RANDOM_ERASE_SPLIT
    sampler = build_sampler(config, len(dataset), training, world_size)
    batch_size = data.BATCH_SIZE if training else data.BATCH_SIZE_EVAL or data.BATCH_SIZE
    loader = Loader(
        maker,
        sampler,
        batch_size,
        rank=rank,
        drop_last=training and train.DROP_LAST,
        workers=data.NUM_WORKERS,
        prefetch=data.PREFETCH,
        timeout=data.TIMEOUT,
    )
    if training and loader.num_batches == 0:
        raise UserError(
            f'{dataset.source} has {len(dataset)} images, fewer than one batch of {batch_size} on each of {world_size} '
            'processes, and TRAIN.DROP_LAST drops incomplete batches; lower DATA.BATCH_SIZE.'
        )
    return loader


def batches_per_epoch(config, size: int, world_size: int) -> int:
    """Return the training batches of an epoch on each process; `size`: number of training images."""
    length, batch_size = build_sampler(config, size, True, world_size).length(0), config.DATA.BATCH_SIZE
    return -(-_used(length, batch_size, config.TRAIN.DROP_LAST) // batch_size)


def _used(length: int, batch_size: int, drop_last: bool) -> int:
    """Return how many of `length` images an epoch uses."""
    return length - length % batch_size if drop_last else length


def build_sampler(config, size: int, training: bool, world_size: int) -> TrainSampler | EvalSampler:
    """Build the sampler that DATA.CACHE and TRAIN describe, for `size` images."""
    if not training:
        return EvalSampler(size, world_size)
    repeats, part = config.TRAIN.REPEATED_AUG, config.DATA.CACHE == 'part'
    if repeats > 1 and part and world_size > 1:
        raise UserError('TRAIN.REPEATED_AUG distributes images over all processes: set DATA.CACHE to full or no.')
    if repeats > 1:
        return RepeatedSampler(size, world_size, config.SEED, repeats)
    if part:
        return PartSampler(size, world_size, config.SEED, config.TRAIN.DROP_LAST)
    return TrainSampler(size, world_size, config.SEED)
