# SPDX-License-Identifier: Apache-2.0
"""Vision Transformer, the one implementation for all papers: token mixers and token reducers are parts of its blocks.

ViT: https://arxiv.org/abs/2010.11929, DeiT: https://arxiv.org/abs/2012.12877, EViT: https://arxiv.org/abs/2202.07800,
MAE-Lite: https://arxiv.org/abs/2205.14443, attention removal: https://arxiv.org/abs/2404.05657, ToMe:
https://arxiv.org/abs/2210.09461. Parameter names and outputs are those of timm 0.4.12, which all the published
weights use, so that their checkpoints port without renaming.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import paddle
from paddle import Tensor, nn
from paddle.nn import initializer

from models.base import Classifier
from models.layers import (
    NORM_EPS,
    AttentionRemoval,
    Block,
    BlockIntermediates,
    ConvStem,
    EViTSpec,
    Intermediates,
    LayerNorm,
    Linear,
    MixerSpec,
    PatchEmbed,
    ReducerSpec,
    RelativeAttention,
    RelativePositionBias,
    RemovalSpec,
    SyncBatchNorm,
    TokenState,
    ToMeReducer,
    ToMeSpec,
    build_mixer,
    check_keep_rates,
    check_reducers,
    init_linear_,
    per_block,
    requested,
    rescale_branches,
    resize_position_table,
    run_block,
    scale_,
    torch_conv_,
    trunc_normal_,
)
from models.options import encoder_options, reducer_specs
from models.registry import register_model
from models.weights.transformer import TransformerWeights
from utils.errors import UserError
from utils.sizes import Side, size_text

POSITIONS = ('absolute', 'shared_relative')
VARIANTS = ('conv_stem', 'head_norm', 'output_dropout', 'rescaled_init')
PLAIN_ATTENTION, NO_REMOVAL = MixerSpec(), RemovalSpec()
ALL_TOKENS = (EViTSpec(),)  # reduces tokens only if a forward pass sets `tokens`


class VisionTransformer(Classifier):
    """Vision Transformer image classifier.

    Args:
        img_size: side of the image, or (height, width), pixels; for other sizes the position embedding is interpolated.
        patch_size: side of a patch, pixels.
        in_chans: channels of the image.
        num_classes: K; 0: return features.
        embed_dim: channels C of a token.
        depth: number of blocks.
        num_heads: heads per attention.
        mlp_ratio: hidden channels of the MLPs / C.
        mixer: token mixer of all blocks, or one per block.
        reducers: token reducers of the blocks with attention, run in this order.
        removal: blocks whose attention is removed or decays.
        positions: 'absolute': learned position embedding; 'shared_relative': one relative position bias for all blocks
            (the mixer 'relative' has one per block). Relative positions require images of `img_size` and all tokens.
        drop_rate: dropout after the position embedding and in the blocks.
        head_drop_rate: dropout before the classifiers.
        drop_path_rate: stochastic depth rate: one for all blocks, or one per block, see `drop_path_rates`.
        distilled: add a distillation classifier, on the distillation token (DeiT), or with `global_pool` on the class
            token (MAE-Lite). Training returns both logits, evaluation their mean.
        global_pool: classify the mean of the patch tokens, normalized after pooling, instead of the class token.
        representation_size: channels of a linear layer with tanh before the classifier; None: no such layer.
        layer_scale: initial LayerScale value of each residual branch (CaiT); None: no LayerScale.
        variants: parts that differ from DeiT's. 'conv_stem': patches are embedded by a stack of convolutions, see `ConvStem`.
            'head_norm': batch normalization without affine parameters before the classifier (linear probe of MAE).
            'output_dropout': dropout after the last layer of the MLPs only, not inside (BEiT). 'rescaled_init':
            initialization of BEiT: divide the last layer of each branch in block i (from 1) by sqrt(2 i), and multiply the
            classifiers by 0.001.
    """

    stem_names = ('cls_token', 'dist_token', 'pos_embed', 'patch_embed')
    weight_rules = TransformerWeights()

    def __init__(
        self,
        img_size: Side = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        mixer: MixerSpec | Sequence[MixerSpec] = PLAIN_ATTENTION,
        reducers: Sequence[ReducerSpec] = ALL_TOKENS,
        removal: RemovalSpec = NO_REMOVAL,
        positions: Collection[str] = ('absolute',),
        drop_rate: float = 0.0,
        head_drop_rate: float = 0.0,
        drop_path_rate: float | Sequence[float] = 0.1,
        distilled: bool = False,
        global_pool: bool = False,
        representation_size: int | None = None,
        layer_scale: float | None = None,
        variants: Collection[str] = (),
    ):
        super().__init__()
        _check(embed_dim, num_heads, positions, variants)
        self.embed_dim, self.depth, self.num_heads = embed_dim, depth, num_heads
        self.distilled, self.global_pool, self.rescaled_init = distilled, global_pool, 'rescaled_init' in variants
        self.keep_rate: float | None = None
        self.frozen: list[nn.Layer] = []
        stem = ConvStem if 'conv_stem' in variants else PatchEmbed
        self.patch_embed = stem(img_size, patch_size, in_chans, embed_dim, any_size=True)
        for conv in self.patch_embed.convs:
            torch_conv_(conv)
        self._add_tokens('absolute' in positions)
        self.pos_drop = nn.Dropout(drop_rate)
        self.removal = AttentionRemoval(removal, depth)
        grid = self.patch_embed.grid_size
        self.rel_pos_bias = RelativePositionBias(grid, num_heads) if 'shared_relative' in positions else None
        options = {
            'mlp_ratio': mlp_ratio,
            'layer_scale': layer_scale,
            'hidden_dropout': 'output_dropout' not in variants,
        }
        self.blocks = self._build_blocks(mixer, reducers, drop_path_rate, drop_rate, **options)
        self._check_relative()
        self.removal.attach(self)
        self._add_head(num_classes, representation_size, 'head_norm' in variants)
        self.head_drop = nn.Dropout(head_drop_rate)
        self.apply(init_linear_)
        if self.rescaled_init:
            self._rescale()

    def _build_blocks(self, mixer, reducers, drop_path_rate, drop_rate: float, **options) -> nn.LayerList:
        depth = self.depth
        mixers = [mixer] * depth if isinstance(mixer, MixerSpec) else per_block('mixer', mixer, depth)
        plans = [spec.build(depth, self.removal.kept_layers) for spec in reducers]
        rates = per_block('drop_path_rate', drop_path_rate, depth)
        return nn.LayerList(
            Block(
                self.embed_dim,
                self._build_mixer(i, mixers[i], drop_rate),
                [plan[i] for plan in plans if i in plan],
                drop_rate=drop_rate,
                drop_path_rate=rates[i],
                **options,
            )
            for i in range(depth)
        )

    def _build_mixer(self, layer: int, spec: MixerSpec, drop_rate: float) -> nn.Layer | None:
        if layer in self.removal.removed_layers:
            return None
        return build_mixer(spec, self.embed_dim, self.num_heads, self.patch_embed.grid_size, drop_rate)

    def _check_relative(self) -> None:
        """Set `relative`. Raise UserError if tokens are reduced, as relative positions need all patch tokens."""
        mixers = [block.attn for block in self.blocks]
        if self.num_prefix and any(getattr(mixer, 'patches_only', False) for mixer in mixers):
            raise UserError(
                'windowed attention and decomposed relative positions (MODEL.TRANS.MIXER) are for models without class '
                'token, such as MODEL.TYPE mask_rcnn.'
            )
        self.relative = self.rel_pos_bias is not None or any(isinstance(mixer, RelativeAttention) for mixer in mixers)
        if not self.relative:
            return
        reducers = [reducer for block in self.blocks for reducer in block.reducers]
        if self.num_prefix != 1 or any(reducer.reduces for reducer in reducers):
            raise UserError(
                'relative positions (MODEL.TRANS.REL_POS) need all patch tokens and one class token: remove MODEL.EVIT, '
                'MODEL.TOME and MODEL.TRANS.DISTILLED.'
            )

    def _add_tokens(self, absolute: bool) -> None:
        token_init = initializer.TruncatedNormal(std=0.02)
        dim = self.embed_dim
        self.cls_token = self.create_parameter([1, 1, dim], default_initializer=token_init)
        self.dist_token = None
        if self.distilled and not self.global_pool:
            self.dist_token = self.create_parameter([1, 1, dim], default_initializer=token_init)
        self.num_prefix = 1 if self.dist_token is None else 2
        rows = self.num_prefix + self.patch_embed.num_patches
        self.pos_embed = None
        if absolute:
            self.pos_embed = self.create_parameter([1, rows, dim], default_initializer=token_init)

    def _add_head(self, num_classes: int, representation_size: int | None, head_norm: bool) -> None:
        dim = self.embed_dim
        if head_norm and self.distilled:
            raise UserError(
                'MODEL.TRANS.HEAD_NORM is for models with one classifier: set MODEL.TRANS.DISTILLED to False.'
            )
        self.has_head_norm = head_norm
        norms = ['fc_norm', 'dist_norm'][: 1 + self.distilled] if self.global_pool else ['norm']
        for name in norms:
            setattr(self, name, LayerNorm(dim, epsilon=NORM_EPS))
        self.pre_logits = None
        if representation_size and not self.distilled:
            self.pre_logits = nn.Sequential(('fc', Linear(dim, representation_size)), ('act', nn.Tanh()))
        self.num_features = representation_size if self.pre_logits is not None else dim
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """See `Classifier`."""
        self.num_classes = num_classes
        for name in ['head', 'head_dist'][: 1 + self.distilled]:
            head = Linear(self.num_features, num_classes) if num_classes else nn.Identity()
            setattr(self, name, head)
            init_linear_(head)
            if self.rescaled_init and num_classes:
                scale_(head.weight, 0.001)
        normalized = self.has_head_norm and num_classes
        self.head_norm = SyncBatchNorm(self.num_features, affine=False, epsilon=NORM_EPS) if normalized else None

    def _rescale(self) -> None:
        for conv in self.patch_embed.convs:
            trunc_normal_(conv.weight)
        initializer.Constant(0.0)(self.patch_embed.conv.bias)
        rescale_branches(self.blocks)
        for head in (self.head, self.head_dist) if self.distilled else (self.head,):
            if self.num_classes:
                scale_(head.weight, 0.001)

    # ------------------------------------------------------------------------------------------------ settings
    def set_keep_rate(self, rate: float | None) -> None:
        """Set the EViT keep rate of the following passes for all blocks with a rate below 1; None: the block's rate."""
        self.keep_rate = rate

    def set_attn_lambda(self, value: float) -> None:
        """Set λ of the blocks in `removal.prune_layers` for the following passes; see `AttentionRemoval`."""
        self.removal.set_lambda(self, value)

    def attention_layers(self) -> list[int]:
        """Return the blocks that keep attention weights; blocks with other mixers are excluded."""
        return [i for i in self.removal.kept_layers if 'weights' in getattr(self.blocks[i].attn, 'offers', ())]

    @property
    def has_unused_parameters(self) -> bool:
        """See `Classifier`: at λ = 0, decaying attention gets no gradients."""
        return bool(self.removal.prune_layers)

    def set_state_dict(self, state_dict: Mapping, *args, **kwargs):
        """Load a state dict as Paddle does, and restore λ from it."""
        result = super().set_state_dict(state_dict, *args, **kwargs)
        self.removal.restore_lambda(self)
        return result

    set_dict = load_dict = set_state_dict

    def merge_tokens(self, r: int | Sequence[float], start: int = 0, prop_attn: bool = True) -> None:
        """Merge similar tokens (ToMe) in the following passes, after all other reducers of a block.

        Args:
            r: tokens to merge per block, a list, or a tuple (r, inflect), see `merge_schedule`; 0: no merging.
            start: first block that merges, counted from 0 among the blocks with attention.
            prop_attn: proportional attention.
        """
        merging = ToMeSpec(r, start, prop_attn).build(self.depth, self.removal.kept_layers)
        if merging and self.relative:
            raise UserError(
                'relative positions (MODEL.TRANS.REL_POS) need all patch tokens, but MODEL.TOME merges them: '
                'remove one of the two.'
            )
        for layer, block in enumerate(self.blocks):
            others = [reducer for reducer in block.reducers if not isinstance(reducer, ToMeReducer)]
            reducers = [*others, *([merging[layer]] if layer in merging else [])]
            check_reducers(block.attn, reducers)
            block.reducers = nn.LayerList(reducers)

    def freeze_stages(self, last: int) -> None:
        """Freeze the embedding and the blocks 0 to `last`, and keep them in evaluation mode; -1: train all."""
        if last >= self.depth:
            raise UserError(f'cannot freeze block {last} (FROZEN_STAGES): there are blocks 0 to {self.depth - 1}.')
        self.frozen = [self.patch_embed, self.pos_drop, *self.blocks[: last + 1]] if last >= 0 else []
        parameters = [p for layer in self.frozen for p in layer.parameters()]
        if self.frozen:
            parameters += [p for p in (self.cls_token, self.dist_token, self.pos_embed) if p is not None]
        for parameter in parameters:
            parameter.stop_gradient = True

    # ------------------------------------------------------------------------------------------------ forward
    def forward(
        self,
        x: Tensor,
        keep_rate: float | Sequence[float | None] | None = None,
        tokens: int | Sequence[int | None] | None = None,
        get_idx: bool = False,
    ):
        """Classify images.

        Args:
            x: normalized images [B, in_chans, H, W], sides divisible by the patch size.
            keep_rate: EViT keep rate of this pass, one number or one per block; None: see `set_keep_rate`. Blocks
                built with rate 1 ignore it.
            tokens: EViT: number of patch tokens to keep, one number or one per block; None: by the keep rate.
            get_idx: also return the kept positions.

        Returns:
            Logits [B, K]; in training, a distilled model returns (logits, distillation logits). With `get_idx`, a
            pair of these and the list `TokenState.indices`.
        """
        x, state = self.forward_tokens(x, keep_rate, tokens)
        logits = self.forward_head(x)
        return (logits, list(state.indices)) if get_idx else logits

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> tokens [B, num_prefix + N, C], normalized unless `global_pool` or no `norm`."""
        return self.forward_tokens(x)[0]

    def forward_tokens(
        self,
        x: Tensor,
        keep_rate: float | Sequence[float | None] | None = None,
        tokens: int | Sequence[int | None] | None = None,
        trace: bool = False,
    ) -> tuple[Tensor, TokenState]:
        """Run `forward_features`, and return also the token state; arguments as in `forward`.

        With `trace`, `TokenState.source` maps the output tokens to the input tokens of the first block.
        """
        return self.run_blocks(*self._begin(x, keep_rate, tokens, trace))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] | None = None,
        want: Collection[str] = ('tokens',),
        keep_rate: float | Sequence[float | None] | None = None,
        tokens: int | Sequence[int | None] | None = None,
    ) -> Intermediates:
        """Run `forward_features` and return intermediate results of blocks.

        Args:
            x, keep_rate, tokens: as in `forward`.
            indices, want: see `Classifier`.
        """
        want = requested(want, indices, self.depth)
        return self._collect(*self._begin(x, keep_rate, tokens, _traces(want)), want)

    def iter_intermediates(self, x: Tensor, want: Collection[str] = ('tokens',)) -> Iterator[BlockIntermediates]:
        """Yield the intermediates of each block as soon as it has run, which needs less memory."""
        want = requested(want, None, self.depth)
        x, state = self._begin(x, trace=_traces(want))
        for block in self.blocks:
            x, state = block(x, state._replace(want=want, recorded=()))
            yield state.recorded[0]

    def run_blocks(self, x: Tensor, state: TokenState, first: int = 0) -> tuple[Tensor, TokenState]:
        """Run the blocks from `first` on, with input `x` and `state` of this block; returns as `forward_tokens`."""
        for block in self.blocks[first:]:
            x, state = run_block(block, x, state, checkpoint=self.grad_checkpointing)
        if not self.global_pool:
            return x if self.norm is None else self.norm(x), state
        if state.size is not None:  # weight by token size, so that pooling averages over the unmerged tokens
            x = x * (state.size / state.size[:, self.num_prefix :].mean(1, keepdim=True))
        return x, state

    def _begin(self, x: Tensor, keep_rate=None, tokens=None, trace: bool = False) -> tuple[Tensor, TokenState]:
        """Return the input of the first block; arguments as in `forward_tokens`."""
        grid = self.grid_of(x)
        return self._begin_tokens(self.embed(x), grid, keep_rate, tokens, trace)

    def _begin_tokens(self, x: Tensor, grid=None, keep_rate=None, tokens=None, trace: bool = False):
        """Return the input of the first block for embedded tokens [B, num_prefix + N, C]; `grid` as in `TokenState`."""
        if self.relative and tokens is not None:
            raise UserError('relative positions (MODEL.TRANS.REL_POS) need all patch tokens; leave `tokens` at None.')
        keep_rates = per_block('keep_rate', self.keep_rate if keep_rate is None else keep_rate, self.depth)
        check_keep_rates(keep_rates)
        return x, TokenState(
            num_prefix=self.num_prefix,
            num_body=x.shape[1] - self.num_prefix,
            keep_rates=keep_rates,
            tokens=per_block('tokens', tokens, self.depth),
            source=paddle.eye(x.shape[1]).expand([x.shape[0], -1, -1]) if trace else None,
            grid=grid,
            bias=None if self.rel_pos_bias is None else self.rel_pos_bias(),
        )

    def _collect(self, x: Tensor, state: TokenState, want: Mapping[int, Collection[str]]) -> Intermediates:
        x, state = self.run_blocks(x, state._replace(want=want))
        return Intermediates(x, dict(zip(sorted(want), state.recorded)), state)

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """Return (rows, columns) of the patches of images [B, in_chans, H, W]."""
        return x.shape[2] // self.patch_embed.patch_size, x.shape[3] // self.patch_embed.patch_size

    def embed(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> tokens with position embedding [B, num_prefix + N, C]."""
        grid = self.grid_of(x)
        # Cast to the parameters' type, so that the residual stream stays in float32 under AMP.
        x = self.patch_embed(x).astype(self.cls_token.dtype)
        prefix = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        prefix = [token.expand([x.shape[0], -1, -1]) for token in prefix]
        if self.relative and grid != self.patch_embed.grid_size:
            raise UserError(
                f'the relative positions of this model need images of {size_text(self.patch_embed.img_size)} pixels; set '
                'DATA.IMAGE_SIZE to the size of the data, so that the model is built for it.'
            )
        x = paddle.concat([*prefix, x], axis=1)
        if self.pos_embed is None:
            return self.pos_drop(x)
        table = resize_position_table(self.pos_embed, self.patch_embed.grid_size, grid, self.num_prefix)
        return self.pos_drop(x + table)

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        """Tokens of `forward_features` -> logits [B, K]; a distilled model in training returns both logits.

        With `pre_logits`, return the input of the classifiers instead: [B, C], or a pair for a distilled model.
        """
        features = self._pool(x)
        if pre_logits:
            return features if self.distilled else features[0]
        features = tuple(self.head_drop(feature) for feature in features)
        if self.head_norm is not None:
            features = (self.head_norm(features[0]),)
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

    def no_weight_decay(self) -> set[str]:
        """Return the class token, the distillation token and the position embedding."""
        return {'cls_token', 'dist_token', 'pos_embed'}


