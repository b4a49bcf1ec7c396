# SPDX-License-Identifier: Apache-2.0
"""YAML files of PaddleViT's DeiT, ViT and MAE folders, in the keys of LeanViT.

Each folder of PaddleViT has its own keys and defaults. The newest files of DeiT and ViT have flat keys (`MODEL.PATCH_SIZE`),
older ones `MODEL.TRANS.HIDDEN_SIZE` and the like; MAE has `MODEL.TRANS.ENCODER` and `DECODER`. What a file does not set gets
the newest defaults of its folder. The gMLP folder has LeanViT's keys already.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from utils.errors import UserError

Value = tuple[str, Any, str]  # dotted key, value, source

_SIZES = ('PATCH_SIZE', 'EMBED_DIM', 'DEPTH', 'NUM_HEADS', 'MLP_RATIO', 'QKV_BIAS')
_OLD_SIZES = {'HIDDEN_SIZE': 'EMBED_DIM', 'NUM_LAYERS': 'DEPTH', 'MLP_DIM': 'MLP_DIM'}
_DECODER = ('EMBED_DIM', 'DEPTH', 'NUM_HEADS')

# Old key -> LeanViT's key; None: dropped, since PaddleViT does not read it either, or LeanViT has one behavior.
_RENAMED = {
    **{f'MODEL.{size}': f'MODEL.TRANS.{size}' for size in _SIZES},
    **{f'MODEL.TRANS.ENCODER.{size}': f'MODEL.TRANS.{size}' for size in _SIZES},
    **{f'{group}.{old}': f'MODEL.TRANS.{new}' for group in ('MODEL', 'MODEL.TRANS') for old, new in _OLD_SIZES.items()},
    **{f'MODEL.TRANS.DECODER.{size}': f'MODEL.MAE.DECODER_{size}' for size in _DECODER},
    'MODEL.TRANS.MASK_RATIO': 'MODEL.MAE.MASK_RATIO',
    'MODEL.TRANS.NORM_PIX_LOSS': 'MODEL.MAE.NORM_PIX_LOSS',
    'TRAIN.NORMALIZE_TARGET': 'MODEL.MAE.NORM_PIX_LOSS',
    'MODEL.GLOBAL_POOL': 'MODEL.TRANS.GLOBAL_POOL',
    'MODEL.TRANS.IN_CHANNELS': 'DATA.IMAGE_CHANNELS',
    'MODEL.TRANS.INIT_VALUES': None,
    'MODEL.MAE_PRETRAIN': None,
    'MODEL.RESUME_EMA': None,
}
_MILESTONES = 'TRAIN.LR_SCHEDULER.MILESTONES'  # files of all folders may set it, and none uses it
_SECTIONS = ('MODEL.TRANS.ENCODER', 'MODEL.TRANS.DECODER')
_HEAD_SIZES = ('MODEL.ATTN_HEAD_SIZE', 'MODEL.TRANS.ATTN_HEAD_SIZE')

# MODEL.TYPE of a file -> LeanViT's MODEL.TYPE. These types in exactly this spelling are PaddleViT's.
_TYPES = {'ViT': 'vit', 'DeiT': 'deit', 'MAE': 'mae', 'PRETRAIN': 'mae', 'FINETUNE': 'vit', 'LINEARPROBE': 'vit'}

_IMAGENET = {'DATA.IMAGENET_MEAN': [0.485, 0.456, 0.406], 'DATA.IMAGENET_STD': [0.229, 0.224, 0.225]}
_NO_AUGMENTATION = {'TRAIN.RAND_AUGMENT': False, 'TRAIN.COLOR_JITTER': 0.0, 'TRAIN.RANDOM_ERASE_PROB': 0.0}
_NO_MIXING = {'TRAIN.SMOOTHING': 0.0, 'TRAIN.MIXUP_ALPHA': 0.0, 'TRAIN.CUTMIX_ALPHA': 0.0}
_STEPWISE = {
    'TRAIN.WARMUP_START_LR': 0.0,
    'TRAIN.END_LR': 0.0,
    'TRAIN.LINEAR_SCALED_LR': 256,
    'TRAIN.LR_SCHEDULER.UPDATE': 'step',
    'TRAIN.LR_SCHEDULER.SCALE_ENDS': False,
    'TRAIN.OPTIMIZER.BETAS': (0.9, 0.95),
    'TRAIN.BASE_LR': 1.5e-4,
    'TRAIN.NUM_EPOCHS': 800,
    'TRAIN.WARMUP_EPOCHS': 40.0,
    'TRAIN.WEIGHT_DECAY': 0.05,
}
_CLASSIFIER = {'MODEL.DROPPATH': 0.0, 'MODEL.DROPPATH_RAMP': True, 'TRAIN.RAND_AUGMENT_SPACE': 'paddlevit'}
_DEFAULTS = {
    'deit': {
        **_IMAGENET,
        **_CLASSIFIER,
        'TRAIN.WARMUP_EPOCHS': 5.0,
        'TRAIN.WEIGHT_DECAY': 0.05,
        'TRAIN.BASE_LR': 5e-4,
        'TRAIN.END_LR': 0.0,
        'TRAIN.MODEL_EMA': True,
        'TRAIN.RAND_AUGMENT': False,
    },
    'vit': {
        **_CLASSIFIER,
        **_NO_AUGMENTATION,
        **_NO_MIXING,
        'TRAIN.WARMUP_EPOCHS': 32.0,
        'TRAIN.WEIGHT_DECAY': 0.3,
        'TRAIN.BASE_LR': 3e-3,
        'TRAIN.END_LR': 0.0,
        'TRAIN.LINEAR_SCALED_LR': None,
        'TRAIN.CROP_SCALE': (0.05, 1.0),
        'TRAIN.HFLIP': 0.0,
    },
    'pretrain': {**_IMAGENET, **_STEPWISE, **_NO_AUGMENTATION, 'TRAIN.TASK': 'mae', 'TRAIN.CROP_SCALE': (0.2, 1.0)},
    'finetune': {**_IMAGENET, **_STEPWISE, **_CLASSIFIER},
    'linearprobe': {
        **_IMAGENET, **_STEPWISE, **_NO_AUGMENTATION, **_NO_MIXING, 'MODEL.DROPPATH': 0.0, 'TRAIN.TASK': 'linear_probe',
        'MODEL.TRANS.HEAD_NORM': True,
    },
}  # fmt: skip

# Keys that PaddleViT's pre-training and linear probe do not read, though a file may set them.
_UNREAD = (
    'TRAIN.SMOOTHING', 'TRAIN.MIXUP_', 'TRAIN.CUTMIX_', 'TRAIN.RAND_AUGMENT', 'TRAIN.AUTO_AUGMENT',
    'TRAIN.COLOR_JITTER', 'TRAIN.RANDOM_ERASE_', 'TRAIN.LAYER_DECAY',
)  # fmt: skip
_DROPOUTS = ('MODEL.DROPOUT', 'MODEL.ATTENTION_DROPOUT', 'MODEL.DROPPATH')


class Adapted(NamedTuple):
    """Content of a file in LeanViT's keys.

    Attributes:
        values: what the file sets.
        defaults: what its folder in PaddleViT sets for all files; files of BASE override these.
    """

    values: list[Value]
    defaults: list[Value]


def adapt(values: list[Value], path: str, model_type: str, known: Collection[str]) -> Adapted:
    """Rename PaddleViT's keys in the values of a YAML file; return values of other files unchanged.

    Args:
        path: the file.
        model_type: MODEL.TYPE that the files of BASE set.
        known: all keys of LeanViT.

    Raises:
        UserError: the file uses an option of PaddleViT that LeanViT does not have.
    """
    values = [value for value in _flat(values) if value[0] != _MILESTONES or value[0] in known]
    given = {name: value for name, value, _ in values}
    if not _is_paddlevit(given):
        return Adapted(values, [])
    folder = _folder(given, model_type)
    if folder not in _DEFAULTS:  # the schema names the key that no model has
        return Adapted(values, [])
    source = f"{path} (default of PaddleViT's {folder} files)"
    defaults = dict(_DEFAULTS[folder])
    if folder == 'deit' and 'distilled' in f'{given.get("MODEL.NAME", "")} {os.path.basename(path)}':
        defaults.update({'MODEL.TRANS.DISTILLED': True, 'TRAIN.DISTILLATION_TYPE': 'hard'})
    return Adapted(list(_renamed(values, folder)), [(name, value, source) for name, value in defaults.items()])


def _flat(values: Iterable[Value]) -> Iterator[Value]:
    """Expand MAE's sections, which LeanViT does not have."""
    for name, value, where in values:
        if name in _SECTIONS and isinstance(value, dict):
            yield from ((f'{name}.{key}', inner, where) for key, inner in value.items())
        else:
            yield name, value, where


