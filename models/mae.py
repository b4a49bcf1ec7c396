# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoders: "Masked Autoencoders Are Scalable Vision Learners", https://arxiv.org/abs/2111.06377.

`VisionTransformer` encodes the visible patches (a quarter by default); a small decoder reconstructs the pixels of the
masked patches. Light encoders follow "A Closer Look at Self-Supervised Lightweight Vision Transformers" (MAE-Lite),
https://arxiv.org/abs/2205.14443. Parameter names are upstream's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import initializer

from models.layers import (
    NORM_EPS,
    Attention,
    Block,
    Intermediates,
    LayerNorm,
    Linear,
    TokenState,
    computed_table,
    fan_in,
    fix_,
    requested,
    resize_position_table,
    run_block,
    sincos_position_table,
    take_tokens,
    xavier_uniform_,
)
from models.options import pretraining_options
from models.registry import register_model
from models.vision_transformer import VisionTransformer
from models.weights.rules import Grid
from models.weights.transformer import ADAPTER_PARTS, DECODER_PARTS, TransformerWeights
from utils.errors import UserError

TARGET_EPS = 1e-6


class Reconstruction(NamedTuple):
    """Output of the autoencoder.

    Attributes:
        loss: mean squared error over the masked patches, 0-D float32.
        pred: reconstructed patches [B, L, P * P * in_chans], normalized patches with `norm_pix_loss`; or what else
            `MaskedAutoencoder.targets` returns.
        mask: 1: masked patch, 0: visible patch, [B, L] in row-major order.
        ids_shuffle: patch indices sorted by noise, [B, L] int64; the first `num_visible` are visible.
        num_visible: number of visible patches.
        encoder: output and intermediates of the encoder.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor
    ids_shuffle: Tensor
    num_visible: int
    encoder: Intermediates


class MaeWeights(TransformerWeights):
    """Rules of masked autoencoders."""

    optional_parts = ()

    def metadata(self, model) -> dict:
        """Return the number of heads of encoder and decoder."""
        metadata = super().metadata(model)
        if model.decoder_depth:
            metadata['MODEL.MAE.DECODER_NUM_HEADS'] = model.decoder_blocks[0].attn.num_heads
        return metadata

    def resize(self, model, name: str, array: np.ndarray, grid: Grid | None = None) -> np.ndarray:
        """Compute position embeddings of another resolution instead of interpolating them."""
        fixed = {'pos_embed': model.pos_embed, 'decoder_pos_embed': getattr(model, 'decoder_pos_embed', None)}.get(name)
        return array if fixed is None else computed_table(fixed, array)

    def unused(self, model, arrays: Mapping[str, np.ndarray], source: str) -> dict[str, str]:
        """Return the decoder and the distillation adapters of the file if the model has none."""
        unused, ours = super().unused(model, arrays, source), set(model.state_dict())
        if not model.decoder_depth:
            unused.update({name: 'the model has no decoder' for name in arrays if name.startswith(DECODER_PARTS)})
        adapters = [name for name in arrays if name.startswith(ADAPTER_PARTS) and name not in ours]
        return {**unused, **dict.fromkeys(adapters, 'the model has no adapter to a teacher')}


class MaskedAutoencoder(VisionTransformer):
    """A Vision Transformer without classifier, and a decoder.

    Both sine-cosine position embeddings are fixed: part of the state dict, but not trained.

    Args:
        decoder_embed_dim: channels of the decoder.
        decoder_depth: number of decoder blocks; 0: no decoder, so that only `encode` works.
        decoder_num_heads: attention heads of the decoder.
        mask_ratio: fraction of the patches to mask.
        norm_pix_loss: reconstruct patches normalized by their own mean and variance.
        decoder_pred_dim: predicted values of each patch, for a subclass with its own `targets`; None: P * P * in_chans.
        encoder: further arguments of `VisionTransformer`.
    """

    stem_names = (*VisionTransformer.stem_names, 'mask_token')
    weight_rules = MaeWeights()

    def __init__(
        self,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_pred_dim: int | None = None,
        **encoder,
    ):
        if 'conv_stem' in encoder.get('variants', ()):
            raise UserError('a masked autoencoder has no convolutional stem: it would mix masked and visible patches.')
        super().__init__(num_classes=0, **{'drop_path_rate': 0.0, **encoder})
        self.patch_size, self.in_chans = self.patch_embed.patch_size, encoder.get('in_chans', 3)
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        visible = num_visible(self.patch_embed.num_patches, mask_ratio)
        if not 1 <= visible < self.patch_embed.num_patches:
            raise UserError(
                f'the mask ratio {mask_ratio} (MODEL.MAE.MASK_RATIO) leaves no visible or no masked patch: change it.'
            )
        fix_(self.pos_embed, sincos_position_table(self.embed_dim, self.patch_embed.grid_size, self.num_prefix))
        initializer.Normal(std=0.02)(self.cls_token)
        self.decoder_depth = decoder_depth
        if decoder_depth:
            mlp_ratio = encoder.get('mlp_ratio', 4.0)
            self._add_decoder(decoder_embed_dim, decoder_num_heads, mlp_ratio, decoder_pred_dim)
        conv = self.patch_embed.conv
        initializer.XavierUniform(fan_in=fan_in(conv), fan_out=self.embed_dim)(conv.weight)
        self.apply(lambda layer: xavier_uniform_(layer) if isinstance(layer, nn.Linear) else None)

    def _add_decoder(self, dim: int, num_heads: int, mlp_ratio: float, pred_dim: int | None) -> None:
        if dim % num_heads:
            raise UserError(
                f'{dim} channels (MODEL.MAE.DECODER_EMBED_DIM) do not divide into {num_heads} heads '
                '(MODEL.MAE.DECODER_NUM_HEADS): change one of them.'
            )
        table = sincos_position_table(dim, self.patch_embed.grid_size, self.num_prefix)
        self.decoder_embed = Linear(self.embed_dim, dim)
        self.mask_token = self.create_parameter([1, 1, dim], default_initializer=initializer.Normal(std=0.02))
        self.decoder_pos_embed = self.create_parameter(table.shape)
        fix_(self.decoder_pos_embed, table)
        self.decoder_blocks = nn.LayerList(
            Block(dim, Attention(dim, num_heads), mlp_ratio=mlp_ratio) for _ in range(self.decoder_depth)
        )
        self.decoder_norm = LayerNorm(dim, epsilon=NORM_EPS)
        self.decoder_pred = Linear(dim, pred_dim or self.patch_size**2 * self.in_chans)

    # ------------------------------------------------------------------------------------------------ forward
    def forward(
        self, x: Tensor, noise: Tensor | None = None, indices: Sequence[int] = (), want: Collection[str] = ()
    ) -> Reconstruction:
        """Mask patches and reconstruct them.

        Args:
            x: normalized images [B, in_chans, H, W], sides divisible by the patch size.
            noise: [B, L]; the patches with the smallest values are visible. None: uniform random noise.
            indices, want: requested intermediates of the encoder, as in `forward_intermediates`.
        """
        grid = self.grid_of(x)
        noise = paddle.rand([x.shape[0], grid[0] * grid[1]]) if noise is None else noise
        ids_shuffle, ids_restore, visible, mask = random_masks(noise, self.mask_ratio)
        encoder = self.encode_intermediates(x, ids_shuffle[:, :visible], indices, want)
        pred = self.decode(encoder.features, ids_restore, grid)
        return Reconstruction(self.loss(x, pred, mask), pred, mask, ids_shuffle, visible, encoder)

    def encode(self, x: Tensor, ids_keep: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> normalized tokens [B, 1 + V, C] of patches `ids_keep` [B, V] in this order."""
        return self.encode_intermediates(x, ids_keep).features

    def encode_intermediates(
        self, x: Tensor, ids_keep: Tensor, indices: Sequence[int] = (), want: Collection[str] = ()
    ) -> Intermediates:
        """Run `encode` and return intermediate results, as in `forward_intermediates`."""
        want = requested(want, indices, self.depth)
        x = self.embed(x)
        x = paddle.concat([x[:, : self.num_prefix], take_tokens(x[:, self.num_prefix :], ids_keep)], axis=1)
        return self._collect(*self._begin_tokens(x), want)

    def decode(self, latent: Tensor, ids_restore: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of `encode` -> predictions of the patches [B, L, D] in row-major order; D: see `decoder_pred_dim`.

        Args:
            latent: [B, 1 + V, C].
            ids_restore: inverse of `ids_shuffle`, [B, L] int64.
            grid: (rows, columns) of patches.
        """
        # Cast to the parameters' type, so that the residual stream stays in float32 under AMP.
        x = self.decoder_embed(latent).astype(self.mask_token.dtype)
        prefix, body = x[:, : self.num_prefix], x[:, self.num_prefix :]
        masked = self.mask_token.expand([x.shape[0], ids_restore.shape[1] - body.shape[1], -1])
        body = take_tokens(paddle.concat([body, masked], axis=1), ids_restore)
        table = resize_position_table(self.decoder_pos_embed, self.patch_embed.grid_size, grid, self.num_prefix)
        x = paddle.concat([prefix, body], axis=1) + table
        state = TokenState(self.num_prefix, body.shape[1])
        for block in self.decoder_blocks:
            x, state = run_block(block, x, state, checkpoint=self.grad_checkpointing)
        return self.decoder_pred(self.decoder_norm(x))[:, self.num_prefix :]

    def loss(self, x: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Compute the mean squared error over the targets of the masked patches; x: images [B, in_chans, H, W]."""
        target = self.targets(x.astype('float32'))
        if target.shape[-1] != pred.shape[-1]:
            raise UserError(
                f'the decoder predicts {pred.shape[-1]} values of each patch (MODEL.MAE.DECODER_PRED_DIM), but the target '
                f'has {target.shape[-1]}: remove the key, or override MaskedAutoencoder.targets.'
            )
        error = paddle.square(pred.astype('float32') - target).mean(-1)
        return (error * mask).sum() / mask.sum()

    def targets(self, x: Tensor) -> Tensor:
        """Return what the decoder is to predict of images [B, in_chans, H, W]: their patches [B, L, P * P * in_chans].

        Subclasses may return other values [B, L, D] of each patch, with `decoder_pred_dim` D.
        """
        patches = patchify(x, self.patch_size)
        return normalize_patches(patches)[0] if self.norm_pix_loss else patches

    @property
    def predicts_pixels(self) -> bool:
        """True if `to_images` works: a subclass has no `targets` of its own."""
        return type(self).targets is MaskedAutoencoder.targets

    def to_images(self, x: Tensor, output: Reconstruction) -> tuple[Tensor, Tensor]:
        """Return images with masked patches set to 0, and images with masked patches reconstructed.

        Args:
            x: input images, [B, in_chans, H, W].
            output: result of `forward` for x.

        Returns:
            Two batches of the shape of x. Normalized patches get the mean and variance of the original patches.

        Raises:
            UserError: the model does not predict pixels.
        """
        if not self.predicts_pixels:
            raise UserError(f'{type(self).__name__} does not predict pixels, so there are no pictures of its output.')
        grid = self.grid_of(x)
        patches, pred = patchify(x, self.patch_size), output.pred.astype('float32')
        if self.norm_pix_loss:
            _, mean, std = normalize_patches(patches)
            pred = pred * std + mean
        mask = output.mask.unsqueeze(-1)
        visible = patches * (1 - mask)
        return unpatchify(visible, self.patch_size, grid), unpatchify(visible + pred * mask, self.patch_size, grid)

    def no_weight_decay(self) -> set[str]:
        """Return no names: weight decay applies to the tokens, and the position embedding is not trained."""
        return set()


def random_masks(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, int, Tensor]:
    """Choose the visible patches, those with the smallest values of `noise` [B, L].

    Returns:
        Patch indices sorted by noise [B, L] int64, of which the first are visible; the inverse permutation [B, L]; the
        number of visible patches; and a mask [B, L] float32, 1 for masked patches.
    """
    ids_shuffle = paddle.argsort(noise, axis=-1)
    visible = num_visible(ids_shuffle.shape[1], mask_ratio)
    ids_restore = paddle.argsort(ids_shuffle, axis=-1)
    return ids_shuffle, ids_restore, visible, (ids_restore >= visible).astype('float32')


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Return the number of visible patches, truncated as upstream does: 9 of 100 at ratio 0.9, as 1 - 0.9 < 0.1."""
    return int(num_patches * (1 - mask_ratio))


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, L, P * P * C]: patches in row-major order, each with rows of pixels, channels last."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape([batch, channels, rows, patch_size, columns, patch_size])
    return x.transpose([0, 2, 4, 3, 5, 1]).reshape([batch, rows * columns, -1])


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Invert `patchify`; `grid` is (rows, columns) of patches."""
    x = patches.reshape([patches.shape[0], *grid, patch_size, patch_size, -1])
    return x.transpose([0, 5, 1, 3, 2, 4]).flatten(4).flatten(2, 3)


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize patches [B, L, D] to mean 0 and unbiased variance 1; return also mean and deviation [B, L, 1]."""
    mean = patches.mean(-1, keepdim=True)
    centered = patches - mean
    # `Tensor.var` has two implementations, of which one reads the device.
    variance = paddle.pow(centered, 2).sum(-1, keepdim=True) / paddle.full([], patches.shape[-1] - 1, patches.dtype)
    std = paddle.sqrt(variance + TARGET_EPS)
    return centered / std, mean, std


@register_model('mae')
def build_mae(config) -> MaskedAutoencoder:
    """Build a masked autoencoder from a configuration."""
    mae = config.MODEL.MAE
    return MaskedAutoencoder(
        decoder_embed_dim=mae.DECODER_EMBED_DIM,
        decoder_depth=mae.DECODER_DEPTH,
        decoder_num_heads=mae.DECODER_NUM_HEADS,
        mask_ratio=mae.MASK_RATIO,
        norm_pix_loss=mae.NORM_PIX_LOSS,
        decoder_pred_dim=mae.DECODER_PRED_DIM,
        **pretraining_options(config),
    )
