# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation from a teacher: any model of the suite with its weights, or any exported model."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import paddle
import paddle.nn.functional as F

from config import get_config
from models import build_model
from models.exported import PREPROCESS, PROGRAM, WEIGHTS, check_files
from models.layers import log_softmax
from models.registry import config_file
from models.weights.load import load_frozen
from utils.errors import UserError
from utils.files import read_regular
from utils.sizes import image_shape, image_size, size_argument, size_text

LEGACY = '.pdmodel'  # suffix of programs of Paddle 2, which are refused
MAX_PREPROCESS = 1 << 20  # bytes
_LARGEST = 1e6  # of a number of the preprocessing


def build_teacher(config, student: paddle.nn.Layer, log: Callable[[str], None]) -> Callable | None:
    """Build the teacher of TRAIN.TEACHER_CFG and TRAIN.TEACHER_MODEL; None if DISTILLATION_TYPE is none.

    The teacher is not part of the student, and so not in its checkpoints.

    Returns:
        A function from normalized images [B, C, H, W] to float32 logits [B, K], without gradients.

    Raises:
        UserError: a student without a distillation classifier, or a teacher that cannot be loaded or has other classes.
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
        raise UserError('distillation needs a teacher: set TRAIN.TEACHER_MODEL (-teacher_model_path) to its weights.')
    with teacher_errors(config):
        teacher, adapt = _exported(config) if train.TEACHER_CFG is None else _registered(config, log)
    teacher.eval()

    @paddle.no_grad()
    def teacher_logits(images: paddle.Tensor) -> paddle.Tensor:
        return teacher(adapt(images)).astype('float32')

    classes = teacher_logits(paddle.zeros([1, *image_shape(config)])).shape[-1]
    if classes != config.MODEL.NUM_CLASSES:
        raise UserError(
            f'the teacher has {classes} classes, but the student {config.MODEL.NUM_CLASSES}: set MODEL.NUM_CLASSES, or '
            'use a teacher with the same classes (TRAIN.TEACHER_MODEL, TRAIN.TEACHER_CFG).'
        )
    return teacher_logits


@contextlib.contextmanager
def teacher_errors(config) -> Iterator[None]:
    """Add to each UserError of the context that it is about the teacher."""
    try:
        yield
    except UserError as error:
        named = config.TRAIN.TEACHER_CFG
        keys = f" Keys of its model belong to TRAIN.TEACHER_CFG '{named}'." if named and 'MODEL.' in str(error) else ''
        raise UserError(f'teacher (TRAIN.TEACHER_MODEL): {error}{keys}') from None


def teacher_images(config, settings, log: Callable[[str], None]) -> Callable[[paddle.Tensor], paddle.Tensor]:
    """Return a function that converts the student's normalized images [B, C, H, W] to the teacher's normalization.

    Args:
        config: configuration of the student.
        settings: configuration of the teacher.
        log: called with each message.

    Raises:
        UserError: another number of image channels.
    """
    data, theirs = config.DATA, settings.DATA
    if theirs.IMAGE_SIZE != data.IMAGE_SIZE:
        ours, built = size_text(data.IMAGE_SIZE), size_text(theirs.IMAGE_SIZE)
        log(f"----- Teacher: built for the student's {ours} pixels instead of {built}.")
    return _renormalized(data, theirs.IMAGE_CHANNELS, theirs.IMAGENET_MEAN, theirs.IMAGENET_STD)


def teacher_options(config) -> list:
    """Return the options that the teacher takes from the student: the image size."""
    return ['DATA.IMAGE_SIZE', config.DATA.IMAGE_SIZE]


def _renormalized(data, channels: int, mean, std) -> Callable[[paddle.Tensor], paddle.Tensor]:
    """Return a function from images with the student's normalization to another mean and std, on the device."""
    if channels != data.IMAGE_CHANNELS:
        raise UserError(
            f'the teacher takes images of {channels} channels, but the student of {data.IMAGE_CHANNELS}; set '
            'DATA.IMAGE_CHANNELS, or use another teacher.'
        )
    ours = [*data.IMAGENET_MEAN[:channels]], [*data.IMAGENET_STD[:channels]]
    if ours == ([*mean[:channels]], [*std[:channels]]):
        return lambda images: images
    pairs = list(zip(*ours, mean, std))
    scale = paddle.to_tensor([s / t for _, s, _, t in pairs], 'float32').reshape([-1, 1, 1])
    shift = paddle.to_tensor([(m - n) / t for m, _, n, t in pairs], 'float32').reshape([-1, 1, 1])
    return lambda images: images.astype('float32') * scale + shift


def _registered(config, log: Callable[[str], None]) -> tuple[paddle.nn.Layer, Callable]:
    """Return the teacher of TRAIN.TEACHER_CFG for the student's image size, and the function of `teacher_images`."""
    path = config_file(config.TRAIN.TEACHER_CFG)
    adapt = teacher_images(config, get_config(path), log)
    settings = get_config(path, ['MODEL.NUM_CLASSES', config.MODEL.NUM_CLASSES, *teacher_options(config)])
    return frozen_model(settings, config.TRAIN.TEACHER_MODEL, log), adapt


