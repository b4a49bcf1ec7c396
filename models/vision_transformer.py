# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer, once: DeiT, EViT, the ViTs of MAE-Lite and those without some attention are settings of it.

ViT: https://arxiv.org/abs/2010.11929, DeiT: https://arxiv.org/abs/2012.12877, EViT: https://arxiv.org/abs/2202.07800,
MAE-Lite: https://arxiv.org/abs/2205.14443, removed attention: https://arxiv.org/abs/2404.05657, ToMe:
https://arxiv.org/abs/2210.09461. Parameter names and numbers are those of timm 0.4.12, on which the published weights
of all of them rest, so that their checkpoints port without renaming.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import initializer

from config import get_config
from models.attention_removal import RemovableAttention
from models.base import Start
from models.fine_tuning import OPTIONAL_PARTS, published_name, start_transformer
from models.layers import (
    NORM_EPS,
    Block,
    EViTReducer,
    PatchEmbed,
    RelativePositionBias,
    TokenState,
    ToMeReducer,
    drop_path_rates,
    merge_schedule,
    resize_position_table,
    resize_relative_table,
    run_block,
    torch_conv_,
    trunc_normal_,
)
from models.registry import register_model
from utils.errors import UserError


class VisionTransformer(RemovableAttention):
    """Vision Transformer image classifier.

    Args:
        img_size: side of the image that the position table is for, pixels; other sizes interpolate the table.
        patch_size: side of a patch, pixels.
        in_chans: channels of the image.
        num_classes: K; 0: features are returned.
        embed_dim: channels C of a token.
        depth: number of blocks.
        num_heads: heads per attention.
        mlp_ratio: hidden channels of the perceptrons / C.
        qkv_bias: biases of query, key and value.
        drop_rate: dropout after the positions and in the blocks.
        attn_drop_rate: dropout of the attention weights.
        head_drop_rate: dropout of what the classifiers see.
        drop_path_rate: stochastic depth.
        drop_path_ramp: let its rate grow linearly over the depth instead of being the same everywhere.
        distilled: second classifier for a teacher's labels. In training the pair of logits is returned, in evaluation
            their mean. It reads a distillation token of its own (DeiT), or with `global_pool` the class token
            (MAE-Lite).
        global_pool: classify the mean of the patch tokens, which is normalised after pooling, not the class token.
        representation_size: channels of a linear layer with tanh before the classifier; None: there is none.
        keep_rate: EViT, share of the patch tokens each block keeps: one number, or one per block.
        fuse_token: EViT, fuse the tokens not kept into one.
        prune_layers: blocks whose attention fades as `set_attn_lambda` says, see attention_removal.py.
        done_layers: blocks whose attention has faded, and whose dead weights are kept.
        removed_layers: blocks built without attention.
        frozen_stages: train neither the embedding nor the blocks 0 to this one, which stay in evaluation mode; -1: all
            is trained.
        recompute: save memory in training by computing the blocks again in the backward pass.
        absolute_positions: add a learned table to the tokens.
        relative_positions: add learned biases to the attention: 'block', of each block its own; 'shared', of all the
            same; or both. They are for `img_size`, and for blocks that keep all tokens.
        key_bias: biases of the keys too (False: BEiT).
        layer_scale: initial factor of the channels of each residual branch; None: there are no such factors.
        rescaled_init: divide the last layer of each branch by sqrt(2 (number of the block, from 1)) and multiply the
            classifiers by 0.001 (BEiT).
    """

    stem_names = ('cls_token', 'dist_token', 'pos_embed', 'patch_embed')
    optional_parts = OPTIONAL_PARTS

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        head_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_ramp: bool = False,
        distilled: bool = False,
        global_pool: bool = False,
        representation_size: int | None = None,
        keep_rate: float | Sequence[float] = 1.0,
        fuse_token: bool = False,
        prune_layers: Sequence[int] = (),
        done_layers: Sequence[int] = (),
        removed_layers: Sequence[int] = (),
        frozen_stages: int = -1,
        recompute: bool = False,
        absolute_positions: bool = True,
        relative_positions: Collection[str] = (),
        key_bias: bool = True,
        layer_scale: float | None = None,
        rescaled_init: bool = False,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(f'{embed_dim} channels (EMBED_DIM) do not divide into {num_heads} heads (NUM_HEADS).')
        self.embed_dim, self.depth, self.num_heads = embed_dim, depth, num_heads
        self.distilled, self.global_pool = distilled, global_pool
        self.recompute, self.rescaled_init = recompute, rescaled_init
        self.absolute_positions, self.relative_positions = absolute_positions, frozenset(relative_positions)
        self.keep_rate: float | None = None
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, any_size=True)
        torch_conv_(self.patch_embed.conv)
        self._add_tokens()
        self.pos_drop = nn.Dropout(drop_rate)
        self.plan_removal(prune_layers, done_layers, removed_layers)
        staying = self.attention_layers()
        keep_rates = _per_block('keep_rate', keep_rate, depth)
        unknown = self.relative_positions - {'block', 'shared'}
        if unknown:
            raise UserError(f"'{min(unknown)}' is no kind of relative positions (MODEL.TRANS.REL_POS): block, shared.")
        grid = (self.patch_embed.grid_size,) * 2
        self.rel_pos_bias = RelativePositionBias(grid, num_heads) if 'shared' in self.relative_positions else None
        if self.relative_positions and (self.num_prefix != 1 or any(rate < 1 for rate in keep_rates)):
            raise UserError('relative positions (MODEL.TRANS.REL_POS) need all patch tokens and one class token.')
        block = functools.partial(
            Block,
            embed_dim,
            num_heads,
            mlp_ratio,
            qkv_bias,
            drop_rate,
            attn_drop_rate,
            key_bias=key_bias,
            bias_grid=grid if 'block' in self.relative_positions else None,
            layer_scale=layer_scale,
        )
        self.blocks = nn.LayerList(
            block(
                drop_path_rate=drop_path,
                attention=i not in self.removed_layers,
                reducer=EViTReducer(i, keep_rates[i], fuse_token) if i in staying else None,
            )
            for i, drop_path in enumerate(drop_path_rates(drop_path_rate, depth, drop_path_ramp))
        )
        self.start_fading()
        self._add_head(num_classes, representation_size)
        self.head_drop = nn.Dropout(head_drop_rate)
        self.apply(_init_linear)
        if rescaled_init:
            self._rescale()
        self._freeze(frozen_stages)

    def _add_tokens(self) -> None:
        token_init = initializer.TruncatedNormal(std=0.02)
        dim = self.embed_dim
        self.cls_token = self.create_parameter([1, 1, dim], default_initializer=token_init)
        self.dist_token = None
        if self.distilled and not self.global_pool:
            self.dist_token = self.create_parameter([1, 1, dim], default_initializer=token_init)
        self.num_prefix = 1 if self.dist_token is None else 2
        rows = self.num_prefix + self.patch_embed.num_patches
        self.pos_embed = None
        if self.absolute_positions:
            self.pos_embed = self.create_parameter([1, rows, dim], default_initializer=token_init)

    def _add_head(self, num_classes: int, representation_size: int | None) -> None:
        dim = self.embed_dim
        norms = ['fc_norm', 'dist_norm'][: 1 + self.distilled] if self.global_pool else ['norm']
        for name in norms:
            setattr(self, name, nn.LayerNorm(dim, epsilon=NORM_EPS))
        self.pre_logits = None
        if representation_size and not self.distilled:
            self.pre_logits = nn.Sequential(('fc', nn.Linear(dim, representation_size)), ('act', nn.Tanh()))
        self.num_features = representation_size if self.pre_logits is not None else dim
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifiers by fresh ones; 0 leaves the features."""
        self.num_classes = num_classes
        for name in ['head', 'head_dist'][: 1 + self.distilled]:
            head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
            setattr(self, name, head)
            _init_linear(head)
            if self.rescaled_init and num_classes:
                _multiply(head.weight, 0.001)

    def _rescale(self) -> None:
        trunc_normal_(self.patch_embed.conv.weight)
        initializer.Constant(0.0)(self.patch_embed.conv.bias)
        for number, block in enumerate(self.blocks, 1):
            if number - 1 not in self.removed_layers:
                _multiply(block.attn.proj.weight, (2.0 * number) ** -0.5)
            _multiply(block.mlp.fc2.weight, (2.0 * number) ** -0.5)
        for head in (self.head, self.head_dist) if self.distilled else (self.head,):
            if self.num_classes:
                _multiply(head.weight, 0.001)

    def set_keep_rate(self, rate: float | None) -> None:
        """Keep rate of the following passes in all blocks that reduce; None: each block's own."""
        self.keep_rate = rate

    def merge_tokens(self, r: int | Sequence[float], start: int = 0, prop_attn: bool = True) -> None:
        """Merges similar tokens (ToMe) in the following passes.

        Blocks that keep their attention are counted from 0, and those from number `start` on merge. In a block that
        EViT reduces too, EViT comes first.

        Args:
            r: number of tokens to merge: one for all blocks; a list, or a tuple (r, inflect), see `merge_schedule`. Of
                the schedule for all blocks, the blocks that merge take one number after the other. 0: none merge.
            prop_attn: proportional attention.
        """
        for block in self.blocks:
            block.merger = None
        schedule = merge_schedule(r, self.depth)
        if any(schedule) and self.relative_positions:
            raise UserError(
                'relative positions (MODEL.TRANS.REL_POS) need all patch tokens, but MODEL.TOME merges them.'
            )
        if any(schedule):
            for layer, number in zip(self.attention_layers()[start:], schedule):
                self.blocks[layer].merger = ToMeReducer(number, prop_attn)

    def _freeze(self, stages: int) -> None:
        if stages >= self.depth:
            raise UserError(f'cannot freeze block {stages} (FROZEN_STAGES): there are blocks 0 to {self.depth - 1}.')
        self.frozen = [self.patch_embed, self.pos_drop, *self.blocks[: stages + 1]] if stages >= 0 else []
        parameters = [p for layer in self.frozen for p in layer.parameters()]
        if self.frozen:
            parameters += [p for p in (self.cls_token, self.dist_token, self.pos_embed) if p is not None]
        for parameter in parameters:
            parameter.stop_gradient = True

    def train(self) -> None:
        """Training mode, but for the frozen stages."""
        super().train()
        for layer in self.frozen:
            layer.eval()

    # ------------------------------------------------------------------------------------------------ forward
    def forward(
        self,
        x: Tensor,
        keep_rate: float | Sequence[float | None] | None = None,
        tokens: int | Sequence[int | None] | None = None,
        get_idx: bool = False,
    ):
        """Classifies images.

        Args:
            x: normalised images [B, in_chans, H, W], sides divisible by the patch size.
            keep_rate: EViT, rate for this pass, one number or one per block; None: as `set_keep_rate` says. Blocks
                built with rate 1 ignore it.
            tokens: EViT, number of patch tokens to keep instead, one number or one per block with None allowed.
            get_idx: return the kept positions too.

        Returns:
            Logits [B, K]; in training a distilled model returns (logits, distillation logits). With `get_idx` a
            pair of that and `TokenState.indices` as a list.
        """
        x, state = self.forward_tokens(x, keep_rate, tokens)
        logits = self.forward_head(x)
        return (logits, list(state.indices)) if get_idx else logits

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> tokens [B, num_prefix + N, C], normalised unless they are pooled first."""
        return self.forward_tokens(x)[0]

    def forward_tokens(
        self,
        x: Tensor,
        keep_rate: float | Sequence[float | None] | None = None,
        tokens: int | Sequence[int | None] | None = None,
        trace: bool = False,
        observe: Collection[int] = (),
    ) -> tuple[Tensor, TokenState]:
        """`forward_features` and what became of the tokens; arguments as in `forward`.

        With `trace`, `TokenState.source` says which of the first tokens are in each of the last ones. What the attention
        of the blocks `observe` saw and thought is in `TokenState.observed`.
        """
        return self.run_blocks(*self.begin(x, keep_rate, tokens, trace, observe))

    def begin(
        self, x: Tensor, keep_rate=None, tokens=None, trace: bool = False, observe: Collection[int] = ()
    ) -> tuple[Tensor, TokenState]:
        """What the first block takes; arguments as in `forward_tokens`."""
        keep_rate = self.keep_rate if keep_rate is None else keep_rate
        x = self.embed(x)
        state = TokenState(
            num_prefix=self.num_prefix,
            num_body=x.shape[1] - self.num_prefix,
            keep_rates=_per_block('keep_rate', keep_rate, self.depth),
            tokens=_per_block('tokens', tokens, self.depth),
            source=paddle.eye(x.shape[1]).expand([x.shape[0], -1, -1]) if trace else None,
            bias=None if self.rel_pos_bias is None else self.rel_pos_bias(),
            observe=observe,
        )
        return x, state

    def run_blocks(self, x: Tensor, state: TokenState, first: int = 0) -> tuple[Tensor, TokenState]:
        """What block `first` takes -> what `forward_tokens` returns."""
        for block in self.blocks[first:]:
            x, state = run_block(block, x, state, again=self.recompute)
        if not self.global_pool:
            return self.norm(x), state
        if state.size is not None:  # so that pooling averages over the tokens as they were before merging
            x = x * (state.size / state.size[:, self.num_prefix :].mean(1, keepdim=True))
        return x, state

    def embed(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> tokens with their positions [B, num_prefix + N, C]."""
        grid = (x.shape[2] // self.patch_embed.patch_size, x.shape[3] // self.patch_embed.patch_size)
        # In the parameters' precision, so that the residual stream stays in float32 under mixed precision.
        x = self.patch_embed(x).astype(self.cls_token.dtype)
        prefix = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        prefix = [token.expand([x.shape[0], -1, -1]) for token in prefix]
        if self.relative_positions and grid != (self.patch_embed.grid_size,) * 2:
            raise UserError(
                f'relative positions are for images of {self.patch_embed.img_size} pixels; set DATA.IMAGE_SIZE to the '
                'size of the data (the model is then built for it).'
            )
        x = paddle.concat([*prefix, x], axis=1)
        if self.pos_embed is None:
            return self.pos_drop(x)
        table = resize_position_table(self.pos_embed, (self.patch_embed.grid_size,) * 2, grid, self.num_prefix)
        return self.pos_drop(x + table)

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        """Tokens of `forward_features` -> logits [B, K]; distilled in training: both logits.

        With `pre_logits`, what the classifiers see is returned instead: [B, C], or a pair when distilled.
        """
        features = self._pool(x)
        if pre_logits:
            return features if self.distilled else features[0]
        features = tuple(self.head_drop(feature) for feature in features)
        logits = self.head(features[0])
        if not self.distilled:
            return logits
        logits_dist = self.head_dist(features[1])
        return (logits, logits_dist) if self.training else (logits + logits_dist) / 2

    def _pool(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.global_pool:
            pooled = self.fc_norm(x[:, self.num_prefix :].mean(1))
            features = (pooled, self.dist_norm(x[:, 0])) if self.distilled else (pooled,)
        else:
            features = (x[:, 0], x[:, 1]) if self.distilled else (x[:, 0],)
        return features if self.pre_logits is None else (self.pre_logits(features[0]),)

    # ------------------------------------------------------------------------------------------------ weights
    def head_names(self) -> tuple[str, ...]:
        """Prefixes of the classifiers' parameters."""
        return ('head.', 'head_dist.')

    def no_weight_decay(self) -> set[str]:
        """Tokens and positions."""
        return {'cls_token', 'dist_token', 'pos_embed'}

    def facts(self) -> dict:
        """The number of heads: weights of another compute something else in the same shapes."""
        return {'MODEL.TRANS.NUM_HEADS': self.num_heads}

    def starting_from(self, names: Collection[str]) -> Start:
        """Fine-tuning after a pre-training, or with another pooling. Of MoCo-v3 the encoder that was trained is taken."""
        return start_transformer(set(self.state_dict()), names)

    @staticmethod
    def upstream_name(name: str) -> str | None:
        """MAE-Lite's checkpoints hold the whole training: the model under `model.`, with teacher and average.

        MoCo-v3's hold the model under `base_encoder.`, whose head is a projector, with a momentum copy and a predictor.
        timm names LayerScale in another way.
        """
        if name.startswith(('tch_model.', 'ema_model.', 'momentum_encoder.', 'base_encoder.head.', 'predictor.')):
            return None
        return published_name(name.removeprefix('model.').removeprefix('base_encoder.'))

    def resize_positions(self, name: str, array: np.ndarray) -> np.ndarray:
        """A position table of another resolution, interpolated to this model's; any other array as it is."""
        if name.endswith('relative_position_bias_table') and array.ndim == 2:
            return resize_relative_table(array, (self.patch_embed.grid_size,) * 2)
        if name != 'pos_embed' or array.ndim != 3:
            return array
        side = round(max(array.shape[1] - self.num_prefix, 0) ** 0.5)
        if side**2 + self.num_prefix != array.shape[1]:
            return array
        new = (self.patch_embed.grid_size,) * 2
        table = paddle.to_tensor(array.astype('float32'), place=paddle.CPUPlace())
        return resize_position_table(table, (side, side), new, self.num_prefix).numpy()


def _init_linear(layer: nn.Layer) -> None:
    if isinstance(layer, nn.Linear):
        trunc_normal_(layer.weight)
        if layer.bias is not None:
            initializer.Constant(0.0)(layer.bias)


def _multiply(parameter: Tensor, factor: float) -> None:
    parameter.set_value(parameter * factor)


def _per_block(name: str, value, depth: int) -> list:
    """One value per block; a single one is repeated."""
    values = [value] * depth if value is None or isinstance(value, (int, float)) else list(value)
    if len(values) != depth:
        raise UserError(f'{name} has {len(values)} values for {depth} blocks.')
    if name == 'keep_rate' and any(v is not None and not 0 < v <= 1 for v in values):
        raise UserError(f'keep_rate is {value}, but must lie in (0, 1].')
    return values


# What MODEL.TRANS says of plain blocks, under the names of the arguments.
_PLAIN = ('PATCH_SIZE', 'EMBED_DIM', 'DEPTH', 'NUM_HEADS', 'MLP_RATIO', 'QKV_BIAS')


def _plain_options(config) -> dict:
    """Arguments of `VisionTransformer` that say the sizes of plain blocks."""
    return {
        'img_size': config.DATA.IMAGE_SIZE,
        'in_chans': config.DATA.IMAGE_CHANNELS,
        'recompute': config.TRAIN.RECOMPUTE,
        **{key.lower(): config.MODEL.TRANS[key] for key in _PLAIN},
    }


def pretraining_options(config) -> dict:
    """Arguments of `VisionTransformer` for an encoder that is pre-trained without labels: plain blocks, no dropping."""
    model, trans = config.MODEL, config.MODEL.TRANS
    fading = (*model.LAMBDA.PRUNE_LAYERS, *model.LAMBDA.DONE_LAYERS)
    if model.EVIT.KEEP_RATE < 1 or fading or model.TOME.R or model.TOME.SCHEDULE:
        raise UserError(
            f'MODEL.TYPE {model.TYPE} takes no MODEL.EVIT, LAMBDA or TOME: all tokens and blocks are pre-trained.'
        )
    plain = get_config().MODEL.TRANS
    other = sorted(key for key in trans if key not in _PLAIN and trans[key] != plain[key])
    if other:
        raise UserError(
            f'MODEL.TYPE {model.TYPE} takes no MODEL.TRANS.{other[0]}: leave it at {plain[other[0]]}; plain blocks are '
            'pre-trained.'
        )
    return _plain_options(config)


@register_model('vit', 'deit', 'evit')
def build_vit(config) -> VisionTransformer:
    """Builds a Vision Transformer from a configuration."""
    model, trans, evit = config.MODEL, config.MODEL.TRANS, config.MODEL.EVIT
    removal, tome = config.MODEL.LAMBDA, config.MODEL.TOME
    outside = [i for i in evit.DROP_LOC if not 0 <= i < trans.DEPTH] if evit.KEEP_RATE < 1 else []
    if outside:
        raise UserError(f'MODEL.EVIT.DROP_LOC names block {outside[0]}, but there are blocks 0 to {trans.DEPTH - 1}.')
    leaving = (*removal.PRUNE_LAYERS, *removal.DONE_LAYERS)
    clash = sorted({*leaving} & {*evit.DROP_LOC}) if evit.KEEP_RATE < 1 else []
    if clash:
        raise UserError(f'MODEL.EVIT.DROP_LOC names block {clash[0]}, whose attention MODEL.LAMBDA removes.')
    vit = VisionTransformer(
        **_plain_options(config),
        num_classes=model.NUM_CLASSES,
        drop_rate=model.DROPOUT,
        attn_drop_rate=model.ATTENTION_DROPOUT,
        head_drop_rate=model.HEAD_DROPOUT,
        drop_path_rate=model.DROPPATH,
        drop_path_ramp=model.DROPPATH_RAMP,
        distilled=trans.DISTILLED,
        global_pool=trans.GLOBAL_POOL,
        representation_size=trans.REPRESENTATION_SIZE,
        keep_rate=[evit.KEEP_RATE if i in evit.DROP_LOC else 1.0 for i in range(trans.DEPTH)],
        fuse_token=evit.FUSE_TOKEN,
        prune_layers=() if removal.REMOVED else removal.PRUNE_LAYERS,
        done_layers=() if removal.REMOVED else removal.DONE_LAYERS,
        removed_layers=leaving if removal.REMOVED else (),
        frozen_stages=trans.FROZEN_STAGES,
        absolute_positions=trans.ABS_POS,
        relative_positions=trans.REL_POS,
        key_bias=trans.KEY_BIAS,
        layer_scale=trans.LAYER_SCALE,
        rescaled_init=trans.RESCALED_INIT,
    )
    schedule = (tome.R, tome.INFLECT) if tome.SCHEDULE is None else list(tome.SCHEDULE)
    vit.merge_tokens(schedule, tome.START_IDX, tome.PROP_ATTN)
    return vit