def _check(embed_dim: int, num_heads: int, positions: Collection[str], variants: Collection[str]) -> None:
    if embed_dim % num_heads:
        raise UserError(
            f'{embed_dim} channels (EMBED_DIM) do not divide into {num_heads} heads (NUM_HEADS): change one.'
        )
    for kind, given, known in (('positions', positions, POSITIONS), ('variants', variants, VARIANTS)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise UserError(f"there are no {kind} '{unknown[0]}'; choose from {', '.join(known)}.")


def _traces(want: Mapping[int, Collection[str]]) -> bool:
    return any('source' in names for names in want.values())


# ---------------------------------------------------------------------------------------------------- builder
@register_model('vit', 'deit', 'evit')
def build_vit(config) -> VisionTransformer:
    """Build a Vision Transformer from a configuration."""
    model, trans = config.MODEL, config.MODEL.TRANS
    encoder = encoder_options(config)
    chosen = {
        'head_norm': trans.HEAD_NORM,
        'output_dropout': not trans.HIDDEN_DROPOUT,
        'rescaled_init': trans.RESCALED_INIT,
    }
    variants = [*encoder.pop('variants'), *(name for name, used in chosen.items() if used)]
    vit = VisionTransformer(
        **encoder,
        num_classes=model.NUM_CLASSES,
        reducers=reducer_specs(model),
        head_drop_rate=model.HEAD_DROPOUT,
        global_pool=trans.GLOBAL_POOL,
        representation_size=trans.REPRESENTATION_SIZE,
        variants=variants,
    )
    vit.freeze_stages(trans.FROZEN_STAGES)
    return vit
