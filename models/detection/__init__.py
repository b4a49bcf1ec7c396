# SPDX-License-Identifier: Apache-2.0
"""Object detection and instance segmentation: ViTDet with Mask R-CNN."""
