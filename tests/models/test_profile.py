# SPDX-License-Identifier: Apache-2.0
"""Counting of parameters and multiplications."""

import paddle
import pytest
from paddle import nn

import models.profile
from config import get_config
from models import build_model
from models.profile import Profile, profile, profile_config
from models.registry import config_file
from utils.sizes import image_shape


class Everything(nn.Layer):
    """One of each operation that counts, with sizes that differ."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(4, 6, 3, stride=2, padding=1, groups=2)
        self.up = nn.Conv2DTranspose(6, 5, 2, stride=2)
        self.linear = nn.Linear(5, 7, bias_attr=False)
        self.affine = nn.Linear(7, 7)
        self.mix = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(7)

    def forward(self, x):
        x = self.up(self.conv(x))  # [B, 5, 8, 8]
        x = self.norm(self.affine(self.linear(x.flatten(2).transpose([0, 2, 1]))))  # [B, 64, 7]
        x = paddle.matmul(self.mix.weight, x, transpose_x=True) + self.mix.bias.unsqueeze(-1)
        scores = x @ x.transpose([0, 2, 1])
        return paddle.bmm(scores, x).mean(1)


def test_counts():
    model = Everything()
    model.train()
    cost = profile(model, [2, 4, 8, 8])
    conv = 2 * 6 * 4 * 4 * (2 * 3 * 3)
    up = 2 * 6 * 4 * 4 * (5 * 2 * 2)
    linear = 2 * 64 * 5 * 7 + 2 * 64 * 7 * 7 + 2 * 64 * 64 * 7
    matmul = 2 * (64 * 64 * 7) * 2
    params = (6 * 2 * 9 + 6) + (6 * 5 * 4 + 5) + 35 + (49 + 7) + (64 * 64 + 64) + 14
    assert cost == Profile(params, conv + up + linear + matmul, {'conv': conv + up, 'linear': linear, 'matmul': matmul})
    assert model.training
    assert model(paddle.randn([3, 4, 8, 8])).shape == [3, 7]


SMALL = (
    'gmlp_ti16_224', 'ms_mlp_tiny_patch4_shift5_224', 'deit_tiny_distilled_patch16_224', 'mae_tiny_patch16_224',
    'mocov3_tiny_patch16_224', 'vit_tiny_patch16_224_mae_finetune_improved', 'segment_digits', 'detect_digits',
)  # fmt: skip


@pytest.mark.parametrize('name', SMALL)
def test_models_without_initial_weights(name):
    """A configuration costs what its model costs, and the next model has initial weights again."""
    config = get_config(config_file(name))
    shape = [1, *image_shape(config)]
    cost = profile_config(config, shape)
    model = build_model(config)
    assert cost == profile(model, shape)
    assert any(p.numpy().any() for p in model.parameters())


def test_counts_of_a_gpu_build(monkeypatch):
    """There `F.linear` with a bias is one operator."""
    names = set()
    expected, trace = profile(Everything(), [2, 4, 8, 8]), models.profile._trace

    def traced(*args):
        program = trace(*args)
        names.update(op.name() for op in program.global_block().ops)
        return program

    monkeypatch.setattr(models.profile, '_trace', traced)
    monkeypatch.setattr(paddle, 'is_compiled_with_cuda', lambda: True)
    assert profile(Everything(), [2, 4, 8, 8]) == expected
    assert 'pd_op.linear_v2' in names


def test_unknown_operators_with_matrices_are_not_missed():
    class Distances(nn.Layer):
        def __init__(self):
            super().__init__()
            self.weight = self.create_parameter([4, 4])

        def forward(self, x):
            return paddle.dist(x, self.weight.t())

    with pytest.raises(NotImplementedError, match='cannot count the multiplications of pd_op.dist'):
        profile(Distances(), [1, 3, 4, 4])


def test_unknown_products_are_not_missed():
    class Einsum(nn.Layer):
        def forward(self, x):
            return paddle.einsum('bchw,bchw->bc', x, x)

    with pytest.raises(NotImplementedError, match='einsum'):
        profile(Einsum(), [1, 3, 4, 4])
