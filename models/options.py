# SPDX-License-Identifier: Apache-2.0
"""Arguments of `VisionTransformer` from a configuration."""

from __future__ import annotations

from config import get_config
from models.layers import EViTSpec, MixerSpec, ReducerSpec, RemovalSpec, ToMeSpec, drop_path_rates, register_reducer
from models.layers.tokens import REDUCERS
from utils.errors import UserError

# Keys of MODEL.TRANS that define plain blocks.
_PLAIN = ('PATCH_SIZE', 'EMBED_DIM', 'DEPTH', 'NUM_HEADS', 'MLP_RATIO', 'QKV_BIAS', 'CONV_STEM')


def plain_options(config) -> dict:
    """Return arguments of `VisionTransformer` for plain blocks."""
    trans = config.MODEL.TRANS
    return {
        'img_size': config.DATA.IMAGE_SIZE,
        'in_chans': config.DATA.IMAGE_CHANNELS,
        'patch_size': trans.PATCH_SIZE,
        'embed_dim': trans.EMBED_DIM,
        'depth': trans.DEPTH,
        'num_heads': trans.NUM_HEADS,
        'mlp_ratio': trans.MLP_RATIO,
        'mixer': MixerSpec(qkv_bias=trans.QKV_BIAS),
        'variants': ['conv_stem'] if trans.CONV_STEM else [],
    }


def encoder_options(config) -> dict:
    """Return arguments of `VisionTransformer` for all parts except reducers and head."""
    model, trans = config.MODEL, config.MODEL.TRANS
    positions = {'absolute': trans.ABS_POS, 'shared_relative': 'shared' in trans.REL_POS}
    return {
        **plain_options(config),
        'mixer': mixer_specs(model),
        'removal': removal_spec(model.LAMBDA),
        'positions': [name for name, used in positions.items() if used],
        'drop_rate': model.DROPOUT,
        'drop_path_rate': drop_path_rates(model.DROPPATH, trans.DEPTH, model.DROPPATH_RAMP),
        'distilled': trans.DISTILLED,
        'layer_scale': trans.LAYER_SCALE,
    }


def dense_options(config) -> dict:
    """Return `encoder_options` for the backbone of a dense model.

    Raises:
        UserError: tokens are reduced, but maps need all of them; or MODEL.LAMBDA decays attention, and only classification has a
            schedule for λ.
    """
    options = encoder_options(config)
    if config.MODEL.EVIT.KEEP_RATE < 1 or config.MODEL.TOME.R or config.MODEL.TOME.SCHEDULE:
        raise UserError(
            f'MODEL.TYPE {config.MODEL.TYPE} takes no MODEL.EVIT or MODEL.TOME: feature maps need all tokens; remove them.'
        )
    removal = options['removal']
    if removal.prune_layers or removal.done_layers:
        raise UserError(
            f'MODEL.TYPE {config.MODEL.TYPE} does not support attention that decays in training: set '
            'MODEL.LAMBDA.REMOVED to True.'
        )
    return options


def detector_options(config) -> dict:
    """Arguments of a detector's `PatchEncoder`.

    Raises:
        UserError: as `dense_options`; or an image size that the levels of the pyramid do not divide.
    """
    options, det = dense_options(config), config.MODEL.DET
    del options['distilled']
    side = config.DATA.IMAGE_SIZE
    if not isinstance(side, int):
        raise UserError(
            f'MODEL.TYPE {config.MODEL.TYPE} takes square images, to which all others are padded: set DATA.IMAGE_SIZE to one '
            f'number, such as {max(side)}.'
        )
    for key, size in (('DATA.IMAGE_SIZE', side), ('MODEL.DET.POSITION_SIZE', det.POSITION_SIZE)):
        if size % options['patch_size']:
            raise UserError(f'{key} is {size}, but must be a multiple of the patch size {options["patch_size"]}.')
    return {**options, 'position_size': det.POSITION_SIZE}


