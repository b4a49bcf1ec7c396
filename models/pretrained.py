# SPDX-License-Identifier: Apache-2.0
"""Alias of models/weights/load.py."""

from models.weights.load import load_pretrained, load_state

__all__ = ['load_pretrained', 'load_state']
