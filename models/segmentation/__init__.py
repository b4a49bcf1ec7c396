# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation: necks and decoders on the features of the Vision Transformer, their loss, inference in windows."""

from models.segmentation.segmenter import Segmenter
from models.segmentation.upernet import UPerNet

__all__ = ['Segmenter', 'UPerNet']
