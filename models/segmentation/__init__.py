# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation: necks and decoders on a Vision Transformer backbone, loss, sliding-window inference."""

from models.segmentation.segmenter import Segmenter
from models.segmentation.upernet import UPerNet

__all__ = ['Segmenter', 'UPerNet']
