# SPDX-License-Identifier: Apache-2.0
"""YAML files of PaddleViT's DeiT, ViT and MAE folders, and the arguments that its scripts pass to `update_config`."""

from __future__ import annotations

import argparse
import contextlib
import itertools

import pytest

from config import get_config, update_config
from models import build_model
from utils.errors import UserError

WIDTHS = {
    'tiny': (192, 12, 3),
    'small': (384, 12, 6),
    'base': (768, 12, 12),
    'large': (1024, 24, 16),
    'huge': (1280, 32, 16),
}

DEIT = [f'deit_{size}_{kind}patch16_224' for size in ('tiny', 'small', 'base') for kind in ('', 'distilled_')]
DEIT += ['deit_base_patch16_384', 'deit_base_distilled_patch16_384']
VIT = [
    f'vit_{size}_patch{p}_{side}'
    for size, p, side in itertools.product(('tiny', 'small', 'base', 'large'), (16, 32), (224, 384))
]
MAE = [f'vit_{size}_patch{p}_224' for size, p in (('base', 16), ('large', 16), ('huge', 14))]

FLAT = """
DATA:
    IMAGE_SIZE: {image}
    CROP_PCT: 0.875
MODEL:
    TYPE: {kind}
    NAME: {name}
    DROPPATH: 0.1
    PATCH_SIZE: {patch}
    EMBED_DIM: {width}
    MLP_RATIO: 4.0
    DEPTH: {depth}
    NUM_HEADS: {heads}
    QKV_BIAS: True
    ATTN_HEAD_SIZE: None
TRAIN:
    NUM_EPOCHS: 300
    BASE_LR: 5e-4
    ACCUM_ITER: 1
"""
OLD = """
MODEL:
    TYPE: {kind}
    NAME: {name}
    TRANS:
        PATCH_SIZE: {patch}
        HIDDEN_SIZE: {width}
        MLP_DIM: {mlp}
        NUM_LAYERS: {depth}
        NUM_HEADS: {heads}
        QKV_BIAS: true
TRAIN:
    LR_SCHEDULER:
        MILESTONES: "30, 60, 90"
"""
PRETRAIN = """
MODEL:
    TYPE: PRETRAIN
    NAME: {name}
    DROPPATH: 0.0
    TRANS:
        PATCH_SIZE: {patch}
        MLP_RATIO: 4.0
        QKV_BIAS: true
        MASK_RATIO: 0.6
        ENCODER:
            EMBED_DIM: {width}
            DEPTH: {depth}
            NUM_HEADS: {heads}
        DECODER:
            EMBED_DIM: 512
            DEPTH: 8
            NUM_HEADS: 8
TRAIN:
    GRAD_CLIP: None
    RAND_AUGMENT: True
    SMOOTHING: 0.1
    LAYER_DECAY: None
"""
FINETUNE = """
MODEL:
    TYPE: FINETUNE
    NAME: {name}
    DROPPATH: 0.1
    GLOBAL_POOL: True
    TRANS:
        PATCH_SIZE: {patch}
        ENCODER:
            EMBED_DIM: {width}
            DEPTH: {depth}
            NUM_HEADS: {heads}
TRAIN:
    LAYER_DECAY: 0.65
    WARMUP_START_LR: 0.0
    LINEAR_SCALED_LR: 256
    END_LR: 1e-6
"""
LINEARPROBE = """
MODEL:
    TYPE: LINEARPROBE
    NAME: {name}
    GLOBAL_POOL: {pooled}
    TRANS:
        PATCH_SIZE: {patch}
        ENCODER:
            EMBED_DIM: {width}
            DEPTH: {depth}
            NUM_HEADS: {heads}
TRAIN:
    ACCUM_ITER: 4
    NUM_EPOCHS: 90
    WARMUP_EPOCHS: 10
    WEIGHT_DECAY: 0.0
    BASE_LR: 0.1
    LAYER_DECAY: 0.75
    SMOOTHING: 0.1
    RAND_AUGMENT: True
    MIXUP_ALPHA: 0.8
    RANDOM_ERASE_PROB: 0.25
    OPTIMIZER:
        NAME: 'LARS'
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text: str, name: str = 'file', **values):
        path = tmp_path / f'{name}.yaml'
        path.write_text(text.format(name=name, **values))
        return get_config(str(path))

    return load_text


def sizes(name: str) -> dict:
    width, depth, heads = next(size for key, size in WIDTHS.items() if key in name)
    patch, image = int(name.split('patch')[1][:2]), int(name[-3:])
    return {'width': width, 'depth': depth, 'heads': heads, 'patch': patch, 'image': image, 'mlp': 4 * width}


def check_sizes(config, name: str) -> None:
    wanted, trans = sizes(name), config.MODEL.TRANS
    assert (wanted['width'], wanted['depth'], wanted['heads']) == (trans.EMBED_DIM, trans.DEPTH, trans.NUM_HEADS)
    assert (wanted['patch'], 4.0, name) == (trans.PATCH_SIZE, trans.MLP_RATIO, config.MODEL.NAME)


@pytest.mark.parametrize('name', DEIT)
def test_deit(load, name):
    config = load(FLAT, name, kind='deit', **sizes(name))
    check_sizes(config, name)
    assert int(name[-3:]) == config.DATA.IMAGE_SIZE
    assert ('distilled' in name) == config.MODEL.TRANS.DISTILLED
    assert ('hard' if 'distilled' in name else 'none') == config.TRAIN.DISTILLATION_TYPE
    assert (config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert config.TRAIN.MODEL_EMA and not config.TRAIN.RAND_AUGMENT
    assert (config.MODEL.DROPPATH, config.MODEL.DROPPATH_RAMP) == (0.1, True)
    assert (config.TRAIN.WARMUP_EPOCHS, config.TRAIN.WEIGHT_DECAY, config.TRAIN.END_LR) == (5.0, 0.05, 0.0)


@pytest.mark.parametrize('name', VIT)
def test_vit(load, name):
    config = load(FLAT, name, kind='ViT', **sizes(name))
    check_sizes(config, name)
    assert (config.DATA.IMAGENET_MEAN, config.TRAIN.MODEL_EMA) == ([0.5, 0.5, 0.5], False)
    assert (config.TRAIN.LINEAR_SCALED_LR, config.TRAIN.WARMUP_EPOCHS, config.TRAIN.WEIGHT_DECAY) == (None, 32.0, 0.3)
    assert (config.TRAIN.MIXUP_ALPHA, config.TRAIN.CUTMIX_ALPHA, config.TRAIN.SMOOTHING) == (0.0, 0.0, 0.0)
    assert config.TRAIN.BASE_LR == 5e-4  # the file


@pytest.mark.parametrize('kind', ['ViT', 'DeiT'])
def test_old_spellings(load, kind):
    name = f'{kind.lower()}_small_patch16_224'
    config = load(OLD, name, kind=kind, **sizes(name))
    check_sizes(config, name)
    assert config.DATA.IMAGENET_MEAN[0] == (0.5 if kind == 'ViT' else 0.485)


@pytest.mark.parametrize('name', MAE)
def test_mae(load, name):
    config = load(PRETRAIN, name, **sizes(name))
    check_sizes(config, name)
    mae = config.MODEL.MAE
    assert (config.MODEL.TYPE, config.TRAIN.TASK, mae.MASK_RATIO, mae.NORM_PIX_LOSS) == ('mae', 'mae', 0.6, True)
    assert (mae.DECODER_EMBED_DIM, mae.DECODER_DEPTH, mae.DECODER_NUM_HEADS) == (512, 8, 8)
    assert (config.TRAIN.OPTIMIZER.BETAS, config.TRAIN.LR_SCHEDULER.UPDATE) == ((0.9, 0.95), 'step')
    assert (config.TRAIN.NUM_EPOCHS, config.TRAIN.BASE_LR, config.DATA.IMAGENET_MEAN[0]) == (800, 1.5e-4, 0.485)
    assert not config.TRAIN.RAND_AUGMENT  # PaddleViT's pre-training does not read it
    tuned = load(FINETUNE, name, **sizes(name))
    check_sizes(tuned, name)
    assert (tuned.MODEL.TYPE, tuned.TRAIN.TASK, tuned.MODEL.TRANS.GLOBAL_POOL) == ('vit', 'supervised', True)
    assert (tuned.TRAIN.LAYER_DECAY, tuned.TRAIN.END_LR, tuned.TRAIN.LR_SCHEDULER.SCALE_ENDS) == (0.65, 1e-6, False)


@pytest.mark.parametrize('pooled', [False, True])
def test_linear_probe(load, pooled):
    """Its script reads no augmentation but crops and flips, and no mixing, whatever a file sets."""
    name = 'vit_base_patch16_224'
    config = load(LINEARPROBE, name, pooled=pooled, **sizes(name))
    check_sizes(config, name)
    train, trans = config.TRAIN, config.MODEL.TRANS
    assert ('vit', 'linear_probe', True, pooled) == (config.MODEL.TYPE, train.TASK, trans.HEAD_NORM, trans.GLOBAL_POOL)
    assert (train.OPTIMIZER.NAME, train.BASE_LR, train.END_LR, train.LINEAR_SCALED_LR) == ('LARS', 0.1, 0.0, 256)
    assert (train.CROP_SCALE, train.HFLIP, config.DATA.IMAGENET_MEAN[0]) == ((0.08, 1.0), 0.5, 0.485)
    unread = (train.SMOOTHING, train.MIXUP_ALPHA, train.CUTMIX_ALPHA, train.RANDOM_ERASE_PROB, train.COLOR_JITTER)
    assert unread == (0.0,) * 5 and not train.RAND_AUGMENT and train.LAYER_DECAY == 1.0


def test_they_build(load):
    small = {'width': 24, 'depth': 1, 'heads': 3, 'patch': 16, 'image': 32, 'mlp': 96}
    for text, kind in ((FLAT, 'deit'), (FLAT, 'vit'), (OLD, 'ViT'), (PRETRAIN, ''), (FINETUNE, ''), (LINEARPROBE, '')):
        model = build_model(load(text, f'small_{kind}', kind=kind, pooled=False, **small))
        assert model.blocks[0].attn.num_heads == 3


def test_base_files_override_defaults_but_not_values(tmp_path):
    (tmp_path / 'base.yaml').write_text(FLAT.format(name='deit_x', kind='deit', **sizes('tiny_patch16_224')))
    (tmp_path / 'top.yaml').write_text('BASE: [base.yaml]\nMODEL: {EMBED_DIM: 96}\nTRAIN: {MODEL_EMA: False}')
    config = get_config(str(tmp_path / 'top.yaml'))
    assert (config.MODEL.TRANS.EMBED_DIM, config.MODEL.DROPPATH, config.TRAIN.MODEL_EMA) == (96, 0.1, False)
    (tmp_path / 'own.yaml').write_text('MODEL: {TYPE: deit, NAME: own, TRANS: {EMBED_DIM: 96}}')  # a file of this suite
    assert get_config(str(tmp_path / 'own.yaml')).DATA.IMAGENET_MEAN == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('MODEL: {TYPE: Swin, EMBED_DIM: 96, WINDOW_SIZE: 7}', 'MODEL.TYPE Swin is not an architecture of LeanViT, which has .*gmlp'),
        ('MODEL: {NUM_HEADS: [3, 6], TYPE: pvtv2}', 'MODEL.TYPE pvtv2 is not an architecture'),
        ('MODEL: {TYPE: vit, EMBED_DIM: 96, ATTN_HEAD_SIZE: 7}', 'no MODEL.ATTN_HEAD_SIZE: the head size is EMBED_DIM'),
        ('MODEL: {TYPE: ViT, MLP_DIM: 96}', 'MODEL.TRANS.MLP_DIM: it needs HIDDEN_SIZE'),
        ('MODEL: {TYPE: PRETRAIN, DROPOUT: 0.1, TRANS: {ENCODER: {DEPTH: 2}}}', 'no MODEL.DROPOUT: masked'),
        ('MODEL: {TYPE: vit, EMBED_DIMS: 96}', "unknown key 'MODEL.EMBED_DIMS'"),
    ],
)  # fmt: skip
def test_what_is_not_there_gets_one_sentence(tmp_path, text, message):
    (tmp_path / 'm.yaml').write_text(text)
    with pytest.raises(UserError, match=message):
        get_config(str(tmp_path / 'm.yaml'))


def test_its_namespace_with_nones(tmp_path):
    """The parsers of PaddleViT's scripts set every flag, None or False if it is not given."""
    path = tmp_path / 'deit.yaml'
    path.write_text(FLAT.format(name='deit', kind='deit', **sizes('tiny_patch16_224')) + 'EVAL: True\n')
    nones = (
        'dataset',
        'data_path',
        'output',
        'batch_size_eval',
        'image_size',
        'accum_iter',
        'pretrained',
        'resume',
        'last_epoch',
    )
    args = argparse.Namespace(cfg=str(path), batch_size=8, eval=False, amp=False, ngpus=-1, **dict.fromkeys(nones))
    config = update_config(get_config(), args)
    assert (config.MODEL.TRANS.EMBED_DIM, config.DATA.BATCH_SIZE, config.DATA.BATCH_SIZE_EVAL) == (192, 8, 8)
    assert (config.DATA.DATASET, config.TRAIN.ACCUM_ITER, config.EVAL) == ('imagenet2012', 1, True)
    args.accum_iter = 0
    assert update_config(get_config(), args).TRAIN.ACCUM_ITER == 1
    args.cfg = None
    assert update_config(get_config(), args).MODEL.TYPE == 'gmlp'


@pytest.mark.parametrize('value', ['null', '[]', '[1]', '{a: 1}', '3', '.inf', 'x', '""', '[[1]]'])
@pytest.mark.parametrize(
    'text',
    [
        'MODEL: {{TYPE: {}, DEPTH: 2}}', 'MODEL: {{DEPTH: {}}}', 'MODEL: {{TYPE: ViT, MLP_DIM: {}, HIDDEN_SIZE: 8}}',
        'MODEL: {{TYPE: ViT, MLP_DIM: 8, HIDDEN_SIZE: {}}}', 'MODEL: {{TYPE: ViT, TRANS: {{PATCH_SIZE: 16}}}}\nBASE: {}',
        'MODEL: {{TYPE: PRETRAIN, TRANS: {{ENCODER: {}}}}}', 'MODEL: {{TYPE: ViT, NAME: {}, DEPTH: 2}}',
    ],
)  # fmt: skip
def test_values_of_any_kind_are_read_or_refused(tmp_path, text, value):
    (tmp_path / 'm.yaml').write_text(text.format(value))
    with contextlib.suppress(UserError):
        get_config(str(tmp_path / 'm.yaml'))
