# SPDX-License-Identifier: Apache-2.0
"""Deployment: inference with trained models."""
