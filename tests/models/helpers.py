# SPDX-License-Identifier: Apache-2.0
"""Upstream PyTorch arrays into our layers, as the weight converter does it."""

import numpy as np
import paddle
from paddle import nn

from config import get_config
from models.layers import EViTSpec, MixerSpec, RemovalSpec, drop_path_rates
from models.registry import config_file
from models.vision_transformer import VisionTransformer
from models.weights.convert import port_state_dict
from models.weights.rules import rules_of


def linear_weights(layer: nn.Layer) -> set[str]:
    """Names of the weights that PyTorch stores transposed."""
    return {
        f'{name}.weight'.lstrip('.')
        for name, part in layer.named_sublayers(include_self=True)
        if isinstance(part, nn.Linear)
    }


def to_ours(layer: nn.Layer, arrays: dict) -> dict:
    """Rename with the layer's `weight_rules`, where it has some, and transpose the weights of linear layers."""
    rename = rules_of(layer).rename
    arrays = {rename(name): array for name, array in arrays.items()}
    transposed = linear_weights(layer)
    return {name: array.T if name in transposed else array for name, array in arrays.items()}


def load(layer: nn.Layer, arrays: dict) -> nn.Layer:
    """Loads upstream arrays; every name and shape must fit."""
    arrays = to_ours(layer, arrays)
    shapes = {name: list(value.shape) for name, value in layer.state_dict().items()}
    assert {name: list(a.shape) for name, a in arrays.items()} == shapes
    layer.set_state_dict({name: paddle.to_tensor(a) for name, a in arrays.items()})
    return layer


def vision_transformer(
    keep_rate=1.0,
    fuse_token: bool = False,
    prune_layers=(),
    done_layers=(),
    removed_layers=(),
    qkv_bias: bool = True,
    key_bias: bool = True,
    attn_drop_rate: float = 0.0,
    relative_positions=(),
    absolute_positions: bool = True,
    drop_path_ramp: bool = True,
    depth: int = 12,
    drop_path_rate: float = 0.0,
    **options,
) -> VisionTransformer:
    """A model from the flat arguments of the original programs, as the reference files list them."""
    positions = {'absolute': absolute_positions, 'shared_relative': 'shared' in relative_positions}
    mixer = 'relative' if 'block' in relative_positions else 'attention'
    return VisionTransformer(
        depth=depth,
        mixer=MixerSpec(mixer, qkv_bias, key_bias, attn_drop_rate),
        reducers=[EViTSpec(keep_rate, fuse_token)],
        removal=RemovalSpec(prune_layers, done_layers, removed_layers),
        positions=[name for name, used in positions.items() if used],
        drop_path_rate=drop_path_rates(drop_path_rate, depth, drop_path_ramp),
        **options,
    )


# Options that shrink an architecture until a test of it takes no time, by MODEL.TYPE.
SMALL = {
    'gmlp': ['DATA.IMAGE_SIZE', 16, 'MODEL.MIXER.PATCH_SIZE', 4, 'MODEL.MIXER.EMBED_DIM', 16, 'MODEL.MIXER.DEPTH', 2],
    'vit': [
        *['DATA.IMAGE_SIZE', 32, 'MODEL.TRANS.PATCH_SIZE', 8, 'MODEL.TRANS.EMBED_DIM', 24, 'MODEL.TRANS.NUM_HEADS', 3],
        *['MODEL.TRANS.DEPTH', 4],
    ],
    'mae': [
        *['DATA.IMAGE_SIZE', 32, 'MODEL.TRANS.PATCH_SIZE', 8, 'MODEL.TRANS.EMBED_DIM', 24, 'MODEL.TRANS.NUM_HEADS', 3],
        *['MODEL.TRANS.DEPTH', 2, 'MODEL.MAE.DECODER_EMBED_DIM', 16, 'MODEL.MAE.DECODER_NUM_HEADS', 2],
        *['MODEL.MAE.DECODER_DEPTH', 1],
    ],
    'mocov3': [
        *['DATA.IMAGE_SIZE', 32, 'MODEL.TRANS.PATCH_SIZE', 8, 'MODEL.TRANS.EMBED_DIM', 24, 'MODEL.TRANS.NUM_HEADS', 3],
        *['MODEL.TRANS.DEPTH', 2, 'MODEL.MOCO.DIM', 8, 'MODEL.MOCO.MLP_DIM', 16],
    ],
    'ms_mlp': ['DATA.IMAGE_SIZE', 64, 'MODEL.MSMLP.EMBED_DIM', 10, 'MODEL.MSMLP.DEPTHS', [1, 1, 2, 1]],
}


def small_config(name: str, *opts):
    """Return the configuration of a tiny model with 5 classes."""
    model = get_config(config_file(name)).MODEL
    layers = tuple(i for i in model.LAMBDA.PRUNE_LAYERS if i < 4)
    reducing = tuple(i for i in (1, 2, 3) if i not in layers)[:2]  # blocks that have the attention for it
    small = [*SMALL[model.TYPE], 'MODEL.NUM_CLASSES', 5]
    if model.TYPE == 'vit':
        small += ['MODEL.LAMBDA.PRUNE_LAYERS', layers, 'MODEL.EVIT.DROP_LOC', reducing]
    return get_config(config_file(name), [*small, *opts])


def images(config, batch: int = 2) -> paddle.Tensor:
    """Random images that the model of a configuration takes."""
    data = config.DATA
    return paddle.randn([batch, data.IMAGE_CHANNELS, data.IMAGE_SIZE, data.IMAGE_SIZE])


def check_recompute(model: nn.Layer, x: paddle.Tensor) -> None:
    """Loss and gradients must be the same to the last bit with gradient checkpointing."""
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        paddle.seed(1)
        loss = model(x).square().mean()
        loss.backward()
        results.append([loss.item(), *(p.grad.numpy() for p in model.parameters())])
        model.clear_gradients()
    for plain, recomputed in zip(*results):
        np.testing.assert_array_equal(plain, recomputed)


def port(layer: nn.Layer, arrays: dict) -> nn.Layer:
    """Loads published arrays by the layer's own rules, as tools/port_weights.py does."""
    state = port_state_dict(layer, arrays)
    layer.set_state_dict({name: paddle.to_tensor(array) for name, array in state.items()})
    return layer