def pretraining_options(config) -> dict:
    """Return arguments of `VisionTransformer` for self-supervised pre-training: plain blocks, no dropout."""
    model, trans = config.MODEL, config.MODEL.TRANS
    decaying = (*model.LAMBDA.PRUNE_LAYERS, *model.LAMBDA.DONE_LAYERS)
    if model.EVIT.KEEP_RATE < 1 or decaying or model.TOME.R or model.TOME.SCHEDULE:
        raise UserError(
            f'MODEL.TYPE {model.TYPE} does not support MODEL.EVIT, LAMBDA or TOME: remove them from the configuration.'
        )
    plain = get_config().MODEL.TRANS
    other = sorted(key for key in trans if key not in _PLAIN and trans[key] != plain[key])
    if other:
        raise UserError(
            f'MODEL.TYPE {model.TYPE} does not support MODEL.TRANS.{other[0]}: set it to {plain[other[0]]}.'
        )
    return plain_options(config)


def mixer_specs(model) -> MixerSpec | list[MixerSpec]:
    """Return the mixers of MODEL.TRANS.MIXER, with REL_POS: one for all blocks, or one per block."""
    trans = model.TRANS
    if len(trans.MIXER) not in (1, trans.DEPTH):
        raise UserError(
            f'MODEL.TRANS.MIXER names {len(trans.MIXER)} mixers, but must name one, or one for each of {trans.DEPTH} '
            'blocks.'
        )
    specs = [_mixer_spec(model, name) for name in trans.MIXER]
    if 'block' in trans.REL_POS and all(spec.name != 'relative' for spec in specs):
        raise UserError(
            'MODEL.TRANS.REL_POS block needs attention: add it to MODEL.TRANS.MIXER, or remove block from REL_POS.'
        )
    return specs if len(specs) > 1 else specs[0]


def _mixer_spec(model, name: str) -> MixerSpec:
    if name.lower() == 'attention' and 'block' in model.TRANS.REL_POS:
        name = 'relative'
    options = _mixer_options(model, name.lower())
    return MixerSpec(name, model.TRANS.QKV_BIAS, model.TRANS.KEY_BIAS, model.ATTENTION_DROPOUT, options)


def _mixer_options(model, name: str) -> dict:
    if name == 'windowed':
        return {'size': model.WINDOWED.SIZE, 'rel_pos': model.WINDOWED.REL_POS}
    return {key.lower(): value for key, value in model.get(name.upper(), {}).items()}


def reducer_specs(model) -> list[ReducerSpec]:
    """Return the enabled token reducers, in the order of their registration."""
    return [spec for build in REDUCERS.values() if (spec := build(model)) is not None]


@register_reducer('evit')
def _evit(model) -> EViTSpec:
    """Return EViT in all blocks, with keep rate 1 outside DROP_LOC: a forward pass may reduce tokens in any block."""
    evit, depth = model.EVIT, model.TRANS.DEPTH
    rate: float | list[float] = 1.0
    if evit.KEEP_RATE < 1:
        outside = [layer for layer in evit.DROP_LOC if not 0 <= layer < depth]
        if outside:
            raise UserError(f'MODEL.EVIT.DROP_LOC names block {outside[0]}, but there are blocks 0 to {depth - 1}.')
        clash = sorted({*model.LAMBDA.PRUNE_LAYERS, *model.LAMBDA.DONE_LAYERS} & {*evit.DROP_LOC})
        if clash:
            raise UserError(
                f'MODEL.EVIT.DROP_LOC names block {clash[0]}, whose attention MODEL.LAMBDA removes: remove it from one.'
            )
        rate = [evit.KEEP_RATE if layer in evit.DROP_LOC else 1.0 for layer in range(depth)]
    return EViTSpec(rate, evit.FUSE_TOKEN)


@register_reducer('tome')
def _tome(model) -> ToMeSpec | None:
    """Return ToMe, or None if MODEL.TOME merges no tokens."""
    tome = model.TOME
    if not tome.R and tome.SCHEDULE is None:
        return None
    schedule = (tome.R, tome.INFLECT) if tome.SCHEDULE is None else list(tome.SCHEDULE)
    return ToMeSpec(schedule, tome.START_IDX, tome.PROP_ATTN)


def removal_spec(removal) -> RemovalSpec:
    """Return the blocks of MODEL.LAMBDA; with REMOVED, they are built without attention."""
    if removal.REMOVED:
        return RemovalSpec(removed_layers=(*removal.PRUNE_LAYERS, *removal.DONE_LAYERS))
    return RemovalSpec(removal.PRUNE_LAYERS, removal.DONE_LAYERS)
