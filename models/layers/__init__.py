# SPDX-License-Identifier: Apache-2.0
"""Parts that several architectures share."""

from models.layers.attention import Attention, AttentionMaps
from models.layers.batch_norm import SyncBatchNorm
from models.layers.block import NORM_EPS, Block
from models.layers.drop_path import DropPath, drop_path_rates
from models.layers.init import fix_, lecun_normal_, torch_conv_, trunc_normal_, xavier_uniform_
from models.layers.mlp import Mlp
from models.layers.patch_embed import PatchEmbed
from models.layers.positions import computed_table, moco_position_table, resize_position_table, sincos_position_table
from models.layers.recompute import run_block
from models.layers.relative_position import RelativePositionBias, relative_position_index, resize_relative_table
from models.layers.token_reduction import EViTReducer, TokenState, take_tokens
from models.layers.tome import ToMeReducer, merge_schedule

__all__ = [
    'NORM_EPS',
    'Block',
    'RelativePositionBias',
    'relative_position_index',
    'resize_relative_table',
    'Attention',
    'AttentionMaps',
    'DropPath',
    'EViTReducer',
    'Mlp',
    'PatchEmbed',
    'SyncBatchNorm',
    'ToMeReducer',
    'TokenState',
    'drop_path_rates',
    'computed_table',
    'fix_',
    'lecun_normal_',
    'merge_schedule',
    'moco_position_table',
    'resize_position_table',
    'run_block',
    'sincos_position_table',
    'take_tokens',
    'torch_conv_',
    'trunc_normal_',
    'xavier_uniform_',
]
