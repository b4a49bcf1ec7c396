# SPDX-License-Identifier: Apache-2.0
"""Layers that several architectures share."""

from models.layers.attention import Attention, AttentionMaps, RelativeAttention
from models.layers.attention_removal import AttentionRemoval, RemovalSpec
from models.layers.basic import LayerNorm, Linear, are_plain, drops, is_on_cpu, operator_replaces
from models.layers.batch_norm import SyncBatchNorm
from models.layers.block import NORM_EPS, Block, check_reducers, rescale_branches
from models.layers.drop_path import DropPath, drop_path_rates
from models.layers.evit import EViTReducer, EViTSpec
from models.layers.init import (
    copy_,
    fan_in,
    fix_,
    init_linear_,
    lecun_normal_,
    scale_,
    shapes_only,
    torch_conv_,
    trunc_normal_,
    xavier_uniform_,
)
from models.layers.intermediates import BlockIntermediates, Intermediates, requested, tokens_to_maps
from models.layers.log_softmax import log_softmax
from models.layers.mixers import MixerSpec, build_mixer, register_mixer
from models.layers.mlp import Mlp, hidden_channels, run_mlp
from models.layers.patch_embed import ConvStem, PatchEmbed, project_patches
from models.layers.positions import computed_table, moco_position_table, resize_position_table, sincos_position_table
from models.layers.recompute import run_block
from models.layers.relative_position import RelativePositionBias, relative_position_index, resize_relative_table
from models.layers.resize import resize_maps, scale_maps
from models.layers.tokens import (
    ReducerSpec,
    TokenReducer,
    TokenState,
    check_keep_rates,
    keep_tokens,
    per_block,
    register_reducer,
    take_tokens,
)
from models.layers.tome import ToMeReducer, ToMeSpec, merge_schedule
from models.layers.windowed_attention import DecomposedAttention, WindowedAttention, resize_decomposed_table

__all__ = [
    'NORM_EPS',
    'Attention',
    'AttentionMaps',
    'AttentionRemoval',
    'Block',
    'BlockIntermediates',
    'ConvStem',
    'DecomposedAttention',
    'DropPath',
    'EViTReducer',
    'EViTSpec',
    'Intermediates',
    'LayerNorm',
    'Linear',
    'MixerSpec',
    'Mlp',
    'PatchEmbed',
    'ReducerSpec',
    'RelativeAttention',
    'RelativePositionBias',
    'RemovalSpec',
    'SyncBatchNorm',
    'ToMeReducer',
    'ToMeSpec',
    'TokenReducer',
    'TokenState',
    'WindowedAttention',
    'are_plain',
    'build_mixer',
    'check_keep_rates',
    'copy_',
    'check_reducers',
    'computed_table',
    'drop_path_rates',
    'drops',
    'fan_in',
    'fix_',
    'hidden_channels',
    'init_linear_',
    'keep_tokens',
    'lecun_normal_',
    'log_softmax',
    'merge_schedule',
    'moco_position_table',
    'is_on_cpu',
    'operator_replaces',
    'per_block',
    'project_patches',
    'register_mixer',
    'register_reducer',
    'relative_position_index',
    'requested',
    'rescale_branches',
    'resize_decomposed_table',
    'resize_maps',
    'resize_position_table',
    'resize_relative_table',
    'run_block',
    'run_mlp',
    'scale_',
    'shapes_only',
    'scale_maps',
    'sincos_position_table',
    'take_tokens',
    'tokens_to_maps',
    'torch_conv_',
    'trunc_normal_',
    'xavier_uniform_',
]
