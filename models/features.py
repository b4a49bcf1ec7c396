# SPDX-License-Identifier: Apache-2.0
"""Features of whole images, for the kNN probe and `tools/extract_features.py`."""

from __future__ import annotations

import paddle.nn.functional as F
from paddle import Tensor, nn


def extract_features(model: nn.Layer, images: Tensor, normalize: bool = True) -> Tensor:
    """Return the input of the classifier for images [B, in_chans, H, W]: [B, C] float32, of length 1 if `normalize`."""
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    if isinstance(features, tuple):  # class and distillation token
        features = sum(features) / len(features)
    features = features.astype('float32')
    return F.normalize(features, axis=-1) if normalize else features
