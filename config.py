# SPDX-License-Identifier: Apache-2.0
"""The configuration tree: every key, its default and what it does.

A run is described by one YAML file. Values are taken in this order, later ones winning:

    defaults below  <  each file of BASE, recursively  <  the YAML itself  <  command-line flags  <  -opts KEY VALUE

>>> config = get_config('./configs/gmlp_s16_224.yaml', opts=['MODEL.NUM_CLASSES', 10])

Keys are PaddleViT's where PaddleViT has the key; its YAML files load unchanged, old spellings included.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection

from yacs.config import CfgNode as CN

from utils.errors import UserError
from utils.schema import Schema

_C = CN()
_C.BASE = ['']  # YAML files to inherit from, relative to the file that names them

# ---------------------------------------------------------------------------------------------------- data
_C.DATA = CN()
_C.DATA.DATASET = 'imagenet2012'  # a registered data set; docs/data.md lists them
_C.DATA.DATA_PATH = '/dataset/imagenet/'  # folder that holds the data
_C.DATA.BATCH_SIZE = 256  # training images per process and micro-batch
_C.DATA.BATCH_SIZE_EVAL = None  # evaluation images per process; None: BATCH_SIZE
_C.DATA.IMAGE_SIZE = 224  # side of the square input, pixels
_C.DATA.IMAGE_CHANNELS = 3  # 3: RGB, 1: grey
_C.DATA.CROP_PCT = 0.875  # evaluation: shorter side is resized to floor(IMAGE_SIZE / CROP_PCT), then centre-cropped
_C.DATA.CROP = 'auto'  # resized: RandomResizedCrop / CROP_PCT; padded: 4 px of black (CIFAR); auto: padded up to 32 px
_C.DATA.EVAL_CROP = 'centre'  # evaluation: centre, as CROP_PCT says; squash: both sides are resized to IMAGE_SIZE
_C.DATA.VIEWS = 1  # views of each training image: 1, or 2 that are augmented differently (MoCo-v3)
_C.DATA.INTERPOLATION = 'bicubic'  # resampling: bicubic, bilinear, or random (training: one of both per image)
_C.DATA.FAST_RESIZE = True  # training: crops resized by OpenCV, close to Pillow's pixels; False: exactly those, slower
_C.DATA.IMAGENET_MEAN = [0.5, 0.5, 0.5]  # subtracted from images scaled to [0, 1]; a 1-channel model takes the first
_C.DATA.IMAGENET_STD = [0.5, 0.5, 0.5]  # divided by, after that
_C.DATA.NUM_WORKERS = 4  # loading processes per training process; 0 loads in the training process itself
_C.DATA.PREFETCH = 2  # batches each worker prepares ahead
_C.DATA.TIMEOUT = 300.0  # seconds to wait for a batch before the run is ended with an error; 0 waits for ever
_C.DATA.CACHE = 'no'  # image files held in memory: no; full: all; part: a process holds, and sees, its share only
_C.DATA.BAD_IMAGE = 'error'  # unreadable image: error ends the run and names it; skip leaves it out and counts it
_C.DATA.EXIF_ROTATE = False  # rotate as the EXIF orientation says (phone pictures); published accuracies ignore it

# ---------------------------------------------------------------------------------------------------- model
_C.MODEL = CN()
_C.MODEL.TYPE = 'gmlp'  # a registered architecture, see `python -m models`
_C.MODEL.NAME = 'gmlp'  # shown in logs and tables
_C.MODEL.NUM_CLASSES = None  # None: taken from the data set; 1000 when a model is built without one
_C.MODEL.PRETRAINED = None  # weights to start from, with or without .pdparams; none: from scratch
_C.MODEL.FRESH_HEAD = False  # training: a new classifier even where PRETRAINED has one of as many classes
_C.MODEL.RESUME = None  # run folder or checkpoint to continue
_C.MODEL.DROPOUT = 0.0  # rate after the layers of an MLP
_C.MODEL.ATTENTION_DROPOUT = 0.0  # rate of the attention weights
_C.MODEL.HEAD_DROPOUT = 0.0  # rate of what the classifier of a Vision Transformer sees
_C.MODEL.DROPPATH = 0.1  # stochastic depth rate
_C.MODEL.DROPPATH_RAMP = False  # True: the rate grows linearly over the depth, from 0 to DROPPATH

_C.MODEL.PUBLISHED = CN()  # facts about the published weights of this file's model, shown by `python -m models`
_C.MODEL.PUBLISHED.ACC1 = None  # ImageNet-1k validation, percent
_C.MODEL.PUBLISHED.ACC5 = None  # top-5
_C.MODEL.PUBLISHED.WEIGHTS = None  # where the upstream file is

_C.MODEL.MIXER = CN()  # gMLP
_C.MODEL.MIXER.PATCH_SIZE = 16  # side of a patch, pixels
_C.MODEL.MIXER.EMBED_DIM = 768  # channels of a token
_C.MODEL.MIXER.DEPTH = 12  # number of blocks
_C.MODEL.MIXER.MLP_RATIO = 6.0  # channels inside a block / EMBED_DIM
_C.MODEL.MIXER.STEM_NORM = False  # LayerNorm after the patch embedding

_C.MODEL.TRANS = CN()  # Vision Transformer
_C.MODEL.TRANS.PATCH_SIZE = 16  # side of a patch, pixels
_C.MODEL.TRANS.EMBED_DIM = 768  # channels of a token
_C.MODEL.TRANS.DEPTH = 12  # number of blocks
_C.MODEL.TRANS.NUM_HEADS = 12  # heads of each attention
_C.MODEL.TRANS.MLP_RATIO = 4.0  # channels inside an MLP / EMBED_DIM
_C.MODEL.TRANS.QKV_BIAS = True  # biases of query, key and value
_C.MODEL.TRANS.GLOBAL_POOL = False  # classify the normalised mean of the patch tokens, not the class token
_C.MODEL.TRANS.DISTILLED = False  # a second classifier for a teacher's labels
_C.MODEL.TRANS.REPRESENTATION_SIZE = None  # channels of a tanh layer before the classifier; None: there is none
_C.MODEL.TRANS.FROZEN_STAGES = -1  # train neither the embedding nor the blocks 0 to this one; -1: train all
_C.MODEL.TRANS.ABS_POS = True  # add a learned position to each token
_C.MODEL.TRANS.REL_POS = ()  # learned biases by displacement in the attention: block (each its own), shared, or both
_C.MODEL.TRANS.KEY_BIAS = True  # of the biases of QKV_BIAS those of the keys too; False: BEiT's q_bias and v_bias
_C.MODEL.TRANS.LAYER_SCALE = None  # first factor of each channel of the residual branches; None: there are none
_C.MODEL.TRANS.RESCALED_INIT = False  # start with smaller weights the deeper the block, and a tiny classifier (BEiT)

_C.MODEL.EVIT = CN()  # EViT: blocks that keep only the patch tokens the class token attends to
_C.MODEL.EVIT.KEEP_RATE = 1.0  # share of the tokens kept by each block of DROP_LOC; 1: off
_C.MODEL.EVIT.DROP_LOC = (3, 6, 9)  # those blocks, numbered from 0
_C.MODEL.EVIT.FUSE_TOKEN = False  # fuse the others into one token instead of dropping them
_C.MODEL.EVIT.SHRINK_START_EPOCH = 0  # training: epochs with all tokens before the keep rate starts to fall
_C.MODEL.EVIT.SHRINK_EPOCHS = 0  # training: epochs it takes to fall from 1 to KEEP_RATE

_C.MODEL.LAMBDA = CN()  # "MLP Can Be A Good Transformer Learner": blocks that lose their attention
_C.MODEL.LAMBDA.PRUNE_LAYERS = ()  # blocks whose attention fades in training, numbered from 0
_C.MODEL.LAMBDA.DONE_LAYERS = ()  # blocks whose attention faded in an earlier training
_C.MODEL.LAMBDA.REMOVED = False  # build the blocks of both lists without attention: for a model that is trained
_C.MODEL.LAMBDA.START_EPOCH = 0  # training: finished epochs up to which the weight of the fading attention is 1
_C.MODEL.LAMBDA.DECAY_EPOCHS = None  # training: epochs it takes to fall to 0; None: 299/400 of the remaining epochs

_C.MODEL.TOME = CN()  # ToMe: blocks that merge similar tokens
_C.MODEL.TOME.R = 0  # tokens each block merges; 0: off
_C.MODEL.TOME.INFLECT = 0.0  # -1: R falls over the depth from 2 R to 0; 1: it rises; values between do so less
_C.MODEL.TOME.SCHEDULE = None  # a list of R for the blocks that merge, in order, instead of R and INFLECT
_C.MODEL.TOME.START_IDX = 0  # blocks with attention that come before those that merge
_C.MODEL.TOME.PROP_ATTN = True  # a merged token weighs in the attention as much as the tokens it stands for

_C.MODEL.MAE = CN()  # masked autoencoder; its encoder is MODEL.TRANS
_C.MODEL.MAE.DECODER_EMBED_DIM = 512  # channels of a token of the decoder
_C.MODEL.MAE.DECODER_DEPTH = 8  # number of its blocks; 0: there is no decoder
_C.MODEL.MAE.DECODER_NUM_HEADS = 16  # heads of each of its attentions
_C.MODEL.MAE.MASK_RATIO = 0.75  # share of the patches that are removed
_C.MODEL.MAE.NORM_PIX_LOSS = True  # rebuild patches normalised by their own mean and variance

_C.MODEL.MOCO = CN()  # MoCo-v3; its encoder is MODEL.TRANS
_C.MODEL.MOCO.DIM = 256  # channels of the features that are compared
_C.MODEL.MOCO.MLP_DIM = 4096  # hidden channels of projector and predictor
_C.MODEL.MOCO.MOMENTUM = 0.99  # share of the old average in the momentum encoder's first step; it rises to 1
_C.MODEL.MOCO.TEMPERATURE = 0.2  # similarities are divided by it
_C.MODEL.MOCO.FREEZE_PATCH = False  # leave the patch embedding as it was drawn, for stability

_C.MODEL.MSMLP = CN()  # MS-MLP
_C.MODEL.MSMLP.PATCH_SIZE = 4  # side of a patch, pixels
_C.MODEL.MSMLP.EMBED_DIM = 96  # channels of the first stage, doubled by each further one
_C.MODEL.MSMLP.DEPTHS = [3, 3, 9, 3]  # blocks of each stage
_C.MODEL.MSMLP.SHIFT_DIST = [-2, -1, 0, 1, 2]  # pixels each group of channels is shifted by; as many groups as numbers
_C.MODEL.MSMLP.MIX_SIZE = [[1, 1, 3, 5, 7], [1, 3, 3, 5, 7], [1, 5, 5, 5, 7], [1, 7, 7, 7, 7]]  # per stage: kernels
_C.MODEL.MSMLP.MLP_RATIO = 4.0  # channels inside an MLP / channels
_C.MODEL.MSMLP.PATCH_NORM = True  # LayerNorm after the patch embedding

# ---------------------------------------------------------------------------------------------------- training
_C.TRAIN = CN()
_C.TRAIN.TASK = 'supervised'  # supervised: learn classes; mae: rebuild removed patches; mocov3: match two views
_C.TRAIN.LAST_EPOCH = 0  # last finished epoch, for resuming from a file that holds weights only
_C.TRAIN.NUM_EPOCHS = 300  # length of the run
_C.TRAIN.WARMUP_EPOCHS = 20.0  # length of the warm-up, may be a fraction
_C.TRAIN.WEIGHT_DECAY = 0.1  # on tensors of two or more dimensions that the model does not exempt; mocov3: on all
_C.TRAIN.BASE_LR = 0.001  # learning rate after the warm-up
_C.TRAIN.WARMUP_START_LR = 1e-6  # where the warm-up starts
_C.TRAIN.END_LR = 1e-5  # where the schedule ends
_C.TRAIN.LINEAR_SCALED_LR = 512  # learning rates are multiplied by global batch / this; None: used as they are
_C.TRAIN.LR_SCHEDULER = CN()
_C.TRAIN.LR_SCHEDULER.NAME = 'warmupcosine'  # a name of engine/schedules.py
_C.TRAIN.LR_SCHEDULER.UPDATE = 'epoch'  # epoch: constant inside an epoch (PaddleViT, timm); step: follows every step
_C.TRAIN.LR_SCHEDULER.LAG = 0  # UPDATE epoch: epoch e, from 1, trains at schedule index e - LAG (DeiT's loop: 2)
_C.TRAIN.LR_SCHEDULER.SCALE_ENDS = True  # LINEAR_SCALED_LR acts on WARMUP_START_LR and END_LR too (DeiT: False)
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30.0  # NAME step: epochs between decays
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # NAME step: factor of each decay
_C.TRAIN.LAYER_DECAY = 1.0  # learning-rate factor per layer, from the head downwards; 1: off
_C.TRAIN.GRAD_CLIP = None  # largest global gradient norm; None: off
_C.TRAIN.ACCUM_ITER = 1  # micro-batches per optimiser step; equals one batch that many times as large
_C.TRAIN.OPTIMIZER = CN()
_C.TRAIN.OPTIMIZER.NAME = 'AdamW'  # AdamW, SGD, Lamb, LARS
_C.TRAIN.OPTIMIZER.EPS = 1e-8  # AdamW, Lamb
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)  # AdamW, Lamb
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # SGD, LARS
_C.TRAIN.OPTIMIZER.NESTEROV = False  # SGD
_C.TRAIN.MODEL_EMA = False  # keep an exponential moving average of the weights, validated beside them
_C.TRAIN.MODEL_EMA_DECAY = 0.99996  # share of the old average kept at each step
_C.TRAIN.RECOMPUTE = False  # compute blocks again in the backward pass: half the memory, a third more time
_C.TRAIN.NONFINITE = 'error'  # loss or gradient not finite: error ends the run on all processes; skip drops the step
_C.TRAIN.DROP_LAST = False  # leave out the last incomplete batch of an epoch, as DeiT and its descendants do

# augmentation, in the order it is applied
_C.TRAIN.REPEATED_AUG = 0  # augment each image that many times in a row, an epoch keeping its length (DeiT: 3); 0: off
_C.TRAIN.CROP_SCALE = (0.08, 1.0)  # RandomResizedCrop: range of the area
_C.TRAIN.CROP_RATIO = (0.75, 4.0 / 3.0)  # RandomResizedCrop: range of width / height
_C.TRAIN.HFLIP = 0.5  # probability of a horizontal flip
_C.TRAIN.RAND_AUGMENT = True  # random operations on each image
_C.TRAIN.RAND_AUGMENT_LAYERS = 2  # operations drawn per image, each applied with probability 0.5
_C.TRAIN.RAND_AUGMENT_MAGNITUDE = 9  # mean strength, 0 to 10; each draw is normal with deviation 0.5
_C.TRAIN.RAND_AUGMENT_SPACE = 'timm'  # timm: rand-m9-mstd0.5-inc1; paddlevit: its fills and pixel translation
_C.TRAIN.AUTO_AUGMENT = False  # the ImageNet policy, when RAND_AUGMENT is off
_C.TRAIN.COLOR_JITTER = 0.4  # brightness, contrast, saturation, when neither of the above is on
_C.TRAIN.RANDOM_ERASE_PROB = 0.25  # probability of covering boxes of an image; 0: off
_C.TRAIN.RANDOM_ERASE_MODE = 'pixel'  # pixel: noise per pixel; rand: one random colour; const: zeros
_C.TRAIN.RANDOM_ERASE_COUNT = 1  # largest number of boxes
_C.TRAIN.RANDOM_ERASE_SPLIT = False  # leave the first half of each batch untouched

# mixing of a batch and its targets
_C.TRAIN.SMOOTHING = 0.1  # label smoothing
_C.TRAIN.MIXUP_ALPHA = 0.8  # 0: no mixup
_C.TRAIN.CUTMIX_ALPHA = 1.0  # 0: no cutmix
_C.TRAIN.CUTMIX_MINMAX = None  # (low, high) share of the sides of the cutmix box, instead of CUTMIX_ALPHA's area
_C.TRAIN.MIXUP_PROB = 1.0  # probability that a batch (pair, image) is mixed at all
_C.TRAIN.MIXUP_SWITCH_PROB = 0.5  # probability of cutmix where both are on
_C.TRAIN.MIXUP_MODE = 'batch'  # one draw per batch, pair or elem

# distillation from a trained model
_C.TRAIN.DISTILLATION_TYPE = 'none'  # soft: the teacher's probabilities; hard: its decisions (DeiT, section 3)
_C.TRAIN.DISTILLATION_ALPHA = 0.5  # share of the distillation loss
_C.TRAIN.DISTILLATION_TAU = 1.0  # temperature of soft distillation
_C.TRAIN.TEACHER_MODEL = None  # weights of TEACHER_CFG, also published files; without that an exported model
_C.TRAIN.TEACHER_CFG = None  # configuration of the teacher, a file or a name of `python -m models`

_C.TRAIN.MAE_DISTILL = CN()  # TASK mae: the encoder learns from that of TEACHER_CFG too (MAE-Lite)
_C.TRAIN.MAE_DISTILL.ATTN_IDX = ()  # blocks, from 1, whose attention scores are compared with the teacher's
_C.TRAIN.MAE_DISTILL.ATTN_ALPHA = 1.0  # weight of that loss
_C.TRAIN.MAE_DISTILL.ATTN_ADAPTER = True  # a learned map between the heads, even where their numbers are equal
_C.TRAIN.MAE_DISTILL.HIDDEN_IDX = ()  # blocks, from 0, whose normalised input is compared; the depth: the output
_C.TRAIN.MAE_DISTILL.HIDDEN_ALPHA = 1.0  # weight of that loss
_C.TRAIN.MAE_DISTILL.HIDDEN_ADAPTER = True  # a learned map between the channels, even where their numbers are equal

# ---------------------------------------------------------------------------------------------------- run
_C.SAVE = './output'  # parent of the run folders
_C.TAG = ''  # name of the run folder; empty: train-/eval- and a time stamp
_C.SAVE_FREQ = 10  # epochs between epoch_NNNN.pdparams files; 0: none
_C.SAVE_KEEP = 3  # how many of them stay; 0: all
_C.SAVE_STEPS = 0  # optimiser steps between writes of last.pdparams inside an epoch; 0: at its end only
_C.REPORT_FREQ = 20  # micro-batches between log lines
_C.VALIDATE_FREQ = 1  # epochs between validations
_C.SEED = 0  # of weights, data order, augmentation and dropout
_C.EVAL = False  # evaluate only
_C.THROUGHPUT = False  # measure images per second only
_C.AMP = False  # mixed precision on GPU
_C.AMP_LEVEL = 'O1'  # O1: per operation; O2: weights in half precision with float32 master copies
_C.AMP_DTYPE = 'float16'  # float16 with loss scaling, or bfloat16

# Keys that may be None: what they are otherwise.
_OPTIONAL = {
    'DATA.BATCH_SIZE_EVAL': int,
    'MODEL.NUM_CLASSES': int,
    'MODEL.PRETRAINED': str,
    'MODEL.RESUME': str,
    'MODEL.PUBLISHED.ACC1': float,
    'MODEL.PUBLISHED.ACC5': float,
    'MODEL.PUBLISHED.WEIGHTS': str,
    'MODEL.TRANS.REPRESENTATION_SIZE': int,
    'MODEL.TRANS.LAYER_SCALE': float,
    'MODEL.LAMBDA.DECAY_EPOCHS': int,
    'MODEL.TOME.SCHEDULE': tuple,
    'TRAIN.LINEAR_SCALED_LR': int,
    'TRAIN.GRAD_CLIP': float,
    'TRAIN.CUTMIX_MINMAX': tuple,
    'TRAIN.TEACHER_MODEL': str,
    'TRAIN.TEACHER_CFG': str,
}

# PaddleViT spellings: an old name and the key it became, or None where the key has no effect here.
_RENAMED = {
    'MODEL.MIXER.HIDDEN_SIZE': 'MODEL.MIXER.EMBED_DIM',
    'MODEL.MIXER.NUM_LAYERS': 'MODEL.MIXER.DEPTH',
    'MODEL.DROP_PATH': 'MODEL.DROPPATH',
    'TRAIN.MODEL_EMA_FORCE_CPU': None,  # the average lives beside the weights
    'NGPUS': None,  # one process per visible device
    'LOCAL_RANK': None,
}

_CHOICES = {
    'DATA.IMAGE_CHANNELS': (1, 3),
    'DATA.INTERPOLATION': ('bicubic', 'bilinear', 'random'),
    'DATA.BAD_IMAGE': ('error', 'skip'),
    'DATA.CACHE': ('no', 'part', 'full'),
    'DATA.CROP': ('auto', 'resized', 'padded'),
    'DATA.EVAL_CROP': ('centre', 'squash'),
    'DATA.VIEWS': (1, 2),
    'TRAIN.LR_SCHEDULER.UPDATE': ('epoch', 'step'),
    'TRAIN.NONFINITE': ('error', 'skip'),
    'TRAIN.RAND_AUGMENT_SPACE': ('timm', 'paddlevit'),
    'TRAIN.RANDOM_ERASE_MODE': ('pixel', 'rand', 'const'),
    'TRAIN.DISTILLATION_TYPE': ('none', 'soft', 'hard'),
    'TRAIN.MIXUP_MODE': ('batch', 'pair', 'elem'),
    'AMP_LEVEL': ('O1', 'O2'),
    'AMP_DTYPE': ('float16', 'bfloat16'),
}

_AT_LEAST = {
    'DATA.BATCH_SIZE': 1, 'DATA.BATCH_SIZE_EVAL': 1, 'DATA.IMAGE_SIZE': 1, 'DATA.NUM_WORKERS': 0, 'DATA.PREFETCH': 1,
    'DATA.TIMEOUT': 0, 'MODEL.NUM_CLASSES': 0, 'TRAIN.LAST_EPOCH': 0, 'TRAIN.NUM_EPOCHS': 1, 'TRAIN.WARMUP_EPOCHS': 0,
    'TRAIN.WEIGHT_DECAY': 0, 'TRAIN.REPEATED_AUG': 0, 'TRAIN.RANDOM_ERASE_COUNT': 1, 'TRAIN.RAND_AUGMENT_LAYERS': 1,
    'TRAIN.LR_SCHEDULER.LAG': 0, 'TRAIN.ACCUM_ITER': 1, 'TRAIN.LINEAR_SCALED_LR': 1, 'SAVE_FREQ': 0, 'SAVE_KEEP': 0,
    'SAVE_STEPS': 0, 'REPORT_FREQ': 1, 'VALIDATE_FREQ': 1, 'SEED': 0, 'MODEL.EVIT.SHRINK_START_EPOCH': 0,
    'MODEL.EVIT.SHRINK_EPOCHS': 0, 'MODEL.MSMLP.PATCH_SIZE': 1, 'MODEL.MSMLP.EMBED_DIM': 1,
    'TRAIN.LR_SCHEDULER.DECAY_EPOCHS': 1, 'MODEL.TRANS.FROZEN_STAGES': -1, 'MODEL.LAMBDA.START_EPOCH': 0,
    'MODEL.LAMBDA.DECAY_EPOCHS': 1, 'MODEL.TOME.R': 0, 'MODEL.TOME.START_IDX': 0, 'MODEL.MOCO.DIM': 1,
    'MODEL.MOCO.MLP_DIM': 1,
}  # fmt: skip

_PROBABILITIES = (
    'MODEL.DROPOUT', 'MODEL.ATTENTION_DROPOUT', 'MODEL.HEAD_DROPOUT', 'MODEL.DROPPATH', 'TRAIN.HFLIP', 'TRAIN.SMOOTHING',
    'TRAIN.RANDOM_ERASE_PROB', 'TRAIN.MIXUP_PROB', 'TRAIN.MIXUP_SWITCH_PROB', 'TRAIN.MODEL_EMA_DECAY', 'TRAIN.DISTILLATION_ALPHA',
    'TRAIN.LR_SCHEDULER.DECAY_RATE', 'MODEL.MOCO.MOMENTUM',
)  # fmt: skip


_SCHEMA = Schema(_C, _OPTIONAL, _RENAMED, _CHOICES, _AT_LEAST, _PROBABILITIES)


# ---------------------------------------------------------------------------------------------------- reading
def get_config(cfg_file: str | None = None, opts: list | None = None) -> CN:
    """Returns the configuration of a YAML file.

    Args:
        cfg_file: path of a YAML file; None gives the defaults.
        opts: alternating keys and values that win over the file, such as `['TRAIN.BASE_LR', 5e-4]`.

    Returns:
        A frozen copy of the tree.

    Raises:
        UserError: a file that cannot be read, an unknown key, or a value of the wrong kind.
    """
    config = _C.clone()
    if cfg_file is not None:
        _SCHEMA.merge_file(config, cfg_file)
    merge_opts(config, opts or [])
    validate(config)
    config.freeze()
    return config


def get_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses PaddleViT's command line: single dash, `-x value` or `-x=value`, quotes around a value are dropped."""
    return flag_parser('Train or evaluate an image classifier.').parse_args(argv)


