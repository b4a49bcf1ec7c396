# SPDX-License-Identifier: Apache-2.0
"""MoCo v3 (https://arxiv.org/abs/2104.02057): symmetric InfoNCE loss between two augmented views of each image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle import Tensor, nn

from datasets.batch import Batch
from datasets.transforms import two_view_transform
from models.features import extract_features
from models.mocov3 import MoCoV3
from tasks.base import Losses, Task, register_task
from tasks.knn import KNNEvaluator
from tasks.model_schedules import MomentumSchedule
from utils.errors import UserError


@register_task('mocov3')
class MoCoV3Task(Task):
    """Contrastive pre-training with the loss l(q1, k2) + l(q2, k1) (algorithm 1 of the paper).

    Negatives are all other images of the micro-batch on all processes, whose batch sizes must be equal. Micro-batches
    of gradient accumulation (TRAIN.ACCUM_ITER) do not share negatives. Validation is a kNN probe.
    """

    views = 2

    def __init__(self, config):
        super().__init__(config)
        if config.AMP and config.AMP_LEVEL == 'O2':
            raise UserError(
                'TRAIN.TASK mocov3 needs AMP_LEVEL O1: half precision rounds updates of the momentum encoder to 0.'
            )
        self.temperature = config.MODEL.MOCO.TEMPERATURE
        self.schedules.append(MomentumSchedule(config.MODEL.MOCO.MOMENTUM, config.TRAIN.NUM_EPOCHS))

    def transform(self, training: bool):
        """See `Task`."""
        return two_view_transform(self.config) if training else super().transform(training)

    def attach(self, model: nn.Layer, log: Callable[[str], None], training: bool) -> None:
        """See `Task`."""
        if not isinstance(model, MoCoV3):
            raise UserError('TRAIN.TASK mocov3 needs MODEL.TYPE mocov3.')
        if training and self.config.DATA.BATCH_SIZE * dist.get_world_size() < 2:
            raise UserError(
                'TRAIN.TASK mocov3 compares each image with the others of its batch, but DATA.BATCH_SIZE is 1 on one '
                'process: set it to 2 or more.'
            )

    def is_final(self, t: float) -> bool:
        """Return False: the kNN accuracy does not predict fine-tuning accuracy, so the last epoch is the best one."""
        return False

    def loss(self, model: nn.Layer, batch: Batch, rng: np.random.Generator) -> Losses:
        """See `Task`."""
        output = model(batch.images)
        with paddle.amp.auto_cast(enable=False):
            loss = info_nce(output.q1, output.k2, self.temperature)
            loss = loss + info_nce(output.q2, output.k1, self.temperature)
        return Losses(loss)

    def infer(self, model: nn.Layer, batch: Batch) -> Tensor:
        """Return features [B, C] of the base encoder."""
        return extract_features(model, batch.images)

    def evaluator(self) -> KNNEvaluator:
        """See `Task`."""
        return KNNEvaluator(self.config, self.transform(training=False))


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Compute InfoNCE in float32, with the factor 2 tau of MoCo v3: each query is classified among all keys.

    Args:
        queries: [B, dim].
        keys: [B, dim], without gradient; B is equal on all processes.
        temperature: tau, the divisor of the cosine similarities.
    """
    queries, keys = (F.normalize(x.astype('float32'), axis=-1) for x in (queries, keys))
    keys, first = _gather(keys)
    logits = paddle.matmul(queries, keys, transpose_y=True) / temperature
    return F.cross_entropy(logits, first + paddle.arange(len(queries))) * (2 * temperature)


def _gather(keys: Tensor) -> tuple[Tensor, int]:
    """All-gather keys [B, dim] in the order of ranks; return also the index of the first key of this rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return keys, 0
    parts: list[Tensor] = []
    dist.all_gather(parts, keys.detach())
    return paddle.concat(parts), len(keys) * dist.get_rank()
