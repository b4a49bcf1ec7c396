# SPDX-License-Identifier: Apache-2.0
"""The training loop and its parts: state, optimizer, EMA, checkpoints, evaluation, reports, process group, launcher."""
