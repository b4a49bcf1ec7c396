# SPDX-License-Identifier: Apache-2.0
"""Decoders of Segmenter (https://arxiv.org/abs/2105.05633) on patch tokens. Parameter names are upstream's."""

from __future__ import annotations

import paddle
from paddle import Tensor, nn
from paddle.nn import initializer

from models.layers import Attention, Block, LayerNorm, Linear, TokenState, init_linear_, tokens_to_maps, trunc_normal_

NORM_EPS = 1e-5


class LinearDecoder(nn.Layer):
    """Linear classifier of each patch.

    Args:
        embed_dim: channels C of a token.
        num_classes: K.
    """

    def __init__(self, embed_dim: int, num_classes: int):
        super().__init__()
        self.embed_dim = embed_dim
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """See `Classifier`."""
        self.head = Linear(self.embed_dim, num_classes)
        trunc_normal_(self.head.weight)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens [B, N, C] -> logits [B, K, *grid]."""
        return tokens_to_maps(self.head(tokens), grid)


class MaskTransformer(nn.Layer):
    """Transformer blocks on patch and class tokens; the logits are their scalar products.

    Args:
        embed_dim: channels C of a token in encoder and decoder.
        num_heads: attention heads.
        num_classes: K.
        depth: number of blocks.
        mlp_ratio: hidden channels of the MLPs / C.
        drop_rate: dropout in the blocks and of the attention weights.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_classes: int,
        depth: int = 2,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        projection = initializer.Normal(std=embed_dim**-0.5)
        self.proj_dec = Linear(embed_dim, embed_dim)
        self.proj_patch = self.create_parameter([embed_dim, embed_dim], default_initializer=projection)
        self.proj_classes = self.create_parameter([embed_dim, embed_dim], default_initializer=projection)
        self.blocks = nn.LayerList(
            Block(
                embed_dim,
                Attention(embed_dim, num_heads, attn_drop_rate=drop_rate, proj_drop_rate=drop_rate),
                mlp_ratio=mlp_ratio,
                drop_rate=drop_rate,
                norm_eps=NORM_EPS,
            )
            for _ in range(depth)
        )
        self.decoder_norm = LayerNorm(embed_dim, epsilon=NORM_EPS)
        self.embed_dim = embed_dim
        self.reset_classifier(num_classes)
        self.apply(init_linear_)

    def reset_classifier(self, num_classes: int) -> None:
        """See `Classifier`; replaces the class tokens and the LayerNorm of the masks."""
        tokens = initializer.TruncatedNormal(std=0.02)
        self.cls_emb = self.create_parameter([1, num_classes, self.embed_dim], default_initializer=tokens)
        self.mask_norm = LayerNorm(num_classes, epsilon=NORM_EPS)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens [B, N, C] -> logits [B, K, *grid]."""
        # Cast to the parameters' type, so that the residual stream stays in float32 under AMP.
        x = self.proj_dec(tokens).astype(self.cls_emb.dtype)
        x = paddle.concat([x, self.cls_emb.expand([x.shape[0], -1, -1])], axis=1)
        state = TokenState(0, x.shape[1])
        for block in self.blocks:
            x, state = block(x, state)
        x = self.decoder_norm(x)
        patches, classes = x[:, : tokens.shape[1]], x[:, tokens.shape[1] :]
        patches, classes = (
            _unit(paddle.matmul(patches, self.proj_patch)),
            _unit(paddle.matmul(classes, self.proj_classes)),
        )
        masks = paddle.matmul(patches, classes, transpose_y=True)
        return tokens_to_maps(self.mask_norm(masks), grid)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(axis=-1, keepdim=True)
