# SPDX-License-Identifier: Apache-2.0
"""MAE pre-training (https://arxiv.org/abs/2111.06377), optionally with distillation (MAE-Lite, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import paddle
from paddle import Tensor, nn
from PIL import Image

import datasets
from datasets.batch import Batch
from models.mae import MaskedAutoencoder, Reconstruction, random_masks
from tasks.base import Losses, MeanEvaluator, Task, register_task
from tasks.mae_distillation import MaeDistillation, build_distillation
from tasks.mae_pictures import reconstruct
from tasks.pictures import MASKED, Shown, image_grid
from utils.device import upload
from utils.errors import UserError

SHOWN = 8  # validation images in the picture of an evaluation


@register_task('mae')
class MAETask(Task):
    """MAE pre-training. Evaluation masks are fixed per image: their random seed is (SEED, image index)."""

    distillation: MaeDistillation | None = None

    def __init__(self, config):
        super().__init__(config)
        self.patch_size = config.MODEL.TRANS.PATCH_SIZE
        distill = config.TRAIN.MAE_DISTILL
        self.alphas = {'attn': distill.ATTN_ALPHA, 'hidden': distill.HIDDEN_ALPHA}
        blocks = {'attn': distill.ATTN_IDX, 'hidden': distill.HIDDEN_IDX}
        self.parts = {name: name for name, compared in blocks.items() if compared}

    def attach(self, model: nn.Layer, log: Callable[[str], None], training: bool) -> None:
        """See `Task`; distillation adds adapters to the model."""
        if not isinstance(model, MaskedAutoencoder) or not model.decoder_depth:
            raise UserError('TRAIN.TASK mae needs MODEL.TYPE mae, with a decoder (MODEL.MAE.DECODER_DEPTH).')
        if training:
            self.distillation = build_distillation(self.config, model, log)

    def loss(self, model: nn.Layer, batch: Batch, rng: np.random.Generator) -> Losses:
        """See `Task`; the parts are the unweighted distillation losses."""
        request = self.distillation.request if self.distillation else {}
        output = model(batch.images, self._noise(batch.images, [rng] * len(batch)), **request)
        if self.distillation is None:
            return Losses(output.loss, {name: paddle.zeros([]) for name in self.parts})
        parts = self.distillation.losses(batch.images, output)
        return Losses(output.loss + sum(self.alphas[name] * part for name, part in parts.items()), parts)

    def training_pictures(
        self, batch: Batch, rng: np.random.Generator, dataset: datasets.Images, count: int
    ) -> list[Shown]:
        """See `Task`; beside each image its visible patches, the masked ones in gray."""
        noise = self._noise(batch.images, [rng] * len(batch))[:count]
        masked = random_masks(noise, self.config.MODEL.MAE.MASK_RATIO)[-1].numpy()
        shown = super().training_pictures(batch, rng, dataset, count)
        return [Shown([image, self._visible(image, mask)], caption) for ([image], caption), mask in zip(shown, masked)]

    def _visible(self, image: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """Return an image [H, W, 3] with its masked patches, 1 in `masked` [L], in gray."""
        side = self.patch_size
        cells = masked.reshape(image.shape[0] // side, image.shape[1] // side).repeat(side, 0).repeat(side, 1)
        return np.where(cells[..., None] > 0, MASKED, image).astype('uint8')

    def infer(self, model: nn.Layer, batch: Batch) -> tuple[Tensor, Reconstruction]:
        """Return the noise [B, L] that selects the visible patches, and the reconstruction."""
        rngs = [np.random.default_rng([self.config.SEED, index]) for index in batch.indices.tolist()]
        noise = self._noise(batch.images, rngs)
        return noise, model(batch.images, noise)

    def evaluator(self) -> ReconstructionEvaluator:
        """See `Task`."""
        return ReconstructionEvaluator(self.config.DATA)

    def _noise(self, images: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        """Return noise [B, L], one row from each generator."""
        patches = images[0, 0].size // self.patch_size**2
        return upload(np.stack([rng.random(patches, 'float32') for rng in rngs]))


class ReconstructionEvaluator(MeanEvaluator):
    """Mean loss, and a picture of images of the first batch: originals, visible patches, reconstructions.

    Args:
        data: DATA of the configuration, for mean and standard deviation.
    """

    def __init__(self, data):
        super().__init__({'loss': 'Loss'}, ('loss', 'min'))
        self._statistics = {'mean': data.IMAGENET_MEAN, 'std': data.IMAGENET_STD}
        self._shown: tuple[Tensor, Tensor] | None = None

    def sums(self, batch: Batch, outputs: tuple[Tensor, Reconstruction]) -> Tensor:
        """See `MeanEvaluator`."""
        noise, reconstruction = outputs
        if self._shown is None:
            stride = max(1, len(batch) // SHOWN)  # consecutive images are often of the same class
            self._shown = batch.images[::stride][:SHOWN], noise[::stride][:SHOWN]
        return (reconstruction.loss.astype('float64') * len(batch)).reshape([1])

    def pictures(self, model: MaskedAutoencoder) -> dict[str, Image.Image]:
        """See `Evaluator`."""
        if self._shown is None or not model.predicts_pixels:
            return {}
        was_training = model.training
        model.eval()
        rows = reconstruct(model, *self._shown, **self._statistics)
        if was_training:
            model.train()
        return {'reconstruction': image_grid(rows)}
