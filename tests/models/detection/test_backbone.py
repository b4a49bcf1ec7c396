# SPDX-License-Identifier: Apache-2.0
"""Windowed attention, decomposed relative positions and the pyramid against detectron2's ViTDet."""

import numpy as np
import paddle
import pytest
from paddle import to_tensor

from models.detection.backbone import PatchEncoder, ViTDetBackbone
from models.detection.pyramid import ChannelNorm
from models.layers import MixerSpec, RemovalSpec, attention
from models.layers.positions import resize_position_table
from models.layers.windowed_attention import decomposed_bias, relative_rows, window_merge, window_partition
from models.vision_transformer import VisionTransformer
from tests.conftest import assert_close, golden
from tests.models.detection.helpers import vitdet_mixers
from tests.models.helpers import check_recompute, port
from utils.errors import UserError

SIZES = {'img_size': 48, 'patch_size': 8, 'embed_dim': 16, 'depth': 3, 'num_heads': 2}


# ---------------------------------------------------------------------------------------------------- functions
def test_windows():
    g = golden('vitdet-functions')
    x = to_tensor(g['in/win_x'])
    windows, padded = window_partition(x, g.meta['window_size'])
    np.testing.assert_array_equal(windows, g['out/windows'])
    assert padded == tuple(g['out/pad_hw'])
    np.testing.assert_array_equal(window_merge(windows, padded, x.shape[1:3]), x)


def test_relative_positions():
    g = golden('vitdet-functions')
    for i in range(5):
        rows = relative_rows(to_tensor(g[f'in/relpos{i}']), *g[f'in/relpos{i}_qk'].tolist())
        assert_close(rows, g[f'out/relpos{i}'], 1e-5)
    rows, columns = (relative_rows(to_tensor(g[f'in/rel_{axis}']), n, n) for axis, n in (('h', 3), ('w', 4)))
    bias = decomposed_bias(to_tensor(g['in/q']).unsqueeze(2), rows, columns)
    assert_close(to_tensor(g['in/attn']) + bias.squeeze(1), g['out/attn_biased'], 1e-5)


def test_absolute_positions():
    g = golden('vitdet-functions')
    for i in range(4):
        prefix, height, width = g[f'in/abspos{i}_cls_h_w'].tolist()
        table = to_tensor(g[f'in/abspos{i}'])
        side = round((table.shape[1] - prefix) ** 0.5)
        resized = resize_position_table(table, (side, side), (height, width), prefix)[:, prefix:]
        assert_close(resized.reshape([1, height, width, -1]), g[f'out/abspos{i}'], 1e-5)


def test_channel_norm():
    g = golden('vitdet-functions')
    norm = ChannelNorm(5)
    norm.weight.set_value(g['in/ln_w'])
    norm.bias.set_value(g['in/ln_b'])
    assert_close(norm(to_tensor(g['in/ln_x'])), g['out/ln'], 1e-5)


# ---------------------------------------------------------------------------------------------------- backbone
@pytest.mark.parametrize('fused', [False, True], ids=['operators', 'fused'])
@pytest.mark.parametrize('prefix', ['', 'rect_'])
def test_backbone(prefix, fused, monkeypatch):
    """Also with the attention of a GPU."""
    monkeypatch.setattr(attention, '_fused_kernel', lambda x: fused)
    g = golden('vitdet-backbone')
    sizes = g.meta['config']
    backbone = ViTDetBackbone(
        sizes['out_channels'], img_size=sizes['img_size'], position_size=sizes['pretrain_img_size'],
        embed_dim=sizes['embed_dim'], depth=sizes['depth'], num_heads=sizes['num_heads'], drop_path_rate=0.0,
        mixer=vitdet_mixers(sizes),
    )  # fmt: skip
    port(backbone, g.group('sd')).eval()
    x = to_tensor(g[f'in/{prefix}x'])
    expected = {name: g[f'out/{prefix}{name}'] for name in ('embed', 'last_feat', 'p2', 'p3', 'p4', 'p5', 'p6')}
    assert_close(backbone.net.embed(x).reshape(expected['embed'].shape), expected['embed'])
    seen = backbone.net.forward_intermediates(x, want=['tokens', 'maps'])
    for i, block in seen.blocks.items():
        block_output = g[f'out/{prefix}block{i}']
        assert_close(block.tokens.reshape(block_output.shape), block_output)
    assert_close(seen.blocks[sizes['depth'] - 1].maps, expected['last_feat'])
    for number, level in enumerate(backbone(x), 2):
        assert_close(level, expected[f'p{number}'])


def test_attention_stays_within_its_window():
    mixer = [
        MixerSpec('windowed', options={'size': 3}),
        *[MixerSpec('windowed', options={'size': 4, 'rel_pos': False})] * 2,
    ]
    model = PatchEncoder(position_size=32, mixer=mixer, **SIZES)
    model.eval()
    x = paddle.randn([1, 3, 48, 48])
    changed = x.clone()
    changed[:, :, :8, :8] = 0.0
    first, again = (model.forward_intermediates(image, [0]).blocks[0].tokens for image in (x, changed))
    differs = (first != again).any(-1).reshape([6, 6]).numpy()
    assert differs[:3, :3].all() and differs.sum() == 9
    assert not hasattr(model.blocks[1].attn, 'rel_pos_h') and model.attention_layers() == []


def test_parts_of_other_papers():
    """Blocks without attention, LayerScale, no position embedding, and recomputation."""
    options = {'layer_scale': 0.5, 'removal': RemovalSpec(removed_layers=[1]), 'positions': (), 'drop_path_rate': 0.2}
    mixer = [MixerSpec('windowed', options={'size': 4}), MixerSpec(), MixerSpec('decomposed')]
    model = PatchEncoder(position_size=32, mixer=mixer, **SIZES, **options)
    assert model.pos_embed is None and model.blocks[1].attn is None and model.attention_layers() == [0, 2][1:]

    class Encoder(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.net = model

        def set_grad_checkpointing(self, enable):
            self.net.set_grad_checkpointing(enable)

        def forward(self, x):
            return self.net.forward_features(x)

    check_recompute(Encoder(), paddle.randn([2, 3, 40, 24]))


def test_mistakes():
    for kind in ('windowed', 'decomposed'):
        with pytest.raises(UserError, match='are for models without class token, such as MODEL.TYPE mask_rcnn'):
            VisionTransformer(**SIZES, mixer=MixerSpec(kind))
    model = PatchEncoder(position_size=32, mixer=MixerSpec('decomposed'), **SIZES)
    with pytest.raises(UserError, match='needs all patch tokens, which ToMe merges'):
        model.merge_tokens(2)
    with pytest.raises(UserError, match='need all patch tokens and no other'):
        model.blocks[0].attn(paddle.zeros([1, 5, 16]), grid=None)
