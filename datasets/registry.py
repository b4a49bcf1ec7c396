# SPDX-License-Identifier: Apache-2.0
"""Where data sets are filed under their `DATA.DATASET` name."""

from utils.registry import Registry

DATASETS = Registry('data set')
register_dataset = DATASETS.register
