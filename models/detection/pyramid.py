# SPDX-License-Identifier: Apache-2.0
"""ViTDet's simple feature pyramid (https://arxiv.org/abs/2203.16527, section 3), and the LayerNorm of its convolutions."""

from __future__ import annotations

import paddle
from paddle import Tensor, nn
from paddle.nn import initializer

NORM_EPS = 1e-6
HALF = (paddle.float16, paddle.bfloat16)
STRIDES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of p2 to p6, relative to the patch size


class ChannelNorm(nn.Layer):
    """LayerNorm over the channels of each pixel of [B, C, H, W].

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = self.create_parameter([channels], default_initializer=initializer.Constant(1.0))
        self.bias = self.create_parameter([channels], is_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; float32 for half precision, too."""
        x = x.astype('float32') if x.dtype in HALF else x
        centered = x - x.mean(1, keepdim=True)
        x = centered * paddle.rsqrt(centered.square().mean(1, keepdim=True) + NORM_EPS)
        weight, bias = (parameter.astype(x.dtype).reshape([-1, 1, 1]) for parameter in (self.weight, self.bias))
        return x * weight + bias


class ConvNorm(nn.Conv2D):
    """Convolution without bias that keeps the size, LayerNorm over the channels, and ReLU where asked for.

    Args:
        in_channels, out_channels: channels before and after.
        kernel_size: side of the kernel.
        relu: ReLU behind the norm, and its initialization (He et al., fan-out); without, that of PyTorch.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, relu: bool = False):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias_attr=False)
        self.norm = ChannelNorm(out_channels)
        self.relu = relu
        if relu:
            kaiming_normal_(self.weight, out_channels * kernel_size**2)
        else:
            torch_uniform_(self.weight, in_channels * kernel_size**2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H, W]."""
        x = self.norm(nn.Conv2D.forward(self, x))  # `super()` of a subclass recurses without end in exported programs
        return nn.functional.relu(x) if self.relu else x


def simple_pyramid(in_channels: int, channels: int) -> dict[int, nn.Sequential]:
    """Number of a level -> layers from the map of the last block [B, in_channels, H, W] to p2 to p5."""
    half, quarter = in_channels // 2, in_channels // 4
    return {
        2: nn.Sequential(
            double(in_channels, half), ChannelNorm(half), nn.GELU(), double(half, quarter), *_output(quarter, channels)
        ),
        3: nn.Sequential(double(in_channels, half), *_output(half, channels)),
        4: nn.Sequential(*_output(in_channels, channels)),
        5: nn.Sequential(nn.MaxPool2D(2, 2), *_output(in_channels, channels)),
    }


def _output(in_channels: int, channels: int) -> tuple[ConvNorm, ConvNorm]:
    return ConvNorm(in_channels, channels, 1), ConvNorm(channels, channels, 3)


def double(in_channels: int, out_channels: int) -> nn.Conv2DTranspose:
    """Transposed convolution that doubles both sides; weight and bias uniform as PyTorch has it by default."""
    conv = nn.Conv2DTranspose(in_channels, out_channels, 2, 2)
    for parameter in (conv.weight, conv.bias):
        torch_uniform_(parameter, out_channels * 4)
    return conv


# ---------------------------------------------------------------------------------------------------- initialization
def torch_uniform_(parameter: Tensor, fan_in: int) -> None:
    """Uniform in +-sqrt(1 / fan_in), PyTorch's default of convolutions."""
    bound = fan_in**-0.5
    initializer.Uniform(-bound, bound)(parameter)


def kaiming_normal_(parameter: Tensor, fan_out: int) -> None:
    """Normal with variance 2 / fan_out (https://arxiv.org/abs/1502.01852)."""
    initializer.Normal(std=(2.0 / fan_out) ** 0.5)(parameter)
