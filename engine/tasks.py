# SPDX-License-Identifier: Apache-2.0
"""Objectives: what a batch costs. The loop knows nothing else about what is being learnt.

A new one is a `Task` and a builder that registers it by the name that TRAIN.TASK takes, in a module that
engine/objectives.py imports:

>>> @TASKS.register('mine')
... def build_mine(config, model, log, training) -> Task: ...
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import paddle.nn.functional as F
from PIL import Image

from datasets.mixing import Mixup
from engine.clocks import build_clocks
from engine.distill import build_teacher
from engine.evaluate import CLASSIFICATION, Measure
from utils.errors import UserError
from utils.registry import Registry

TASKS = Registry('objective (TRAIN.TASK)')


class Task:
    """An objective; what it sets in the model by the run's clock is in engine/clocks.py.

    Attributes:
        measure: what a validation computes. Where `acc1` is in it, training counts correct answers too.
        views: of each training image, which DATA.VIEWS must agree with.
    """

    measure: Measure
    views = 1

    def __init__(self, config):
        if self.views != config.DATA.VIEWS:
            raise UserError(
                f'TRAIN.TASK {config.TRAIN.TASK} trains on {self.views} view(s) of each image: '
                f'set DATA.VIEWS to {self.views}.'
            )
        self.clocks = build_clocks(config)

    def set_time(self, model: paddle.nn.Layer, t: float) -> dict[str, float]:
        """Puts what follows the run's clock into the model; `t` counts epochs since the start, with fractions.

        Returns:
            What to log.
        """
        values = {}
        for clock in self.clocks:
            values[clock.name] = clock.value(t)
            clock.set(model, values[clock.name])
        return values

    def is_final(self, t: float) -> bool:
        """Whether the model is at `t` what it will be at the end: evaluations before that cannot be the best."""
        return all(clock.is_final(t) for clock in self.clocks)

    def notes(self) -> dict[str, float]:
        """What else to log about the last micro-batch of this process."""
        return {}

    def pictures(self, model: paddle.nn.Layer) -> dict[str, Image.Image]:
        """Pictures that a validation leaves, by name; asked of the main process after it."""
        return {}

    def __call__(self, model: paddle.nn.Layer, images: paddle.Tensor, labels: paddle.Tensor, rng: np.random.Generator):
        """Computes a micro-batch.

        Args:
            model: takes images; it may be wrapped for several processes.
            images: [B, C, H, W] float32, normalised, on the device; of several views [B, views, C, H, W].
            labels: [B] int64.
            rng: source of all draws.

        Returns:
            The mean loss over the micro-batch and the number of correct top-1 answers, 0 where there are no answers;
            both 0-D float32.
        """
        raise NotImplementedError


class SupervisedTask(Task):
    """Classification with label smoothing, mixup and cutmix, and distillation from a teacher where there is one.

    The loss is soft-target cross entropy, mean_b(-sum_k t_k log p_k), whenever images are mixed, else cross entropy with
    smoothing s, (1 - s) NLL + s mean_k(-log p_k) (timm). Accuracy under mixing is against the first label.

    Args:
        config: the tree; TRAIN's smoothing, mixing and distillation keys and those of engine/clocks.py are read.
        num_classes: K.
        teacher: see engine/distill.py; images -> logits [B, K].
    """

    measure = CLASSIFICATION

    def __init__(self, config, num_classes: int, teacher: Callable[[paddle.Tensor], paddle.Tensor] | None = None):
        super().__init__(config)
        train = config.TRAIN
        self.smoothing = train.SMOOTHING
        self.teacher = teacher
        self.distillation = {'kind': train.DISTILLATION_TYPE, 'tau': train.DISTILLATION_TAU}
        self.alpha = train.DISTILLATION_ALPHA
        self.mixup = None
        if train.MIXUP_PROB > 0 and (train.MIXUP_ALPHA > 0 or train.CUTMIX_ALPHA > 0 or train.CUTMIX_MINMAX):
            self.mixup = Mixup(
                num_classes=num_classes,
                mixup_alpha=train.MIXUP_ALPHA,
                cutmix_alpha=train.CUTMIX_ALPHA,
                cutmix_minmax=train.CUTMIX_MINMAX,
                prob=train.MIXUP_PROB,
                switch_prob=train.MIXUP_SWITCH_PROB,
                mode=train.MIXUP_MODE,
                smoothing=train.SMOOTHING,
            )

    def __call__(self, model: paddle.nn.Layer, images: paddle.Tensor, labels: paddle.Tensor, rng: np.random.Generator):
        """See `Task`; the model returns logits [B, K], or a pair of class and distillation logits."""
        targets = None
        if self.mixup is not None:
            images, targets = self.mixup(images, labels, rng)
        outputs = model(images)
        logits, distilled = outputs if isinstance(outputs, tuple) else (outputs, None)
        logits = logits.astype('float32')
        if targets is None:
            loss = smoothed_cross_entropy(logits, labels, self.smoothing)
        else:
            loss = soft_cross_entropy(logits, targets)
        if self.teacher is not None:
            teaching = distillation_loss(distilled.astype('float32'), self.teacher(images), **self.distillation)
            loss = (1.0 - self.alpha) * loss + self.alpha * teaching
        correct = (logits.detach().argmax(-1) == labels).astype('float32').sum()
        return loss, correct


@TASKS.register('supervised')
def build_supervised(config, model: paddle.nn.Layer, log: Callable[[str], None], training: bool) -> SupervisedTask:
    """Learning classes, from labels and from the teacher that the configuration names."""
    if not model.num_classes:
        raise UserError(
            f'MODEL.TYPE {config.MODEL.TYPE} has no classes to learn: set TRAIN.TASK to {config.MODEL.TYPE}.'
        )
    return SupervisedTask(config, config.MODEL.NUM_CLASSES, build_teacher(config, model, log) if training else None)


def distillation_loss(logits: paddle.Tensor, teacher: paddle.Tensor, kind: str, tau: float = 1.0) -> paddle.Tensor:
    """DeiT, equations 2 and 3, of the student's and the teacher's logits [B, K].

    soft: tau^2 / (B K) * sum p_T (log p_T - log p_S) at temperature tau; divided by B K as DeiT's code has it.
    hard: cross entropy with the teacher's decision.
    """
    if kind == 'hard':
        return F.cross_entropy(logits, teacher.argmax(-1))
    expected = F.log_softmax(teacher / tau, axis=-1)
    difference = expected - F.log_softmax(logits / tau, axis=-1)
    return (expected.exp() * difference).sum() * (tau * tau / logits.size)


def soft_cross_entropy(logits: paddle.Tensor, targets: paddle.Tensor) -> paddle.Tensor:
    """mean_b(-sum_k t_k log p_k) of logits and targets [B, K]."""
    return -(targets * F.log_softmax(logits, axis=-1)).sum(-1).mean()


def smoothed_cross_entropy(logits: paddle.Tensor, labels: paddle.Tensor, smoothing: float) -> paddle.Tensor:
    """(1 - s) NLL + s mean_k(-log p_k), averaged over the batch, of logits [B, K] and labels [B]."""
    if smoothing == 0.0:
        return F.cross_entropy(logits, labels)
    log_probabilities = F.log_softmax(logits, axis=-1)
    nll = -paddle.take_along_axis(log_probabilities, labels.unsqueeze(-1), axis=-1).squeeze(-1)
    return ((1.0 - smoothing) * nll - smoothing * log_probabilities.mean(-1)).mean()