def frozen_model(settings, weights: str, log: Callable[[str], None]) -> paddle.nn.Layer:
    """Build a model with frozen weights. This does not change the random state of the run."""
    state = paddle.get_rng_state()
    model = build_model(settings)
    paddle.set_rng_state(state)
    load_frozen(model, weights, log)
    return model


# ---------------------------------------------------------------------------------------------------- exported teachers
def _exported(config) -> tuple[paddle.nn.Layer, Callable]:
    """Return an exported program, and its preprocessing from the JSON file next to it."""
    path = config.TRAIN.TEACHER_MODEL
    prefix = _find_program(path)
    adapt = _preprocessing(config, prefix)
    try:
        check_files(prefix)
        teacher = _load_program(prefix)
        with paddle.no_grad():
            teacher(adapt(paddle.zeros([1, *image_shape(config)]))).astype('float32')
    except Exception as error:  # programs of others can raise any exception
        reason = getattr(error, 'strerror', None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load the exported teacher '{path}': {reason}. Set TRAIN.TEACHER_MODEL to a path that "
            "tools/export.py wrote, or TRAIN.TEACHER_CFG to the teacher's configuration."
        ) from None
    return teacher, adapt


def _find_program(path: str) -> str:
    """Return the path without suffix of TEACHER_MODEL, which may also be a folder."""
    path = os.path.expanduser(path)
    stem = next((path[: -len(end)] for end in (PREPROCESS, PROGRAM, LEGACY, WEIGHTS) if path.endswith(end)), path)
    for prefix in dict.fromkeys([path, stem]):
        if os.path.exists(prefix + PROGRAM) and os.path.exists(prefix + WEIGHTS):
            return prefix
    if os.path.exists(stem + LEGACY):
        raise UserError(
            f"the exported teacher '{stem}{LEGACY}' is a program of Paddle 2, which is not loaded since such programs can run "
            'code; export the teacher again with tools/export.py.'
        )
    folder = path if os.path.isdir(path) else ''
    names = sorted(name[: -len(WEIGHTS)] for name in os.listdir(folder) if name.endswith(WEIGHTS)) if folder else []
    if len(names) == 1:
        return _find_program(os.path.join(path, names[0]))
    found = f"; '{path}' contains {', '.join(names)}: choose one of them" if names else ''
    raise UserError(
        f"cannot load the exported teacher '{path}': there is no '{stem}{PROGRAM}' with '{stem}{WEIGHTS}'{found}. Set "
        "TRAIN.TEACHER_MODEL to a path that tools/export.py wrote, or TRAIN.TEACHER_CFG to the teacher's configuration."
    )


def _load_program(prefix: str) -> paddle.nn.Layer:
    """Load the two files from a folder of their own: `paddle.jit.load` would load all files with the same prefix."""
    with tempfile.TemporaryDirectory(prefix='teacher-') as folder:
        for suffix in (PROGRAM, WEIGHTS):
            os.symlink(os.path.abspath(prefix + suffix), os.path.join(folder, f'program{suffix}'))
        return paddle.jit.load(os.path.join(folder, 'program'))


def _preprocessing(config, prefix: str) -> Callable[[paddle.Tensor], paddle.Tensor]:
    """Return the preprocessing of PREFIX.preprocess.json (tools/export.py); without this file, the identity."""
    path, data = prefix + PREPROCESS, config.DATA
    try:
        content = json.loads(read_regular(path, MAX_PREPROCESS))
        channels = content['input']['shape'][1]
        size, mean, std = content['image_size'], content['mean'], content['std']
        sides = size if isinstance(size, list) else [size, size]
        valid = all(_is_finite(value) for value in (*sides, channels, *mean, *std)) and 0 not in std and len(sides) == 2
    except FileNotFoundError:
        return lambda images: images
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        valid = False
    if not valid or min(len(mean), len(std)) != channels:
        raise UserError(f"'{path}' does not describe the images of the teacher; export the teacher again.")
    if tuple(sides) != image_size(config):
        raise UserError(
            f"the exported teacher '{prefix}' takes images of {size_text(sides)} pixels, but the student of "
            f'{size_text(data.IMAGE_SIZE)}; export it with -image_size {size_argument(data.IMAGE_SIZE)}, or set '
            f'DATA.IMAGE_SIZE to {size_argument(sides)}.'
        )
    return _renormalized(data, channels, mean, std)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST


def distillation_loss(logits: paddle.Tensor, teacher: paddle.Tensor, kind: str, tau: float = 1.0) -> paddle.Tensor:
    """Compute the distillation loss of the student's and the teacher's logits [B, K] (DeiT, equations 2 and 3).

    soft: tau^2 / (B K) * sum p_T (log p_T - log p_S) at temperature tau; divided by B K as in DeiT's code.
    hard: cross entropy with the teacher's predicted classes.
    """
    if kind == 'hard':
        return F.cross_entropy(logits, teacher.argmax(-1))
    expected = log_softmax(teacher / tau)
    difference = expected - log_softmax(logits / tau)
    return (expected.exp() * difference).sum() * (tau * tau / logits.size)
