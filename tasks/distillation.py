# SPDX-License-Identifier: Apache-2.0
"""Teachers: any model of the suite with its weights, or any exported model."""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F

from config import get_config
from models import build_model
from models.mae import MaskedAutoencoder, check_lessons
from models.pretrained import load_frozen
from models.registry import config_file
from utils.errors import UserError


def build_teacher(config, student: paddle.nn.Layer, log: Callable[[str], None]) -> Callable | None:
    """The teacher that TRAIN.TEACHER_CFG and TRAIN.TEACHER_MODEL name; None where DISTILLATION_TYPE is none.

    It is not part of the student: neither its weights nor its state enter a checkpoint.

    Returns:
        A function from normalised images [B, C, H, W] to float32 logits [B, K], without gradients.

    Raises:
        UserError: a student without a second classifier, a teacher that cannot be loaded or knows other classes.
    """
    train = config.TRAIN
    if train.DISTILLATION_TYPE == 'none':
        if getattr(student, 'distilled', False):
            raise UserError(
                'the model has a distillation classifier but no teacher: set TRAIN.DISTILLATION_TYPE to soft or hard, with '
                'TRAIN.TEACHER_CFG and TRAIN.TEACHER_MODEL.'
            )
        return None
    if not getattr(student, 'distilled', False):
        raise UserError(
            f'TRAIN.DISTILLATION_TYPE is {train.DISTILLATION_TYPE}, but {config.MODEL.NAME} has no distillation classifier: '
            'set MODEL.TRANS.DISTILLED to True.'
        )
    if train.TEACHER_MODEL is None:
        raise UserError(
            'distillation needs a teacher: name its weights with TRAIN.TEACHER_MODEL (-teacher_model_path).'
        )
    teacher = _exported(train.TEACHER_MODEL) if train.TEACHER_CFG is None else _registered(config, log)
    teacher.eval()

    @paddle.no_grad()
    def answer(images: paddle.Tensor) -> paddle.Tensor:
        return teacher(images).astype('float32')

    data = config.DATA
    classes = answer(paddle.zeros([1, data.IMAGE_CHANNELS, data.IMAGE_SIZE, data.IMAGE_SIZE])).shape[-1]
    if classes != config.MODEL.NUM_CLASSES:
        raise UserError(f'the teacher knows {classes} classes, but the student {config.MODEL.NUM_CLASSES}.')
    return answer


def _registered(config, log: Callable[[str], None]) -> paddle.nn.Layer:
    settings = get_config(config_file(config.TRAIN.TEACHER_CFG), ['MODEL.NUM_CLASSES', config.MODEL.NUM_CLASSES])
    teacher = build_model(settings)
    load_frozen(teacher, config.TRAIN.TEACHER_MODEL, log)
    return teacher


def _exported(path: str) -> paddle.nn.Layer:
    try:
        return paddle.jit.load(path)
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load the exported teacher '{path}': {reason}. Name a path that tools/export.py wrote, or give the "
            "teacher's configuration with TRAIN.TEACHER_CFG."
        ) from None


def distillation_loss(logits: paddle.Tensor, teacher: paddle.Tensor, kind: str, tau: float = 1.0) -> paddle.Tensor:
    """DeiT, equations 2 and 3, of the student's and the teacher's logits [B, K].

    soft: tau^2 / (B K) * sum p_T (log p_T - log p_S) at temperature tau; divided by B K as in DeiT's code.
    hard: cross entropy with the teacher's decision.
    """
    if kind == 'hard':
        return F.cross_entropy(logits, teacher.argmax(-1))
    expected = F.log_softmax(teacher / tau, axis=-1)
    difference = expected - F.log_softmax(logits / tau, axis=-1)
    return (expected.exp() * difference).sum() * (tau * tau / logits.size)


def load_mae_teacher(config, student: MaskedAutoencoder, log: Callable[[str], None]) -> MaskedAutoencoder:
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
