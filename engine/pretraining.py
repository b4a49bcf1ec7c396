# SPDX-License-Identifier: Apache-2.0
"""Objectives without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from PIL import Image

from config import get_config
from engine.evaluate import Measure
from engine.reconstruction import draw, rebuild
from engine.tasks import TASKS, Task
from models import build_model
from models.mae import MaskedAutoencoder, Reconstruction, check_lessons
from models.pretrained import load_frozen
from models.registry import config_file
from utils.errors import UserError

SHOWN = 8  # validation images in the pictures of a reconstruction


class MaskedTask(Task):
    """Rebuilding removed patches (https://arxiv.org/abs/2111.06377), and thinking like a teacher (MAE-Lite, section 5).

    The teacher sees the patches that the student sees. It is no part of the student, nor of its checkpoints. A validation
    removes the same patches of an image each time: those that (SEED, its index) draws.

    Args:
        config: the tree; SEED, the patch size and TRAIN.MAE_DISTILL are read.
        teacher: a frozen encoder; None: there is none.
    """

    def __init__(self, config, teacher: MaskedAutoencoder | None = None):
        super().__init__(config)
        self.seed = config.SEED
        self.patch_size = config.MODEL.TRANS.PATCH_SIZE
        self.teacher = teacher
        self.alphas = {'attn': config.TRAIN.MAE_DISTILL.ATTN_ALPHA, 'hidden': config.TRAIN.MAE_DISTILL.HIDDEN_ALPHA}
        self.parts: dict[str, paddle.Tensor] = {}
        self.colours = {'mean': config.DATA.IMAGENET_MEAN, 'std': config.DATA.IMAGENET_STD}
        self.shown: tuple[paddle.Tensor, paddle.Tensor] | None = None
        self.measure = Measure({'loss': 'Loss'}, 'loss', self._validation_loss)

    def __call__(self, model: paddle.nn.Layer, images: paddle.Tensor, labels: paddle.Tensor, rng: np.random.Generator):
        """See `Task`; the model is a `MaskedAutoencoder`."""
        output = model(images, self._noise(images, [rng] * len(images)))
        loss = output.loss
        if self.teacher is not None:
            self.parts = self.compare(images, output)
            loss = loss + sum(self.alphas[name] * part for name, part in self.parts.items())
        return loss, paddle.zeros([])

    def compare(self, images: paddle.Tensor, output: Reconstruction) -> dict[str, paddle.Tensor]:
        """Mean squared differences from the teacher, summed over the blocks: `attn` and `hidden`, 0-D."""
        with paddle.no_grad():
            _, attn, hidden = self.teacher.observe(images, output.order[:, : output.seen], self.teacher.lessons)
        pairs = {'attn': zip(output.attn, attn), 'hidden': zip(output.hidden, hidden)}
        differences = {name: [_difference(*pair) for pair in both] for name, both in pairs.items()}
        return {name: sum(values) for name, values in differences.items() if values}

    def notes(self) -> dict[str, float]:
        """The parts of the loss that come from the teacher, without their weights."""
        return {name: part.item() for name, part in self.parts.items()}

    def pictures(self, model: MaskedAutoencoder) -> dict[str, Image.Image]:
        """Some images of the first batch of the validation: as they are, what is seen of them, what is rebuilt."""
        if self.shown is None:
            return {}
        was_training = model.training
        model.eval()
        rows = rebuild(model, *self.shown, **self.colours)
        if was_training:
            model.train()
        return {'reconstruction': draw(rows)}

    def _validation_loss(self, model, images: paddle.Tensor, _, indices: np.ndarray) -> paddle.Tensor:
        noise = self._noise(images, [np.random.default_rng([self.seed, index]) for index in indices.tolist()])
        if self.shown is None:
            stride = max(1, len(images) // SHOWN)  # neighbours are often of one class
            self.shown = images[::stride][:SHOWN], noise[::stride][:SHOWN]
        return (model(images, noise).loss.astype('float64') * len(images)).reshape([1])

    def _noise(self, images: paddle.Tensor, rngs: Sequence[np.random.Generator]) -> paddle.Tensor:
        """[B, L], a row by each generator."""
        patches = images[0, 0].size // self.patch_size**2
        return paddle.to_tensor(np.stack([rng.random(patches, 'float32') for rng in rngs]))


def _difference(student: paddle.Tensor, teacher: paddle.Tensor) -> paddle.Tensor:
    return F.mse_loss(student.astype('float32'), teacher.astype('float32'))


@TASKS.register('mae')
def build_masked(config, model: paddle.nn.Layer, log: Callable[[str], None], training: bool) -> MaskedTask:
    """Masked pre-training."""
    if not isinstance(model, MaskedAutoencoder) or not model.decoder_depth:
        raise UserError('TRAIN.TASK mae needs MODEL.TYPE mae, with a decoder (MODEL.MAE.DECODER_DEPTH).')
    lessons = model.lessons
    return MaskedTask(config, _teacher(config, model, log) if training and (lessons.attn or lessons.hidden) else None)


def _teacher(config, student: MaskedAutoencoder, log: Callable[[str], None]) -> MaskedAutoencoder:
    """The encoder of TRAIN.TEACHER_CFG with the weights TRAIN.TEACHER_MODEL, with the student's lessons to give."""
    train = config.TRAIN
    if train.TEACHER_MODEL is None:
        raise UserError(
            'TRAIN.MAE_DISTILL needs the weights of the teacher: set TRAIN.TEACHER_MODEL (-teacher_model_path).'
        )
    settings = get_config(config_file(train.TEACHER_CFG), ['DATA.IMAGE_SIZE', config.DATA.IMAGE_SIZE])
    settings.defrost()
    settings.MODEL.MAE.DECODER_DEPTH = 0
    teacher = build_model(settings)
    if not isinstance(teacher, MaskedAutoencoder) or teacher.patch_size != student.patch_size:
        raise UserError(
            f"the teacher '{train.TEACHER_CFG}' must be a masked autoencoder with patches of {student.patch_size} pixels."
        )
    check_lessons(student.lessons, teacher.depth)
    load_frozen(teacher, train.TEACHER_MODEL, log)
    teacher.lessons = student.lessons
    return teacher
