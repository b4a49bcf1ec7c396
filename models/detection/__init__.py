# SPDX-License-Identifier: Apache-2.0
"""Object detection and instance segmentation: ViTDet with Mask R-CNN."""

from models.detection.mask_rcnn import Detections, MaskRCNN, Targets
from models.detection.masks import ImageDetections, postprocess, rasterize

__all__ = ['Detections', 'ImageDetections', 'MaskRCNN', 'Targets', 'postprocess', 'rasterize']
