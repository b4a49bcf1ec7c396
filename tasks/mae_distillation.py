# SPDX-License-Identifier: Apache-2.0
"""Attention and feature distillation in MAE pre-training (MAE-Lite, https://arxiv.org/abs/2205.14443, section 5).

The loss compares attention logits and normalized block inputs of student and teacher. If their sizes differ, or if the
configuration requires it, trained adapters map the student's heads and channels to the teacher's. Adapters are
parameters of the student and part of its checkpoints. The teacher is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.nn import initializer

from config import get_config
from models.layers import Intermediates
from models.mae import MaskedAutoencoder, Reconstruction
from models.registry import config_file
from tasks.distillation import frozen_model, teacher_errors, teacher_images, teacher_options
from utils.errors import UserError


class DistillTargets(NamedTuple):
    """Distillation targets.

    Attributes:
        attn: blocks, from 1, whose attention logits are targets.
        hidden: blocks, from 0, whose normalized inputs are targets; `depth` means the output of the encoder.
    """

    attn: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()

    def request(self, depth: int) -> dict:
        """Return the arguments of `forward_intermediates` for an encoder of `depth` blocks."""
        blocks = sorted({*(block - 1 for block in self.attn), *self.hidden} - {depth})
        return {'indices': blocks, 'want': ('inputs', 'attn_logits')}

    def check(self, depth: int) -> None:
        """Raise UserError for a block that an encoder of `depth` blocks does not have."""
        for key, first, blocks in (('ATTN_IDX', 1, self.attn), ('HIDDEN_IDX', 0, self.hidden)):
            for block in blocks:
                if not first <= block <= depth:
                    raise UserError(f'TRAIN.MAE_DISTILL.{key} names {block}, but must be {first} to {depth}.')


class MaeDistillation:
    """Distillation losses of a student and a frozen teacher, which encode the same visible patches.

    Args:
        student: masked autoencoder with adapters, see `add_adapters`.
        teacher: a frozen masked autoencoder.
        targets: distillation targets.
        adapt: function from the student's images to the teacher's, see `teacher_images`.
    """

    def __init__(
        self,
        student: MaskedAutoencoder,
        teacher: MaskedAutoencoder,
        targets: DistillTargets,
        adapt: Callable[[Tensor], Tensor] = lambda images: images,
    ):
        targets.check(teacher.depth)
        self.teacher, self.targets, self.adapt = teacher, targets, adapt
        self.request = targets.request(student.depth)
        self.adapters = [student.attn_adapter, student.hidden_adapter]

    def losses(self, images: Tensor, output: Reconstruction) -> dict[str, Tensor]:
        """Compute the mean squared errors, summed over the blocks: `attn` and `hidden`, 0-D.

        Args:
            images: normalized, [B, C, H, W].
            output: output of the student for these images, with the intermediates of `request`.
        """
        ids_keep = output.ids_shuffle[:, : output.num_visible]
        with paddle.no_grad():
            theirs = self.teacher.encode_intermediates(
                self.adapt(images), ids_keep, **self.targets.request(self.teacher.depth)
            )
        ours = self.adapted(output.encoder)
        pairs = zip(ours.items(), self._results(theirs).values())
        differences = {name: [_difference(*pair) for pair in zip(mine, other)] for (name, mine), other in pairs}
        return {name: sum(values) for name, values in differences.items() if values}

    def adapted(self, encoder: Intermediates) -> dict[str, list[Tensor]]:
        """Return the student's `attn` and `hidden`, mapped by the adapters to the teacher's sizes."""
        results = self._results(encoder)
        numbers = {'attn': [block - 1 for block in self.targets.attn], 'hidden': self.targets.hidden}
        return {
            name: [_adapt(adapter, number, value) for number, value in zip(numbers[name], results[name])]
            for name, adapter in zip(results, self.adapters)
        }

    def _results(self, encoder: Intermediates) -> dict[str, list[Tensor]]:
        """Return attention logits [B, H, 1 + V, 1 + V] and block inputs [B, 1 + V, C] of the targets."""
        hidden = [encoder.blocks[b].inputs if b in encoder.blocks else encoder.features for b in self.targets.hidden]
        return {'attn': [encoder.blocks[block - 1].attn_logits for block in self.targets.attn], 'hidden': hidden}


def _adapt(adapters: nn.Layer, number: int, value: Tensor) -> Tensor:
    adapter = getattr(adapters, f'adapter{number}', None)
    return value if adapter is None else adapter(value)


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student.astype('float32'), teacher.astype('float32'))


def add_adapters(
    student: MaskedAutoencoder, targets: DistillTargets, num_heads: int | None, embed_dim: int | None
) -> None:
    """Add adapters to the student, as its parameters.

    Args:
        student: masked autoencoder to add the adapters to.
        targets: distillation targets.
        num_heads: number of heads of the teacher; None: no adapters of attention logits.
        embed_dim: channels of the teacher; None: no adapters of block inputs.
    """
    targets.check(student.depth)
    student.attn_adapter, student.hidden_adapter = nn.Layer(), nn.Layer()
    for block in targets.attn if num_heads else ():
        conv = nn.Conv2D(student.num_heads, num_heads, 1, bias_attr=False)
        student.attn_adapter.add_sublayer(f'adapter{block - 1}', _initialized(conv, student.num_heads))
    for block in targets.hidden if embed_dim else ():
        linear = nn.Linear(student.embed_dim, embed_dim, bias_attr=False)
        student.hidden_adapter.add_sublayer(f'adapter{block}', _initialized(linear, student.embed_dim))


def _initialized(layer: nn.Layer, fan_in: int) -> nn.Layer:
    initializer.Uniform(-(fan_in**-0.5), fan_in**-0.5)(layer.weight)
    return layer


def adapt_student(config, student: MaskedAutoencoder) -> DistillTargets | None:
    """Add the adapters that TRAIN.MAE_DISTILL or the sizes of the teacher require.

    Returns:
        Distillation targets; None if TRAIN.MAE_DISTILL is off.

    Raises:
        UserError: no teacher is configured, or a block does not exist.
    """
    distill = config.TRAIN.MAE_DISTILL
    if not (distill.ATTN_IDX or distill.HIDDEN_IDX):
        return None
    if config.TRAIN.TEACHER_CFG is None:
        raise UserError('TRAIN.MAE_DISTILL needs a teacher: set TRAIN.TEACHER_CFG, such as to mae_base_patch16_224.')
    teacher = get_config(config_file(config.TRAIN.TEACHER_CFG)).MODEL.TRANS
    heads = distill.ATTN_ADAPTER or student.num_heads != teacher.NUM_HEADS
    channels = distill.HIDDEN_ADAPTER or student.embed_dim != teacher.EMBED_DIM
    targets = DistillTargets(tuple(distill.ATTN_IDX), tuple(distill.HIDDEN_IDX))
    add_adapters(student, targets, teacher.NUM_HEADS if heads else None, teacher.EMBED_DIM if channels else None)
    return targets


def build_distillation(config, student: MaskedAutoencoder, log: Callable[[str], None]) -> MaeDistillation | None:
    """Add adapters to the student and load the teacher; None if TRAIN.MAE_DISTILL is off."""
    targets = adapt_student(config, student)
    if targets is None:
        return None
    teacher, adapt = _teacher(config, student, log)
    return MaeDistillation(student, teacher, targets, adapt)


def _teacher(config, student: MaskedAutoencoder, log: Callable[[str], None]) -> tuple[MaskedAutoencoder, Callable]:
    """Return the encoder of TRAIN.TEACHER_CFG with weights TRAIN.TEACHER_MODEL, and the function of `teacher_images`."""
    train = config.TRAIN
    if train.TEACHER_MODEL is None:
        raise UserError(
            'TRAIN.MAE_DISTILL needs the weights of the teacher: set TRAIN.TEACHER_MODEL (-teacher_model_path).'
        )
    path = config_file(train.TEACHER_CFG)
    with teacher_errors(config):
        adapt = teacher_images(config, get_config(path), log)
        settings = get_config(path, teacher_options(config))
    settings.defrost()
    settings.MODEL.MAE.DECODER_DEPTH = 0
    if settings.MODEL.TYPE.lower() != 'mae' or student.patch_size != settings.MODEL.TRANS.PATCH_SIZE:
        raise UserError(
            f"the teacher '{train.TEACHER_CFG}' must be a masked autoencoder with patches of {student.patch_size} pixels."
        )
    with teacher_errors(config):
        return frozen_model(settings, train.TEACHER_MODEL, log), adapt
