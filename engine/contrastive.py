# SPDX-License-Identifier: Apache-2.0
"""MoCo-v3's objective: to tell an image from all others by another view of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F

from engine.clocks import MomentumClock
from engine.neighbours import NeighbourProbe
from engine.tasks import TASKS, Task
from models.mocov3 import MoCoV3
from utils.errors import UserError


class ContrastiveTask(Task):
    """The symmetric loss of two views (https://arxiv.org/abs/2104.02057, algorithm 1), l(q1, k2) + l(q2, k1).

    The other images are those of the micro-batch on all processes, which must be equally many on each; those of other
    micro-batches of a step (TRAIN.ACCUM_ITER) are not among them. Validations classify by nearest neighbours.

    Args:
        config: the tree; MODEL.MOCO, TRAIN.NUM_EPOCHS and DATA are read.
    """

    views = 2

    def __init__(self, config):
        super().__init__(config)
        self.temperature = config.MODEL.MOCO.TEMPERATURE
        self.clocks.append(MomentumClock(config.MODEL.MOCO.MOMENTUM, config.TRAIN.NUM_EPOCHS))
        self.measure = NeighbourProbe(config).measure

    def is_final(self, t: float) -> bool:
        """Never before the end: neighbours say too little about fine-tuning to choose weights by."""
        return False

    def __call__(self, model: paddle.nn.Layer, images: paddle.Tensor, labels: paddle.Tensor, rng: np.random.Generator):
        """See `Task`; images are views [B, 2, C, H, W], and the model is a `MoCoV3`."""
        output = model(images)
        with paddle.amp.auto_cast(enable=False):
            loss = contrastive_loss(output.q1, output.k2, self.temperature)
            loss = loss + contrastive_loss(output.q2, output.k1, self.temperature)
        return loss, paddle.zeros([])


def contrastive_loss(queries: paddle.Tensor, keys: paddle.Tensor, temperature: float) -> paddle.Tensor:
    """2 tau times the mean cross entropy of finding the key of each query among those of all processes, in float32.

    Args:
        queries: [B, dim].
        keys: [B, dim], which get no gradient; B is the same on all processes.
        temperature: tau, which the cosine similarities are divided by.
    """
    queries, keys = (F.normalize(x.astype('float32'), axis=-1) for x in (queries, keys))
    keys, first = _of_all_processes(keys)
    logits = paddle.matmul(queries, keys, transpose_y=True) / temperature
    return F.cross_entropy(logits, first + paddle.arange(len(queries))) * (2 * temperature)


def _of_all_processes(keys: paddle.Tensor) -> tuple[paddle.Tensor, int]:
    """Keys [B, dim] of all processes in the order of their ranks, and the place of this one's first."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return keys, 0
    parts: list[paddle.Tensor] = []
    dist.all_gather(parts, keys.detach())
    return paddle.concat(parts), len(keys) * dist.get_rank()


@TASKS.register('mocov3')
def build_contrastive(config, model: paddle.nn.Layer, log: Callable[[str], None], training: bool) -> ContrastiveTask:
    """Contrastive pre-training."""
    if not isinstance(model, MoCoV3):
        raise UserError('TRAIN.TASK mocov3 needs MODEL.TYPE mocov3.')
    if config.AMP and config.AMP_LEVEL == 'O2':
        raise UserError(
            'TRAIN.TASK mocov3 needs AMP_LEVEL O1: in half precision the steps of the momentum encoder are lost.'
        )
    return ContrastiveTask(config)
