# SPDX-License-Identifier: Apache-2.0
"""Outputs of the original PyTorch programs, for tools/check_device.py: small models with their weights and inputs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable

import numpy as np
import paddle
from paddle import nn

from models.detection.backbone import ViTDetBackbone
from models.gmlp import GMLP
from models.layers import EViTSpec, MixerSpec
from models.ms_mlp import MSMLP
from models.port import port_state_dict
from models.vision_transformer import VisionTransformer
from utils.errors import UserError

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'tests', 'goldens')


@dataclasses.dataclass(frozen=True)
class Golden:
    """A reference file and the model that computes its output.

    Attributes:
        name: what the check compares.
        file: name of the file, without .npz.
        build: makes the model from the description in the file.
        output: name of the output.
        half: compare half precision, too; not where rounding may change the choice of tokens.
    """

    name: str
    file: str
    build: Callable[[dict], nn.Layer]
    output: str = 'logits'
    half: bool = True

    def load(self) -> tuple[nn.Layer, np.ndarray, np.ndarray]:
        """Return the model with the weights of the file on the current device, the images and the output."""
        path = os.path.join(FOLDER, f'{self.file}.npz')
        if not os.path.exists(path):
            raise UserError(f"'{path}' is missing: run the check in a clone of the repository.")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        model = self.build(json.loads(str(arrays['meta'])))
        weights = {
            name[len('sd/') :]: array
            for name, array in arrays.items()
            if name.startswith('sd/') and not name.endswith('relative_position_index')
        }
        model.set_state_dict({name: paddle.to_tensor(array) for name, array in port_state_dict(model, weights).items()})
        return model, arrays['in/x'], arrays[f'out/{self.output}']


def _transformer(meta: dict, **options) -> VisionTransformer:
    """Build a Vision Transformer from upstream's arguments."""
    known = ('img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'num_classes')
    return VisionTransformer(**{name: meta['ctor'][name] for name in known}, drop_path_rate=0.0, **options)


def _gmlp(meta: dict) -> GMLP:
    sizes = dict(meta['ctor'])
    return GMLP(depth=sizes.pop('num_blocks'), drop_path_rate=0.0, **sizes)


def _ms_mlp(meta: dict) -> MSMLP:
    return MSMLP(**{name: value for name, value in meta['kwargs'].items() if name not in ('img_size', 'shift_size')})


def _tome(meta: dict) -> VisionTransformer:
    model = _transformer(meta)
    model.merge_tokens(5, meta['start_idx'], True)
    return model


def _relative(meta: dict) -> VisionTransformer:
    mixer = MixerSpec('relative', True, False)
    return _transformer(meta, mixer=mixer, layer_scale=0.1, global_pool=True, positions=['absolute'])


class _Level(ViTDetBackbone):
    """The finest level of ViTDet's pyramid."""

    def forward(self, x):
        return super().forward(x)[0]


def _vitdet(meta: dict) -> _Level:
    sizes = meta['config']
    windowed, decomposed = MixerSpec('windowed', options={'size': sizes['window_size']}), MixerSpec('decomposed')
    return _Level(
        sizes['out_channels'], img_size=sizes['img_size'], position_size=sizes['pretrain_img_size'],
        embed_dim=sizes['embed_dim'], depth=sizes['depth'], num_heads=sizes['num_heads'], drop_path_rate=0.0,
        mixer=[windowed if i in sizes['window_block_indexes'] else decomposed for i in range(sizes['depth'])],
    )  # fmt: skip


GOLDENS = (
    Golden('gMLP', 'gmlp-fwd_a', _gmlp),
    Golden('DeiT', 'evit-deit', _transformer),
    Golden('EViT', 'evit-depth4', lambda meta: _transformer(
        meta, reducers=[EViTSpec(meta['ctor']['keep_rate'], True)]), 'fuse/default/logits', half=False),
    Golden('ToMe', 'lambda_vit-tome_deit', _tome, 'prop_logits', half=False),
    Golden('relative positions', 'mae_lite-rpe_layer', _relative),
    Golden('MS-MLP', 'ms_mlp-fwd_alt', _ms_mlp),
    Golden('ViTDet', 'vitdet-backbone', _vitdet, 'p2'),
)  # fmt: skip
