# SPDX-License-Identifier: Apache-2.0
"""Image classification with label smoothing, mixup, CutMix, and optional knowledge distillation.

Label smoothing and soft targets follow timm; distillation follows DeiT (https://arxiv.org/abs/2012.12877).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

import datasets
from datasets.batch import Batch
from datasets.mixing import Mixup
from models.layers import log_softmax
from tasks.base import Group, Losses, MeanEvaluator, Prediction, PredictionOptions, Task, class_name, register_task
from tasks.distillation import build_teacher, distillation_loss
from tasks.pictures import Shown
from utils.errors import UserError

# With K < 5 classes, acc5 is top-K accuracy.
TITLES = {'loss': 'Loss', 'acc1': 'Acc@1', 'acc5': 'Acc@5'}
_ROUNDING = 1e-5  # of targets


@register_task('supervised')
class ClassificationTask(Task):
    """Image classification.

    With mixup or CutMix, the loss is soft-target cross entropy, mean_b(-sum_k t_k log p_k). Otherwise it is cross
    entropy with label smoothing s, (1 - s) NLL + s mean_k(-log p_k) (timm). The training accuracy uses the first label.
    """

    counts = {'acc1': 'Acc'}
    target_columns = ('label',)
    infers_by_call = True
    teacher: Callable[[Tensor], Tensor] | None = None

    def __init__(self, config):
        super().__init__(config)
        train = config.TRAIN
        self.smoothing = train.SMOOTHING
        self.distillation = {'kind': train.DISTILLATION_TYPE, 'tau': train.DISTILLATION_TAU}
        self.alpha = train.DISTILLATION_ALPHA
        self.mixup: Mixup | None = None

    def attach(self, model: nn.Layer, log: Callable[[str], None], training: bool) -> None:
        """See `Task`; the number of classes is that of the model."""
        if not model.num_classes:
            raise UserError(
                f'MODEL.TYPE {self.config.MODEL.TYPE} has no classifier: set TRAIN.TASK to {self.config.MODEL.TYPE}.'
            )
        self.mixup = _mixup(self.config.TRAIN, model.num_classes)
        if training:
            self.teacher = build_teacher(self.config, model, log)

    def loss(self, model: nn.Layer, batch: Batch, rng: np.random.Generator) -> Losses:
        """See `Task`; the model returns logits [B, K], or a pair of class logits and distillation logits."""
        images, labels, soft_targets = batch.images, batch.targets['label'], None
        if self.mixup is not None:
            images, soft_targets = self.mixup(images, labels, rng)
        outputs = model(images)
        logits, distilled = outputs if isinstance(outputs, tuple) else (outputs, None)
        logits = logits.astype('float32')
        if soft_targets is None:
            loss = smoothed_cross_entropy(logits, labels, self.smoothing)
        else:
            loss = soft_cross_entropy(logits, soft_targets)
        if self.teacher is not None:
            distilled_loss = distillation_loss(distilled.astype('float32'), self.teacher(images), **self.distillation)
            loss = (1.0 - self.alpha) * loss + self.alpha * distilled_loss
        return Losses(loss, counts={'acc1': (logits.detach().argmax(-1) == labels).astype('float32').sum()})

    def training_pictures(
        self, batch: Batch, rng: np.random.Generator, dataset: datasets.Images, count: int
    ) -> list[Shown]:
        """See `Task`; mixed images show all classes of their target, without the share of label smoothing."""
        mixup = _mixup(self.config.TRAIN, self.config.MODEL.NUM_CLASSES)
        if mixup is None:
            return super().training_pictures(batch, rng, dataset, count)
        images, targets = mixup(batch.images, batch.targets['label'], rng)
        smoothed = self.smoothing / targets.shape[-1]
        captions = [_mixed(target, smoothed, dataset) for target in targets[:count].numpy()]
        return [Shown(*shown) for shown in zip(self.pictures_of(images[:count]), captions)]

    def evaluator(self) -> MeanEvaluator:
        """Return an evaluator of mean cross entropy, top-1 and top-5 accuracy as fractions of 1."""
        return ClassificationEvaluator(TITLES, ('acc1', 'max'), classification_sums)

    def targets(self, batch: Batch) -> list[tuple]:
        """Return the label of each image."""
        return [(label,) for label in batch.targets['label'].tolist()]

    def prediction_columns(self, options: PredictionOptions) -> tuple[str, ...]:
        """Return columns for index, name (with class names) and probability of the top-k classes."""
        parts = ('class', 'name', 'probability') if options.class_names else ('class', 'probability')
        topk = min(options.topk, self.config.MODEL.NUM_CLASSES)
        return tuple(f'{part}{rank}' for rank in range(1, topk + 1) for part in parts)

    def predictions(self, outputs: Tensor, options: PredictionOptions) -> list[Prediction]:
        """Return the top-k classes by logits [B, K], and their softmax probabilities."""
        logits = outputs.astype('float32')
        if not paddle.isfinite(logits).all():
            raise UserError('the model computes NaN or infinite logits: use other weights, or a higher precision.')
        probabilities = F.softmax(logits, axis=-1)
        values, indices = paddle.topk(probabilities, min(options.topk, probabilities.shape[-1]), axis=-1)
        return [_prediction(*row, options.class_names) for row in zip(indices.tolist(), values.tolist())]


class ClassificationEvaluator(MeanEvaluator):
    """Means over the images, and the accuracy of each class."""

    def reset(self, model: nn.Layer, group: Group, should_stop: Callable[[], bool]) -> None:
        """See `Evaluator`."""
        super().reset(model, group, should_stop)
        self._num_classes = model.num_classes

    def class_results(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """See `Evaluator`; `precision` is the share of correct ones among the images that are predicted as the class."""
        labels, predicted = (np.array([row[name] for row in rows], 'int64') for name in ('label', 'class1'))
        groups = labels, predicted, labels[labels == predicted]
        counts = (np.bincount(values, minlength=self._num_classes) for values in groups)
        return [
            {
                'acc1': correct / images if images else None,
                'precision': correct / guesses if guesses else None,
                'images': images,
                'predicted': guesses,
                'correct': correct,
            }
            for images, guesses, correct in zip(*(values.tolist() for values in counts))
        ]


def _prediction(classes: list[int], probabilities: list[float], names: Sequence[str] | None) -> Prediction:
    entries = [
        {'class': number, **({'name': names[number]} if names else {}), 'probability': probability}
        for number, probability in zip(classes, probabilities)
    ]
    text = ', '.join(f'{names[k] if names else k} {p:.4f}' for k, p in zip(classes, probabilities))
    return Prediction({'predictions': entries}, tuple(cell for entry in entries for cell in entry.values()), text)


def _mixed(target: np.ndarray, smoothed: float, dataset: datasets.Images) -> str:
    """Describe a soft target [K], 'cat 0.62, dog 0.38'; classes with the value of label smoothing are left out."""
    classes = [index for index in np.argsort(-target, kind='stable')[:2] if target[index] > smoothed + _ROUNDING]
    return ', '.join(f'{class_name(dataset, int(index))} {target[index]:.2f}' for index in classes)


def _mixup(train, num_classes: int) -> Mixup | None:
    if train.MIXUP_PROB == 0 or not (train.MIXUP_ALPHA > 0 or train.CUTMIX_ALPHA > 0 or train.CUTMIX_MINMAX):
        return None
    return Mixup(
        num_classes=num_classes,
        mixup_alpha=train.MIXUP_ALPHA,
        cutmix_alpha=train.CUTMIX_ALPHA,
        cutmix_minmax=train.CUTMIX_MINMAX,
        prob=train.MIXUP_PROB,
        switch_prob=train.MIXUP_SWITCH_PROB,
        mode=train.MIXUP_MODE,
        smoothing=train.SMOOTHING,
    )


def classification_sums(batch: Batch, logits: Tensor) -> Tensor:
    """Return [sum of cross entropies, top-1 hits, top-5 hits] of logits [B, K], float64."""
    logits, labels = logits.astype('float32'), batch.targets['label']
    loss = F.cross_entropy(logits, labels, reduction='sum')
    _, top = paddle.topk(logits, min(5, logits.shape[-1]), axis=-1)
    hits = top == labels.unsqueeze(-1)
    return paddle.stack([x.astype('float64') for x in (loss, hits[:, 0].sum(), hits.sum())])


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute mean_b(-sum_k t_k log p_k) of logits and targets [B, K]."""
    return -(targets * log_softmax(logits)).sum(-1).mean()


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Compute the batch mean of (1 - s) NLL + s mean_k(-log p_k) of logits [B, K] and labels [B]."""
    if smoothing == 0.0:
        return F.cross_entropy(logits, labels)
    log_probabilities = log_softmax(logits)
    nll = -paddle.take_along_axis(log_probabilities, labels.unsqueeze(-1), axis=-1).squeeze(-1)
    return ((1.0 - smoothing) * nll - smoothing * log_probabilities.mean(-1)).mean()
