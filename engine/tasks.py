# SPDX-License-Identifier: Apache-2.0
"""Objectives: what a batch costs. The loop knows nothing else about what is being learnt."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F

from datasets.mixing import Mixup


class SupervisedTask:
    """Classification with label smoothing, mixup and cutmix.

    The loss is soft-target cross entropy, mean_b(-sum_k t_k log p_k), whenever images are mixed, else cross entropy with
    smoothing s, (1 - s) NLL + s mean_k(-log p_k) (timm). Accuracy under mixing is against the first label.
    """

    def __init__(self, config, num_classes: int):
        train = config.TRAIN
        self.smoothing = train.SMOOTHING
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
        """Computes a micro-batch.

        Args:
            images: [B, C, H, W] float32, normalised, on the device.
            labels: [B] int64.
            rng: source of the mixing draws.

        Returns:
            The mean loss over the micro-batch (0-D float32) and the number of correct top-1 answers (0-D float32).
        """
        targets = None
        if self.mixup is not None:
            images, targets = self.mixup(images, labels, rng)
        logits = model(images).astype('float32')
        if targets is None:
            loss = smoothed_cross_entropy(logits, labels, self.smoothing)
        else:
            loss = soft_cross_entropy(logits, targets)
        correct = (logits.detach().argmax(-1) == labels).astype('float32').sum()
        return loss, correct


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
