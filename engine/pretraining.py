# SPDX-License-Identifier: Apache-2.0
"""Objectives without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import paddle

from engine.evaluate import Measure
from engine.tasks import TASKS, Task
from models.mae import MaskedAutoencoder
from utils.errors import UserError


class MaskedTask(Task):
    """Rebuilding removed patches (https://arxiv.org/abs/2111.06377).

    A validation removes the same patches of an image each time: those that (SEED, its index) draws.

    Args:
        config: the tree; SEED and the patch size are read.
    """

    def __init__(self, config):
        super().__init__(config)
        self.seed = config.SEED
        self.patch_size = config.MODEL.TRANS.PATCH_SIZE
        self.measure = Measure({'loss': 'Loss'}, 'loss', self._validation_loss)

    def __call__(self, model: paddle.nn.Layer, images: paddle.Tensor, labels: paddle.Tensor, rng: np.random.Generator):
        """See `Task`; the model is a `MaskedAutoencoder`."""
        loss = model(images, self._noise(images, [rng] * len(images))).loss
        return loss, paddle.zeros([])

    def _validation_loss(self, model, images: paddle.Tensor, _, indices: np.ndarray) -> paddle.Tensor:
        noise = self._noise(images, [np.random.default_rng([self.seed, index]) for index in indices.tolist()])
        return (model(images, noise).loss.astype('float64') * len(images)).reshape([1])

    def _noise(self, images: paddle.Tensor, rngs: Sequence[np.random.Generator]) -> paddle.Tensor:
        """[B, L], a row by each generator."""
        patches = images[0, 0].size // self.patch_size**2
        return paddle.to_tensor(np.stack([rng.random(patches, 'float32') for rng in rngs]))


@TASKS.register('mae')
def build_masked(config, model: paddle.nn.Layer, log: Callable[[str], None], training: bool) -> MaskedTask:
    """Masked pre-training."""
    if not isinstance(model, MaskedAutoencoder) or not model.decoder_depth:
        raise UserError('TRAIN.TASK mae needs MODEL.TYPE mae, with a decoder (MODEL.MAE.DECODER_DEPTH).')
    return MaskedTask(config)
