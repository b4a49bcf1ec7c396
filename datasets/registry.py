# SPDX-License-Identifier: Apache-2.0
"""Registry of data sets by their `DATA.DATASET` name."""

from utils.registry import Registry

DATASETS = Registry('data set')
register_dataset = DATASETS.register