def _is_paddlevit(given: dict[str, Any]) -> bool:
    kind = given.get('MODEL.TYPE')
    if 'MODEL.TYPE' in given and not (isinstance(kind, str) and (kind in _TYPES or kind.lower() in ('vit', 'deit'))):
        return False
    own = [name for name in given if name in _RENAMED]
    whole = kind in _TYPES and 'MODEL.TRANS.PATCH_SIZE' in given and given.get('BASE') in (None, '', [], [''])
    return bool(own) or whole


def _folder(given: dict[str, Any], model_type: str) -> str:
    kind = given.get('MODEL.TYPE', model_type)
    if kind in ('MAE', 'mae'):
        trained = any(name.startswith(('MODEL.TRANS.DECODER.', 'MODEL.TRANS.MASK_RATIO')) for name in given)
        return 'pretrain' if trained or kind == 'mae' else 'finetune'
    return kind.lower()


def _renamed(values: list[Value], folder: str) -> Iterator[Value]:
    channels = next((value for name, value, _ in values if _RENAMED.get(name) == 'MODEL.TRANS.EMBED_DIM'), None)
    for name, value, where in values:
        name = _RENAMED.get(name, name)
        if name in _HEAD_SIZES:
            _refuse_if(value not in (None, 'None'), name, where, 'the head size is EMBED_DIM / NUM_HEADS')
        elif name == 'MODEL.TRANS.MLP_DIM':
            numbers = isinstance(value, (int, float)) and isinstance(channels, (int, float))
            _refuse_if(
                not channels or not numbers, name, where, 'it needs HIDDEN_SIZE in the same file, and both a number'
            )
            yield 'MODEL.TRANS.MLP_RATIO', value / channels, where
        elif name == 'MODEL.TYPE':
            yield name, _type(value, folder), where
        elif folder == 'pretrain' and name in _DROPOUTS:
            _refuse_if(value not in (0, None), name, where, 'masked pre-training has no dropout')
        elif name is not None and not _is_unread(name, value, folder):
            yield name, value, where


def _type(value: str, folder: str) -> str:
    if folder in ('finetune', 'linearprobe'):
        return 'vit'
    return _TYPES.get(value, value)


def _is_unread(name: str, value, folder: str) -> bool:
    if folder in ('pretrain', 'linearprobe') and name.startswith(_UNREAD):
        return True
    if folder == 'pretrain':
        return name == 'MODEL.TRANS.GLOBAL_POOL'
    return (folder in ('finetune', 'linearprobe') and name.startswith('MODEL.MAE.')) or (
        name == 'TRAIN.LAYER_DECAY' and value in (None, 'None')
    )


def _refuse_if(wrong: bool, name: str, where: str, reason: str) -> None:
    if wrong:
        raise UserError(f'{where}: LeanViT has no {name}: {reason}; remove it.')
