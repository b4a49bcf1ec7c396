# SPDX-License-Identifier: Apache-2.0
"""Linear probe: train a new classifier on the features of a frozen model.

The protocol is that of MoCo v3 (https://arxiv.org/abs/2104.02057, section 5): the backbone is in evaluation mode, and the
classifier starts with weights from N(0, 0.01) and zero biases.
"""

from __future__ import annotations

from collections.abc import Callable

from paddle import nn
from paddle.nn import initializer

from models.base import Classifier
from tasks.base import register_task
from tasks.classification import ClassificationTask
from utils.errors import UserError


@register_task('linear_probe')
class LinearProbeTask(ClassificationTask):
    """Image classification that trains the classifier only. The weights are MODEL.PRETRAINED, also those of pre-training."""

    def attach(self, model: nn.Layer, log: Callable[[str], None], training: bool) -> None:
        """See `Task`; freezes the model except its classifier, which is initialized."""
        super().attach(model, log, training)
        if getattr(type(model), 'forward_head', Classifier.forward_head) is Classifier.forward_head:  # a dense model
            raise UserError(f'TRAIN.TASK linear_probe needs a classifier, but MODEL.TYPE is {self.config.MODEL.TYPE}.')
        if not training:
            return
        for name in model.freeze_backbone():
            parameter = dict(model.named_parameters())[name]
            scheme = initializer.Normal(std=0.01) if parameter.ndim > 1 else initializer.Constant(0.0)
            scheme(parameter)
        log('----- Linear probe: all layers but the classifier are frozen')
