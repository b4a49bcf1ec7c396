# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation: necks and decoders on the features of the Vision Transformer, their loss, inference in windows."""
