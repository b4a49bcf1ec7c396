# SPDX-License-Identifier: Apache-2.0
"""Parts that several architectures share."""

from models.layers.drop_path import DropPath, drop_path_rates
from models.layers.init import lecun_normal_, torch_conv_, trunc_normal_, xavier_uniform_
from models.layers.mlp import Mlp
from models.layers.patch_embed import PatchEmbed
from models.layers.recompute import run_block

__all__ = [
    'DropPath',
    'Mlp',
    'PatchEmbed',
    'drop_path_rates',
    'lecun_normal_',
    'run_block',
    'torch_conv_',
    'trunc_normal_',
    'xavier_uniform_',
]
