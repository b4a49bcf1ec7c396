# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoders: "Masked Autoencoders Are Scalable Vision Learners", https://arxiv.org/abs/2111.06377.

The Vision Transformer of this suite sees a quarter of the patches; a small one rebuilds the pixels of the others. For
light encoders, as in "A Closer Look at Self-Supervised Lightweight Vision Transformers" (MAE-Lite),
https://arxiv.org/abs/2205.14443. Parameter names are upstream's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import initializer

from config import get_config
from models.layers import (
    NORM_EPS,
    Block,
    TokenState,
    computed_table,
    fix_,
    resize_position_table,
    run_block,
    sincos_position_table,
    take_tokens,
    xavier_uniform_,
)
from models.registry import config_file, register_model
from models.vision_transformer import VisionTransformer, pretraining_options
from utils.errors import UserError

TARGET_EPS = 1e-6


class Reconstruction(NamedTuple):
    """What a pass of the autoencoder returns.

    Attributes:
        loss: mean over the removed patches of the squared error, 0-D float32.
        pred: rebuilt patches [B, L, P * P * in_chans]; normalised ones where the model was trained on those.
        mask: 1 where a patch was removed, 0 where it was seen, [B, L], rows of patches from top to bottom.
        order: the patches in the order of their noise, [B, L] int64; the first `seen` ones were seen.
        seen: their number.
        attn: scores of the attentions to compare with a teacher's, each [B, teacher's H, 1 + V, 1 + V].
        hidden: tokens to compare with a teacher's, each [B, 1 + V, teacher's C].
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor
    order: Tensor
    seen: int
    attn: tuple[Tensor, ...] = ()
    hidden: tuple[Tensor, ...] = ()


class Lessons(NamedTuple):
    """What a student compares with its teacher (MAE-Lite, section 5).

    Attributes:
        attn: blocks, counted from 1, whose scores before the softmax are compared.
        hidden: blocks, counted from 0, whose normalised input is compared; the depth stands for the encoder's output.
        num_heads: the teacher's, for adapters to it; None: there are none.
        embed_dim: likewise.
    """

    attn: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    num_heads: int | None = None
    embed_dim: int | None = None


NO_LESSONS = Lessons()


class MaskedAutoencoder(VisionTransformer):
    """A Vision Transformer without classifier, and a decoder.

    Both position tables are fixed sines and cosines: part of the state, but not trained.

    Args:
        decoder_embed_dim: channels of the decoder.
        decoder_depth: its blocks; 0: there is no decoder, and the model can only `encode`.
        decoder_num_heads: heads of its attentions.
        mask_ratio: share of the patches to remove.
        norm_pix_loss: rebuild patches that are normalised by their own mean and variance.
        lessons: what `forward` returns for a comparison with a teacher.
        encoder: further arguments of `VisionTransformer`.
    """

    stem_names = (*VisionTransformer.stem_names, 'mask_token')
    optional_parts = ()

    def __init__(
        self,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        lessons: Lessons = NO_LESSONS,
        **encoder,
    ):
        super().__init__(num_classes=0, **{'drop_path_rate': 0.0, **encoder})
        self.patch_size = self.patch_embed.patch_size
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        seen = num_visible(self.patch_embed.num_patches, mask_ratio)
        if not 1 <= seen < self.patch_embed.num_patches:
            raise UserError(
                f'a mask ratio of {mask_ratio} (MODEL.MAE.MASK_RATIO) leaves no patch to see or to rebuild.'
            )
        fix_(self.pos_embed, sincos_position_table(self.embed_dim, self.patch_embed.grid_size, self.num_prefix))
        initializer.Normal(std=0.02)(self.cls_token)
        self.decoder_depth = decoder_depth
        if decoder_depth:
            mlp_ratio = encoder.get('mlp_ratio', 4.0)
            self._add_decoder(decoder_embed_dim, decoder_num_heads, mlp_ratio)
        conv = self.patch_embed.conv.weight
        initializer.XavierUniform(fan_in=conv[0].size, fan_out=self.embed_dim)(conv)
        self.apply(lambda layer: xavier_uniform_(layer) if isinstance(layer, nn.Linear) else None)
        self._add_adapters(lessons)

    def _add_adapters(self, lessons: Lessons) -> None:
        check_lessons(lessons, self.depth)
        self.lessons = lessons
        self.attn_adapter, self.hidden_adapter = nn.Layer(), nn.Layer()
        for block in lessons.attn if lessons.num_heads else ():
            conv = nn.Conv2D(self.num_heads, lessons.num_heads, 1, bias_attr=False)
            _uniform(conv.weight, self.num_heads)
            self.attn_adapter.add_sublayer(f'adapter{block - 1}', conv)
        for block in lessons.hidden if lessons.embed_dim else ():
            linear = nn.Linear(self.embed_dim, lessons.embed_dim, bias_attr=False)
            _uniform(linear.weight, self.embed_dim)
            self.hidden_adapter.add_sublayer(f'adapter{block}', linear)

    def _add_decoder(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        if dim % num_heads:
            raise UserError(
                f'{dim} channels (MODEL.MAE.DECODER_EMBED_DIM) do not divide into {num_heads} heads '
                '(MODEL.MAE.DECODER_NUM_HEADS).'
            )
        table = sincos_position_table(dim, self.patch_embed.grid_size, self.num_prefix)
        self.decoder_embed = nn.Linear(self.embed_dim, dim)
        self.mask_token = self.create_parameter([1, 1, dim], default_initializer=initializer.Normal(std=0.02))
        self.decoder_pos_embed = self.create_parameter(table.shape)
        fix_(self.decoder_pos_embed, table)
        self.decoder_blocks = nn.LayerList(Block(dim, num_heads, mlp_ratio) for _ in range(self.decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim, epsilon=NORM_EPS)
        pixels = self.patch_embed.conv.weight[0].size
        self.decoder_pred = nn.Linear(dim, pixels)

    # ------------------------------------------------------------------------------------------------ forward
    def forward(self, x: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Removes patches and rebuilds them.

        Args:
            x: normalised images [B, in_chans, H, W], sides divisible by the patch size.
            noise: [B, L] numbers; the patches with the smallest are seen. None: uniform random ones.
        """
        grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        noise = paddle.rand([x.shape[0], grid[0] * grid[1]]) if noise is None else noise
        order = paddle.argsort(noise, axis=-1)
        seen = num_visible(order.shape[1], self.mask_ratio)
        restore = paddle.argsort(order, axis=-1)
        mask = (restore >= seen).astype('float32')
        latent, attn, hidden = self.observe(x, order[:, :seen], self.lessons)
        if self.lessons.num_heads:
            attn = [
                getattr(self.attn_adapter, f'adapter{block - 1}')(logits)
                for block, logits in zip(self.lessons.attn, attn)
            ]
        if self.lessons.embed_dim:
            hidden = [
                getattr(self.hidden_adapter, f'adapter{block}')(tokens)
                for block, tokens in zip(self.lessons.hidden, hidden)
            ]
        pred = self.decode(latent, restore, grid)
        return Reconstruction(self.loss(x, pred, mask), pred, mask, order, seen, tuple(attn), tuple(hidden))

    def encode(self, x: Tensor, kept: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> normalised tokens [B, 1 + V, C] of the patches `kept` [B, V], in that order."""
        return self.observe(x, kept, NO_LESSONS)[0]

    def observe(self, x: Tensor, kept: Tensor, lessons: Lessons) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """`encode`, and of `lessons` the scores [B, H, 1 + V, 1 + V] and the tokens [B, 1 + V, C]."""
        x = self.embed(x)
        x = paddle.concat([x[:, : self.num_prefix], take_tokens(x[:, self.num_prefix :], kept)], axis=1)
        blocks = sorted({*(block - 1 for block in lessons.attn), *lessons.hidden} - {self.depth})
        x, state = self._mix(self.blocks, x, blocks)
        x, observed = self.norm(x), dict(zip(blocks, state.observed))
        attn = [observed[block - 1].logits for block in lessons.attn]
        return x, attn, [x if block == self.depth else observed[block].hidden for block in lessons.hidden]

    def decode(self, latent: Tensor, restore: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of `encode` -> patches [B, L, P * P * in_chans] from top to bottom.

        Args:
            latent: [B, 1 + V, C].
            restore: place of each patch in the order of the noise, [B, L] int64.
            grid: (rows, columns) of patches.
        """
        # In the parameters' precision, so that the residual stream stays in float32 under mixed precision.
        x = self.decoder_embed(latent).astype(self.mask_token.dtype)
        prefix, body = x[:, : self.num_prefix], x[:, self.num_prefix :]
        removed = self.mask_token.expand([x.shape[0], restore.shape[1] - body.shape[1], -1])
        body = take_tokens(paddle.concat([body, removed], axis=1), restore)
        old = (self.patch_embed.grid_size,) * 2
        table = resize_position_table(self.decoder_pos_embed, old, grid, self.num_prefix)
        x, _ = self._mix(self.decoder_blocks, paddle.concat([prefix, body], axis=1) + table)
        return self.decoder_pred(self.decoder_norm(x))[:, self.num_prefix :]

    def _mix(self, blocks: Iterable[Block], x: Tensor, observe: Collection[int] = ()) -> tuple[Tensor, TokenState]:
        nothing = [None] * self.depth
        state = TokenState(self.num_prefix, x.shape[1] - self.num_prefix, nothing, nothing, observe=observe)
        for block in blocks:
            x, state = run_block(block, x, state, again=self.recompute)
        return x, state

    def loss(self, x: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Squared error per pixel of images x [B, in_chans, H, W], averaged over the removed patches."""
        target = patchify(x.astype('float32'), self.patch_size)
        if self.norm_pix_loss:
            target, _, _ = normalise_patches(target)
        error = paddle.square(pred.astype('float32') - target).mean(-1)
        return (error * mask).sum() / mask.sum()

    def paint(self, x: Tensor, output: Reconstruction) -> tuple[Tensor, Tensor]:
        """Pictures of a pass: what was seen, the rest being 0, and that completed by what was rebuilt.

        Args:
            x: the images of the pass, [B, in_chans, H, W].

        Returns:
            Two batches like x. Normalised patches get the mean and the variance of the true ones.
        """
        grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        patches, pred = patchify(x, self.patch_size), output.pred.astype('float32')
        if self.norm_pix_loss:
            _, mean, std = normalise_patches(patches)
            pred = pred * std + mean
        mask = output.mask.unsqueeze(-1)
        seen = patches * (1 - mask)
        return unpatchify(seen, self.patch_size, grid), unpatchify(seen + pred * mask, self.patch_size, grid)

    # ------------------------------------------------------------------------------------------------ weights
    def no_weight_decay(self) -> set[str]:
        """Nothing: in pre-training the tokens are decayed, and the positions are not trained."""
        return set()

    def facts(self) -> dict:
        """Both numbers of heads."""
        decoder = {'MODEL.MAE.DECODER_NUM_HEADS': self.decoder_blocks[0].attn.num_heads} if self.decoder_depth else {}
        return {**super().facts(), **decoder}

    def resize_positions(self, name: str, array: np.ndarray) -> np.ndarray:
        """Tables of another resolution are computed, not interpolated."""
        fixed = {'pos_embed': self.pos_embed, 'decoder_pos_embed': getattr(self, 'decoder_pos_embed', None)}.get(name)
        return array if fixed is None else computed_table(fixed, array)

    def unused_weights(self, arrays, source: str) -> dict[str, str]:
        """The decoder and the adapters of a distillation, where the model has none."""
        unused, ours = super().unused_weights(arrays, source), set(self.state_dict())
        if not self.decoder_depth:
            unused.update({name: 'the model has no decoder' for name in arrays if name.startswith(DECODER_PARTS)})
        adapters = [name for name in arrays if name.startswith(ADAPTERS) and name not in ours]
        return {**unused, **dict.fromkeys(adapters, 'the model does not learn from a teacher')}


ADAPTERS = ('attn_adapter.', 'hidden_adapter.')
DECODER_PARTS = ('decoder_', 'mask_token')


def _uniform(parameter: Tensor, fan_in: int) -> None:
    initializer.Uniform(-(fan_in**-0.5), fan_in**-0.5)(parameter)


def check_lessons(lessons: Lessons, depth: int) -> None:
    """Raises UserError where a network of `depth` blocks lacks a block that is to be compared."""
    for key, first, blocks in (('ATTN_IDX', 1, lessons.attn), ('HIDDEN_IDX', 0, lessons.hidden)):
        for block in blocks:
            if not first <= block <= depth:
                raise UserError(f'TRAIN.MAE_DISTILL.{key} names {block}, but must be {first} to {depth}.')


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Patches that are seen, rounded down as upstream does: 9 of 100 at ratio 0.9, whose 1 - ratio is below 0.1."""
    return int(num_patches * (1 - mask_ratio))


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, L, P * P * C]: patches from top to bottom, in each the rows of pixels, channels last."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape([batch, channels, rows, patch_size, columns, patch_size])
    return x.transpose([0, 2, 4, 3, 5, 1]).reshape([batch, rows * columns, -1])


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`; `grid` is (rows, columns) of patches."""
    x = patches.reshape([patches.shape[0], *grid, patch_size, patch_size, -1])
    return x.transpose([0, 5, 1, 3, 2, 4]).flatten(4).flatten(2, 3)


def normalise_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches [B, L, D] with mean 0 and (unbiased) variance 1, and that mean and deviation [B, L, 1]."""
    mean = patches.mean(-1, keepdim=True)
    std = paddle.sqrt(patches.var(-1, keepdim=True) + TARGET_EPS)
    return (patches - mean) / std, mean, std


@register_model('mae')
def build_mae(config) -> MaskedAutoencoder:
    """Builds a masked autoencoder from a configuration."""
    mae = config.MODEL.MAE
    return MaskedAutoencoder(
        lessons=_lessons(config),
        decoder_embed_dim=mae.DECODER_EMBED_DIM,
        decoder_depth=mae.DECODER_DEPTH,
        decoder_num_heads=mae.DECODER_NUM_HEADS,
        mask_ratio=mae.MASK_RATIO,
        norm_pix_loss=mae.NORM_PIX_LOSS,
        **pretraining_options(config),
    )


def _lessons(config) -> Lessons:
    """What TRAIN.MAE_DISTILL asks for; adapters where it wants them, or where the teacher's sizes differ."""
    trans, lessons = config.MODEL.TRANS, config.TRAIN.MAE_DISTILL
    if not (lessons.ATTN_IDX or lessons.HIDDEN_IDX):
        return NO_LESSONS
    if config.TRAIN.TEACHER_CFG is None:
        raise UserError('TRAIN.MAE_DISTILL needs a teacher: set TRAIN.TEACHER_CFG, such as to mae_base_patch16_224.')
    teacher = get_config(config_file(config.TRAIN.TEACHER_CFG)).MODEL.TRANS
    heads = lessons.ATTN_ADAPTER or teacher.NUM_HEADS != trans.NUM_HEADS
    width = lessons.HIDDEN_ADAPTER or teacher.EMBED_DIM != trans.EMBED_DIM
    return Lessons(
        attn=tuple(lessons.ATTN_IDX),
        hidden=tuple(lessons.HIDDEN_IDX),
        num_heads=teacher.NUM_HEADS if heads else None,
        embed_dim=teacher.EMBED_DIM if width else None,
    )
