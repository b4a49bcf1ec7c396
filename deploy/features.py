# SPDX-License-Identifier: Apache-2.0
"""Features of image files: the input of the classifier, or the tokens of the last block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import paddle
from paddle import Tensor, nn

from datasets.batch import Batch
from deploy.inference import FilePrediction, predict_files
from models import build_model
from models.features import extract_features
from models.weights.load import load_pretrained
from tasks import PredictionOptions, build_task
from utils.errors import UserError


class FeatureExtractor:
    """Computes features of batches, with the methods of a task that `predict_files` calls.

    Args:
        config: configuration of the model; its evaluation transform is used.
        tokens: return all tokens [N, C] or maps [h, w, C] of the last block, instead of the pooled features [C].
        normalize: scale pooled features to length 1, as the kNN probe does.
    """

    def __init__(self, config, tokens: bool = False, normalize: bool = False):
        self.transform = build_task(config).transform
        self.tokens, self.normalize = tokens, normalize

    def infer(self, model: nn.Layer, batch: Batch) -> Tensor:
        """Return float32 features of a batch."""
        if self.tokens:
            return model.forward_features(batch.images).astype('float32')
        return extract_features(model, batch.images, self.normalize)

    def predictions(self, outputs: Tensor, options: PredictionOptions) -> list[np.ndarray]:
        """Return an array per image. Raises UserError if a number is not finite."""
        features = outputs.numpy()
        if not np.isfinite(features).all():
            raise UserError('the model computes NaN or infinite features: use other weights, or a higher precision.')
        return list(features)


def load_encoder(config, log: Callable[[str], None] = print) -> nn.Layer:
    """Build a model without classifier and load MODEL.PRETRAINED, the weights of a classifier or of pre-training.

    Raises:
        UserError: the weights do not fit, or the model has no features for a whole image.
    """
    config = config.clone()
    config.defrost()
    config.MODEL.NUM_CLASSES = 0
    model = build_model(config)
    if not hasattr(model, 'forward_head'):
        raise UserError(
            f'MODEL.TYPE {config.MODEL.TYPE} has no features of whole images; give a classifier or an encoder.'
        )
    load_pretrained(model, config.MODEL.PRETRAINED, log=log)
    model.eval()
    return model


def file_features(
    config, model: nn.Layer, paths: Sequence[str], extractor: FeatureExtractor
) -> Iterator[FilePrediction]:
    """Yield the features of each file in order, as the `prediction`; unreadable files have an error instead."""
    with paddle.no_grad():
        yield from predict_files(config, extractor, model, paths, PredictionOptions(1, None))