def flag_parser(description: str, only: Collection[str] | None = None) -> argparse.ArgumentParser:
    """The parser of the launchers' flags; a tool takes `only` some of them, such as '-cfg', and adds its own."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def add(flag: str, kind: Callable = _unquoted, **options) -> None:
        if only is None or flag in only:
            options = options if 'action' in options else {'type': kind, **options}
            parser.add_argument(flag, default=argparse.SUPPRESS, **options)

    add('-cfg', metavar='FILE', help='YAML file that describes model and recipe')
    add('-dataset', metavar='NAME', help='imagenet2012, list, folder, cifar100 or another data set of docs/data.md')
    add('-data_path', metavar='DIR', help='folder that holds the data')
    add('-output', metavar='DIR', help='parent of the run folder')
    add('-tag', metavar='NAME', help='name of the run folder (default: train-/eval- and a time stamp)')
    add('-batch_size', _integer, metavar='N', help='images per process, for training and evaluation')
    add('-batch_size_eval', _integer, metavar='N', help='images per process in evaluation')
    add('-image_size', _integer, metavar='N', help='side of the input in pixels')
    add('-num_classes', _integer, metavar='N', help='number of classes (default: taken from the data)')
    add('-accum_iter', _integer, metavar='N', help='micro-batches per optimiser step')
    add('-num_workers', _integer, metavar='N', help='image loading processes per training process')
    add('-pretrained', metavar='FILE', help='.pdparams weights to start from or to evaluate')
    add('-resume', metavar='RUN_OR_FILE', help='run folder or checkpoint to continue')
    add('-last_epoch', _integer, metavar='N', help='last finished epoch, when -resume names a weights-only file')
    add('-teacher_model_path', metavar='FILE', help='weights of the teacher for distillation')
    add('-ngpus', _integer, metavar='N', help='processes on this machine (default: NPROC, or one per GPU; CPU: two)')
    add('-eval', action='store_true', help='evaluate only')
    add('-amp', action='store_true', help='mixed precision (acts on GPU)')
    add('-throughput', action='store_true', help='measure images per second and stop')
    parser.add_argument(
        '-opts',
        nargs=argparse.REMAINDER,
        default=[],
        metavar='KEY VALUE',
        help='any configuration keys; must come last',
    )
    return parser


_FLAGS = {
    'dataset': 'DATA.DATASET', 'data_path': 'DATA.DATA_PATH', 'output': 'SAVE', 'tag': 'TAG', 'batch_size': 'DATA.BATCH_SIZE',
    'batch_size_eval': 'DATA.BATCH_SIZE_EVAL', 'image_size': 'DATA.IMAGE_SIZE', 'num_classes': 'MODEL.NUM_CLASSES',
    'accum_iter': 'TRAIN.ACCUM_ITER', 'num_workers': 'DATA.NUM_WORKERS', 'pretrained': 'MODEL.PRETRAINED',
    'resume': 'MODEL.RESUME', 'last_epoch': 'TRAIN.LAST_EPOCH',
    'teacher_model_path': 'TRAIN.TEACHER_MODEL', 'eval': 'EVAL', 'amp': 'AMP', 'throughput': 'THROUGHPUT',
}  # fmt: skip


def update_config(config: CN, args: argparse.Namespace) -> CN:
    """Merges the file that `args.cfg` names, the flags, then `-opts` into `config`, which is left unfrozen."""
    config.defrost()
    given = vars(args)
    cfg_file = config_file_of(args)
    if cfg_file is not None:
        _SCHEMA.merge_file(config, cfg_file)
    if 'batch_size' in given:
        config.DATA.BATCH_SIZE_EVAL = given['batch_size']
    for flag, key in _FLAGS.items():
        if flag in given:
            _SCHEMA.set(config, key, given[flag], f'-{flag}')
    merge_opts(config, given.get('opts') or [])
    validate(config)
    return config


def config_file_of(args: argparse.Namespace) -> str | None:
    """The YAML file that `-cfg` names; without it the one of the run folder that `-resume` or `-pretrained` names."""
    given = vars(args)
    if 'cfg' in given:
        return given['cfg']
    runs = (os.path.join(given[flag], 'config.yaml') for flag in ('resume', 'pretrained') if flag in given)
    return next(filter(os.path.isfile, runs), None)


def merge_opts(config: CN, opts: list) -> None:
    """Merges alternating keys and values, as `-opts` gives them, into `config`."""
    if len(opts) % 2:
        raise UserError(f"-opts takes pairs of KEY VALUE, but '{opts[-1]}' has no partner.")
    for key, value in zip(opts[::2], opts[1::2]):
        _SCHEMA.set(config, str(key), _unquoted(value) if isinstance(value, str) else value, '-opts')


def validate(config: CN) -> None:
    """Checks values that are wrong whatever the data and the model are. Raises UserError with the key and the mend."""
    _SCHEMA.check(config)
    for key in ('CROP_SCALE', 'CROP_RATIO'):
        low_high = config.TRAIN[key]
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
            raise UserError(f'TRAIN.{key} is {low_high}, but must be (low, high) with 0 < low <= high.')
    if not 0 < config.DATA.CROP_PCT <= 1:
        raise UserError(f'DATA.CROP_PCT is {config.DATA.CROP_PCT}, but must lie in (0, 1].')
    if config.MODEL.MOCO.TEMPERATURE <= 0:
        raise UserError(f'MODEL.MOCO.TEMPERATURE is {config.MODEL.MOCO.TEMPERATURE}, but must be greater than 0.')


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in '\'"' else text


def _integer(text: str) -> int:
    return int(_unquoted(text))


_integer.__name__ = 'whole number'
