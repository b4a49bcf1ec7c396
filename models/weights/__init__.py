# SPDX-License-Identifier: Apache-2.0
"""Weights of models: convert published weights, load files, match arrays to parameters, rules of each architecture."""
