# SPDX-License-Identifier: Apache-2.0
"""Weights of models: convert published ones, load files, match arrays to parameters; what each architecture knows of its own."""
