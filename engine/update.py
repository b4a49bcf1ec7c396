# SPDX-License-Identifier: Apache-2.0
"""The optimizer step: from the loss of micro-batches to new weights and averages."""

from __future__ import annotations

from paddle import Tensor, nn

from engine.distributed import Context
from engine.ema import ModelEma
from engine.optim import build_optimizer, clip_gradients
from engine.precision import MasterWeights, Precision


class Updater:
    """Accumulates gradients and updates the weights of a model.

    Args:
        config: the resolved configuration.
        model: not wrapped in DataParallel; its parameters are cast to the precision of the run.

    Attributes:
        weights, optimizer: of the model.
        ema: average of the weights, or None (TRAIN.MODEL_EMA).
    """

    def __init__(self, config, model: nn.Layer, precision: Precision):
        self.scaler = precision.scaler
        self.max_norm = config.TRAIN.GRAD_CLIP
        self.weights = MasterWeights(model, precision)
        self.optimizer = build_optimizer(config, model, self.weights.parameters)
        self.ema = ModelEma(model, config.TRAIN.MODEL_EMA_DECAY, self.weights) if config.TRAIN.MODEL_EMA else None

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch."""
        self.scaler.scale(loss).backward()
        self.weights.collect_gradients()

    def clip_sum(self, context: Context) -> Tensor:
        """Clip the gradients accumulated so far, before further micro-batches add to them (TRAIN.ACCUM_MODE ms_mlp).

        Returns their norm before clipping, with the loss scaling.
        """
        self.weights.average_gradients(context)
        return clip_gradients(self.weights.parameters.values(), self.max_norm, self.scaler.factor)

    def clip(self, context: Context) -> Tensor:
        """Finish the gradients: average over the ranks, undo the loss scaling and clip. Return their norm before clipping."""
        self.weights.average_gradients(context)
        self.scaler.unscale_(self.optimizer)
        return clip_gradients(self.weights.parameters.values(), self.max_norm)

    def step(self, lr: float) -> None:
        """Update weights and averages. With loss scaling, a step with overflow updates nothing."""
        self.optimizer.set_lr(lr)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.weights.publish()
        if self.ema is not None:
            self.ema.update()

    def clear_gradients(self) -> None:
        """Drop the gradients."""
        self.optimizer.clear_grad(set_to_zero=False)
