# SPDX-License-Identifier: Apache-2.0
"""The configuration: every key with its default, its bounds and its meaning.

One YAML file describes a run. Later values override earlier ones:

    defaults below  <  each file of BASE, recursively  <  the YAML itself  <  command-line flags  <  -opts KEY VALUE

>>> config = get_config('./configs/gmlp_s16_224.yaml', opts=['MODEL.NUM_CLASSES', 10])

`python -m config -cfg FILE [flags]` prints the resolved configuration and the source of each value; with `-plot OUT.png` it
draws learning rate, keep rate, λ, momentum and EMA decay over the run.

Keys have PaddleViT's names where it has them. YAML files of its gMLP folder load unchanged, including old names; those of its
DeiT, ViT and MAE folders are translated by `utils.paddlevit`.
"""

from __future__ import annotations

if __name__ == '__main__':
    from utils.cli import begin

    begin()

import argparse
import importlib
import os
from collections.abc import Collection

from yacs.config import CfgNode as CN

from utils import paddlevit
from utils.cli import run, unquoted
from utils.environment import import_paddle
from utils.errors import UserError
from utils.flags import FLAGS, flag_parser, get_arguments
from utils.run_paths import check_run_name, follow_latest
from utils.schema import Key, Owners, Schema, Section, shown  # Key, Section: for `add_keys` too
from utils.sizes import SizeKey

# Owners of keys: a key has no effect for any other MODEL.TYPE (`models`, aliases included) or TRAIN.TASK (`tasks`).
GMLP, VIT, MS_MLP, MAE, MOCOV3 = ('gmlp', 'gatedmlp'), ('vit', 'deit', 'evit'), ('ms_mlp',), ('mae',), ('mocov3',)
UPERNET, SEGMENTER, MASK_RCNN = ('upernet',), ('segmenter',), ('mask_rcnn',)
SEGMENTORS = UPERNET + SEGMENTER
DENSE = SEGMENTORS + MASK_RCNN
ENCODERS = VIT + DENSE
CLASSIFIERS, TRANSFORMERS = VIT + GMLP + MS_MLP, ENCODERS + MAE + MOCOV3
SUPERVISED, TAUGHT = ('supervised', 'linear_probe'), ('supervised', 'mae')
SEGMENTATION, DETECTION = ('segmentation',), ('detection',)
TASKS = ('supervised', 'linear_probe', 'mae', 'mocov3', 'segmentation', 'detection')

SCALED = 'images are scaled to [0, 1], so divide values for 0 to 255 by 255'

# fmt: off
# One line per key: Key(default, bounds or choices, type if the default does not show it, owner).
_C = Section()
_C.BASE = Key([''])  # YAML files to inherit from, relative to the file that names them

# ---------------------------------------------------------------------------------------------------- data
_C.DATA = Section()
_C.DATA.DATASET = Key('imagenet2012')  # a registered data set; docs/data.md lists them
_C.DATA.DATA_PATH = Key('/dataset/imagenet/')  # folder of the data
_C.DATA.BATCH_SIZE = Key(256, '[1, 65536]')  # training images per process and micro-batch
_C.DATA.BATCH_SIZE_EVAL = Key(None, '[1, 65536]', int)  # evaluation images per process; None: BATCH_SIZE
_C.DATA.IMAGE_SIZE = SizeKey(224, '[1, 8192]')  # side of the square input, or (height, width), pixels
_C.DATA.IMAGE_CHANNELS = Key(3, '[1, 256]')  # 3: RGB, 1: gray, 2: gray and alpha, 4: RGB and alpha; others: arrays or TIFF pages
_C.DATA.CROP_PCT = Key(0.875, '[0.01, 1]')  # evaluation: resize the shorter side to floor(IMAGE_SIZE / CROP_PCT), then crop the center
_C.DATA.CROP = Key('auto', ('auto', 'resized', 'padded'))  # RandomResizedCrop, or pad by 4 px (CIFAR); auto: pad up to 32 px
_C.DATA.EVAL_CROP = Key('center', ('center', 'squash'), aliases={'centre': 'center'})  # evaluation: center crop by CROP_PCT, or resize both sides
_C.DATA.VIEWS = Key(None, (1, 2), int)  # augmented views of each training image; None: TRAIN.TASK decides
_C.DATA.INTERPOLATION = Key('bicubic', ('bicubic', 'bilinear', 'random'))  # random: one of both for each training image
_C.DATA.FAST_RESIZE = Key(True)  # training: resize and rotate with OpenCV; False: with Pillow, slower, with slightly different pixels
_C.DATA.IMAGENET_MEAN = Key([0.5, 0.5, 0.5], '[0, 1]', hint=SCALED)  # mean of images in [0, 1], per channel; 1 channel: the first value
_C.DATA.IMAGENET_STD = Key([0.5, 0.5, 0.5], '[0.001, 1]', hint=SCALED)  # standard deviation of images in [0, 1], per channel
_C.DATA.NUM_WORKERS = Key(4, '[0, 1024]')  # worker processes per training process; 0: load in the training process
_C.DATA.PREFETCH = Key(2, '[1, 1024]')  # batches that each worker prefetches
_C.DATA.TIMEOUT = Key(300.0, '[0, 604800]')  # seconds to wait for a batch before the run ends with an error; 0: no limit
_C.DATA.CACHE = Key('no', ('no', 'part', 'full'))  # image files in memory: none, the part of this rank, or all
_C.DATA.BAD_IMAGE = Key('error', ('error', 'skip'))  # unreadable image: end the run and name it, or skip and count it
_C.DATA.IGNORE_INDEX = Key(255, '[0, 65535]', tasks=SEGMENTATION)  # label of pixels without a class
_C.DATA.REDUCE_ZERO_LABEL = Key(False, tasks=SEGMENTATION)  # label maps: 0 is ignored, and k > 0 is class k - 1 (ade20k: always)
_C.DATA.IMAGE_SCALE = Key((2048, 512), '[1, 65536]', length=(2,), tasks=SEGMENTATION)  # images fit into: (longer, shorter side)
_C.DATA.CROP_SIZE = Key(None, '[1, 8192]', [int], length=(2,), tasks=SEGMENTATION)  # training: (height, width); None: IMAGE_SIZE
_C.DATA.ANNOTATION_FILES = Key(('annotations/instances_train.json', 'annotations/instances_val.json'), length=(2,), tasks=DETECTION)  # DATASET detection: training, validation
_C.DATA.IMAGE_FOLDERS = Key(('images/train', 'images/val'), length=(2,), tasks=DETECTION)  # DATASET detection: folders of their images
_C.DATA.EXIF_ROTATE = Key(False)  # rotate by the EXIF orientation (phone photographs); published accuracies ignore it

# ---------------------------------------------------------------------------------------------------- model
_C.MODEL = Section()
_C.MODEL.TYPE = Key('gmlp')  # a registered architecture, see `python -m models`
_C.MODEL.NAME = Key('gmlp')  # name in logs and tables
_C.MODEL.NUM_CLASSES = Key(None, '[0, 1e7]', int)  # None: number of classes of the data set; 1000 without a data set
_C.MODEL.PRETRAINED = Key(None, kind=str)  # file or run folder of the initial weights; auto, auto:NAME: published ones; none
_C.MODEL.FRESH_HEAD = Key(False, tasks=SUPERVISED)  # training: re-initialize the classifier of PRETRAINED
_C.MODEL.RESUME = Key(None, kind=str)  # run folder or checkpoint to continue
_C.MODEL.DROPOUT = Key(0.0, '[0, 1)', models=CLASSIFIERS)  # dropout rate after the layers of an MLP
_C.MODEL.ATTENTION_DROPOUT = Key(0.0, '[0, 1)', models=VIT)  # dropout rate of the attention weights
_C.MODEL.HEAD_DROPOUT = Key(0.0, '[0, 1)', models=VIT + UPERNET)  # dropout rate before the classifier; upernet: of whole channels
_C.MODEL.DROPPATH = Key(0.1, '[0, 1)', models=CLASSIFIERS + DENSE)  # stochastic depth rate
_C.MODEL.DROPPATH_RAMP = Key(False, models=CLASSIFIERS + DENSE)  # True: the rate grows linearly with depth, from 0 to DROPPATH

_C.MODEL.MIXER = Section(models=GMLP)  # gMLP
_C.MODEL.MIXER.PATCH_SIZE = Key(16, '[1, 1024]')  # side of a patch, pixels
_C.MODEL.MIXER.EMBED_DIM = Key(768, '[1, 65536]')  # channels of a token
_C.MODEL.MIXER.DEPTH = Key(12, '[1, 1000]')  # number of blocks
_C.MODEL.MIXER.MLP_RATIO = Key(6.0, '(0, 64]')  # channels inside a block / EMBED_DIM
_C.MODEL.MIXER.STEM_NORM = Key(False)  # LayerNorm after the patch embedding

_C.MODEL.TRANS = Section(models=TRANSFORMERS)  # Vision Transformer
_C.MODEL.TRANS.PATCH_SIZE = Key(16, '[1, 1024]')  # side of a patch, pixels
_C.MODEL.TRANS.CONV_STEM = Key(False, models=VIT + MOCOV3)  # embed patches by a stack of convolutions (arXiv 2106.14881)
_C.MODEL.TRANS.EMBED_DIM = Key(768, '[1, 65536]')  # channels of a token
_C.MODEL.TRANS.DEPTH = Key(12, '[1, 1000]')  # number of blocks
_C.MODEL.TRANS.NUM_HEADS = Key(12, '[1, 1024]')  # attention heads
_C.MODEL.TRANS.MLP_RATIO = Key(4.0, '(0, 64]')  # channels inside an MLP / EMBED_DIM
_C.MODEL.TRANS.QKV_BIAS = Key(True)  # biases of query, key and value
_C.MODEL.TRANS.MIXER = Key(('attention',), models=VIT + MASK_RCNN)  # a registered token mixer for all blocks, or a list with one per block
_C.MODEL.TRANS.GLOBAL_POOL = Key(False, models=VIT)  # global average pooling: classify the normalized mean of the patch tokens, not the class token
_C.MODEL.TRANS.DISTILLED = Key(False, models=VIT + SEGMENTORS)  # distillation token with a second classifier, for the teacher's labels (DeiT)
_C.MODEL.TRANS.REPRESENTATION_SIZE = Key(None, '[1, 65536]', int, models=VIT)  # channels of a tanh layer before the classifier
_C.MODEL.TRANS.HEAD_NORM = Key(False, models=VIT)  # batch normalization without affine parameters before the classifier (linear probe of MAE)
_C.MODEL.TRANS.FROZEN_STAGES = Key(-1, '[-1, 999]', models=VIT)  # freeze the embedding and blocks 0 to this one; -1: none
_C.MODEL.TRANS.ABS_POS = Key(True, models=ENCODERS)  # learned absolute position embedding
_C.MODEL.TRANS.REL_POS = Key((), ('block', 'shared'), [str], models=VIT + SEGMENTORS)  # relative position biases: per block, shared, or both
_C.MODEL.TRANS.KEY_BIAS = Key(True, models=ENCODERS)  # QKV_BIAS includes keys; False: BEiT's q_bias and v_bias only
_C.MODEL.TRANS.LAYER_SCALE = Key(None, '(0, 1000]', float, models=ENCODERS)  # initial LayerScale value (CaiT); None: no LayerScale
_C.MODEL.TRANS.HIDDEN_DROPOUT = Key(True, models=VIT)  # DROPOUT inside the MLPs, too; False: after their last layer only (BEiT)
_C.MODEL.TRANS.RESCALED_INIT = Key(False, models=VIT)  # smaller initial weights in deeper blocks and in the classifier (BEiT)

_C.MODEL.WINDOWED = Section(models=VIT + MASK_RCNN)  # the mixer `windowed`: attention within windows (ViTDet)
_C.MODEL.WINDOWED.SIZE = Key(14, '[1, 1024]')  # side of a window, patches
_C.MODEL.WINDOWED.REL_POS = Key(True)  # decomposed relative positions within a window

_C.MODEL.EVIT = Section(models=VIT)  # EViT: blocks that keep only the patch tokens that the class token attends to
_C.MODEL.EVIT.KEEP_RATE = Key(1.0, '(0, 1]')  # keep rate: fraction of the patch tokens that each block of DROP_LOC keeps; 1: off
_C.MODEL.EVIT.DROP_LOC = Key((3, 6, 9), '[0, 999]')  # blocks that reduce the tokens, numbered from 0
_C.MODEL.EVIT.FUSE_TOKEN = Key(False)  # fuse the other tokens into one token instead of dropping them
_C.MODEL.EVIT.SHRINK_START_EPOCH = Key(0, '[0, 1e6]')  # training: epochs with all tokens before the keep rate decreases
_C.MODEL.EVIT.SHRINK_EPOCHS = Key(0, '[0, 1e6]')  # training: epochs in which the keep rate decreases from 1 to KEEP_RATE

_C.MODEL.LAMBDA = Section(models=ENCODERS)  # attention removal ("MLP Can Be A Good Transformer Learner")
_C.MODEL.LAMBDA.PRUNE_LAYERS = Key((), '[0, 999]', [int])  # blocks whose attention weight decays to 0 in training, numbered from 0
_C.MODEL.LAMBDA.DONE_LAYERS = Key((), '[0, 999]', [int])  # blocks whose attention weight decayed in an earlier training
_C.MODEL.LAMBDA.REMOVED = Key(False)  # build the blocks of both lists without attention, after the training
_C.MODEL.LAMBDA.START_EPOCH = Key(0, '[0, 1e6]')  # training: last epoch, counted from 0, with attention weight 1
_C.MODEL.LAMBDA.DECAY_EPOCHS = Key(None, '[1, 1e6]', int)  # epochs in which the weight decays to 0; None: 299/400 of the remaining ones

_C.MODEL.TOME = Section(models=VIT)  # ToMe: blocks that merge similar tokens
_C.MODEL.TOME.R = Key(0, '[0, 1e6]')  # tokens that each block merges; 0: off
_C.MODEL.TOME.INFLECT = Key(0.0, '[-1, 1]')  # -1: R decreases over the depth from 2 R to 0; 1: it increases from 0 to 2 R; between: less steep
_C.MODEL.TOME.SCHEDULE = Key(None, '[0, 1e6]', [int])  # R of each merging block, in order; replaces R and INFLECT
_C.MODEL.TOME.START_IDX = Key(0, '[0, 1000]')  # number of blocks with attention before the first merging block
_C.MODEL.TOME.PROP_ATTN = Key(True)  # proportional attention: add log(token size) to the attention logits

_C.MODEL.MAE = Section(models=MAE)  # masked autoencoder; its encoder is MODEL.TRANS
_C.MODEL.MAE.DECODER_EMBED_DIM = Key(512, '[1, 65536]')  # channels of a token of the decoder
_C.MODEL.MAE.DECODER_DEPTH = Key(8, '[0, 1000]')  # number of decoder blocks; 0: no decoder
_C.MODEL.MAE.DECODER_NUM_HEADS = Key(16, '[1, 1024]')  # attention heads of the decoder
_C.MODEL.MAE.DECODER_PRED_DIM = Key(None, '[1, 1e6]', int)  # values of each patch that the decoder predicts, for own targets; None: its pixels
_C.MODEL.MAE.MASK_RATIO = Key(0.75, '(0, 1)')  # mask ratio: fraction of the patches that are removed
_C.MODEL.MAE.NORM_PIX_LOSS = Key(True)  # reconstruct patches normalized by their own mean and variance

_C.MODEL.MOCO = Section(models=MOCOV3)  # MoCo v3; its encoder is MODEL.TRANS
_C.MODEL.MOCO.DIM = Key(256, '[1, 65536]')  # channels of the features in the InfoNCE loss
_C.MODEL.MOCO.MLP_DIM = Key(4096, '[1, 65536]')  # hidden channels of projector and predictor
_C.MODEL.MOCO.MOMENTUM = Key(0.99, '[0, 1)')  # initial momentum of the momentum encoder; a half cosine increases it to 1
_C.MODEL.MOCO.TEMPERATURE = Key(0.2, '[0.001, 100]')  # temperature of the InfoNCE loss
_C.MODEL.MOCO.FREEZE_PATCH = Key(False)  # freeze the random patch embedding, for stability (MoCo v3, section 4)

_C.MODEL.UPERNET = Section(models=UPERNET)  # UPerNet; its backbone is MODEL.TRANS
_C.MODEL.UPERNET.OUT_INDICES = Key((3, 5, 7, 11), '[0, 999]', length=(4,))  # blocks whose output is used, from 0
_C.MODEL.UPERNET.NECK = Key('pyramid', ('pyramid', 'mln', 'none'))  # transposed convolutions, MultiLevelNeck, or none
_C.MODEL.UPERNET.CHANNELS = Key(768, '[1, 65536]', none=True)  # width of the head; None: TRANS.EMBED_DIM
_C.MODEL.UPERNET.LAST_NORM = Key(False)  # LayerNorm on the last feature map
_C.MODEL.UPERNET.AUX_CHANNELS = Key(256, '[0, 65536]')  # width of the auxiliary FCN head in training; 0: none

_C.MODEL.SEGMENTER = Section(models=SEGMENTER)  # Segmenter; its encoder is MODEL.TRANS
_C.MODEL.SEGMENTER.DECODER = Key('mask', ('mask', 'linear'))  # mask transformer, or a linear classifier of each patch
_C.MODEL.SEGMENTER.NUM_LAYERS = Key(2, '[1, 1000]')  # blocks of the mask transformer
_C.MODEL.SEGMENTER.DROPOUT = Key(0.1, '[0, 1)')  # rate in these blocks

_C.MODEL.DET = Section(models=MASK_RCNN)  # Mask R-CNN; its backbone is MODEL.TRANS
_C.MODEL.DET.POSITION_SIZE = Key(224, '[1, 8192]')  # image size that the position embedding is for: that of the pre-training
_C.MODEL.DET.CHANNELS = Key(256, '[1, 65536]')  # width of the pyramid and of the convolutions of the heads
_C.MODEL.DET.ANCHOR_SIZES = Key((32.0, 64.0, 128.0, 256.0, 512.0), '(0, 8192]', length=(5,))  # side of the anchors of each level, pixels
_C.MODEL.DET.ANCHOR_RATIOS = Key((0.5, 1.0, 2.0), '(0, 100]')  # height / width of the anchors
_C.MODEL.DET.RPN_CANDIDATES = Key((2000, 1000), '[1, 1e6]', length=(2,))  # anchors per level before NMS, in training and evaluation
_C.MODEL.DET.RPN_PROPOSALS = Key((1000, 1000), '[1, 1e6]', length=(2,))  # regions per image after NMS, in training and evaluation
_C.MODEL.DET.RPN_NMS = Key(0.7, '[0, 1]')  # NMS threshold of the regions of a level
_C.MODEL.DET.RPN_SAMPLES = Key(256, '[1, 1e6]')  # anchors per image in the loss, at most half of them positive
_C.MODEL.DET.ROI_SAMPLES = Key(512, '[1, 1e6]')  # regions per image in the loss, at most a quarter of them with an object
_C.MODEL.DET.BOX_CONVS = Key(4, '[0, 100]')  # convolutions of the box head
_C.MODEL.DET.BOX_FEATURES = Key(1024, '[1, 65536]')  # channels of its linear layer
_C.MODEL.DET.MASK_CONVS = Key(4, '[0, 100]')  # convolutions of the mask head
_C.MODEL.DET.CANONICAL_SIZE = Key(224.0, '(0, 8192]')  # sqrt(area) of the regions that are pooled at stride 16, pixels
_C.MODEL.DET.MIN_SCORE = Key(0.05, '[0, 1]')  # detections have a higher score
_C.MODEL.DET.NMS = Key(0.5, '[0, 1]')  # NMS threshold of the detections of a class
_C.MODEL.DET.MAX_DETECTIONS = Key(100, '[1, 10000]')  # per image

_C.MODEL.MSMLP = Section(models=MS_MLP)  # MS-MLP
_C.MODEL.MSMLP.PATCH_SIZE = Key(4, '[1, 1024]')  # side of a patch, pixels
_C.MODEL.MSMLP.EMBED_DIM = Key(96, '[1, 65536]')  # channels of the first stage, doubled by each further one
_C.MODEL.MSMLP.DEPTHS = Key([3, 3, 9, 3], '[1, 1000]')  # blocks of each stage
_C.MODEL.MSMLP.SHIFT_DIST = Key([-2, -1, 0, 1, 2], '[-8192, 8192]')  # pixels to shift each group of channels by
_C.MODEL.MSMLP.MIX_SIZE = Key([[1, 1, 3, 5, 7], [1, 3, 3, 5, 7], [1, 5, 5, 5, 7], [1, 7, 7, 7, 7]], '[1, 1023]')  # per stage: kernels
_C.MODEL.MSMLP.MLP_RATIO = Key(4.0, '(0, 64]')  # channels inside an MLP / channels
_C.MODEL.MSMLP.PATCH_NORM = Key(True)  # LayerNorm after the patch embedding

# ---------------------------------------------------------------------------------------------------- training
_C.TRAIN = Section()
_C.TRAIN.TASK = Key('supervised')  # supervised: classification; linear_probe: its classifier alone; mae: masked pre-training; mocov3: contrastive pre-training; segmentation
_C.TRAIN.LAST_EPOCH = Key(0, '[0, 1e6]')  # last finished epoch, to resume from a file with weights only
_C.TRAIN.NUM_EPOCHS = Key(300, '[1, 1e6]')  # length of the run
_C.TRAIN.NUM_ITERS = Key(None, '[1, 1e9]', int)  # length in optimizer steps, instead of NUM_EPOCHS; the last epoch may be incomplete
_C.TRAIN.WARMUP_EPOCHS = Key(20.0, '[0, 1e6]')  # length of the warm-up; may be a fraction
_C.TRAIN.WARMUP_ITERS = Key(None, '[0, 1e9]', int)  # length of the warm-up in optimizer steps, instead of WARMUP_EPOCHS
_C.TRAIN.WEIGHT_DECAY = Key(0.1, '[0, 10]')  # on tensors of two or more dimensions that the model does not exempt; mocov3: on all
_C.TRAIN.BASE_LR = Key(0.001, '[0, 1000]')  # learning rate after the warm-up
_C.TRAIN.WARMUP_START_LR = Key(1e-6, '[0, 1000]')  # learning rate at the start of the warm-up
_C.TRAIN.END_LR = Key(1e-5, '[0, 1000]')  # learning rate at the end of the schedule
_C.TRAIN.LINEAR_SCALED_LR = Key(512, '[1, 1e9]', none=True)  # linear scaling rule: learning rates x global batch / this; None: no scaling
_C.TRAIN.LR_SCHEDULER = Section()
_C.TRAIN.LR_SCHEDULER.NAME = Key('warmupcosine')  # a schedule of utils/schedules.py
_C.TRAIN.LR_SCHEDULER.UPDATE = Key('epoch', ('epoch', 'step'))  # once per epoch (PaddleViT, timm), or in every step
_C.TRAIN.LR_SCHEDULER.LAG = Key(0, '[0, 1000]')  # UPDATE epoch: epoch e, from 1, trains at schedule index e - LAG (DeiT: 2)
_C.TRAIN.LR_SCHEDULER.SCALE_ENDS = Key(True)  # LINEAR_SCALED_LR also scales WARMUP_START_LR and END_LR (DeiT: False)
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = Key(30.0, '[1, 1e6]')  # NAME step: epochs between decays
_C.TRAIN.LR_SCHEDULER.MILESTONES = Key((), '[0, 1e9]', [float])  # NAME multistep: epochs, or steps where NUM_ITERS is set, of the decays
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = Key(0.1, '[0, 1]')  # NAME step, multistep: factor of each decay
_C.TRAIN.LR_SCHEDULER.POWER = Key(1.0, '(0, 100]')  # NAME poly: exponent
_C.TRAIN.LAYER_DECAY = Key(1.0, '[0.01, 1]')  # layer-wise learning-rate decay: factor per layer, from the head down; 1: off
_C.TRAIN.GRAD_CLIP = Key(None, '[0, 1e6]', float)  # gradient clipping: maximum global norm; None or 0: off
_C.TRAIN.ACCUM_ITER = Key(1, '[1, 65536]')  # gradient accumulation: micro-batches per optimizer step
_C.TRAIN.ACCUM_MODE = Key('exact', ('exact', 'ms_mlp'))  # ms_mlp: clip after each micro-batch, and drop those at the end of an epoch that fill no step
_C.TRAIN.OPTIMIZER = Section()
_C.TRAIN.OPTIMIZER.NAME = Key('AdamW')  # AdamW, SGD, Lamb, LARS
_C.TRAIN.OPTIMIZER.EPS = Key(1e-8, '(0, 1]')  # AdamW, Lamb
_C.TRAIN.OPTIMIZER.BETAS = Key((0.9, 0.999), '[0, 1)', length=(2,))  # AdamW, Lamb
_C.TRAIN.OPTIMIZER.MOMENTUM = Key(0.9, '[0, 1)')  # SGD, LARS
_C.TRAIN.OPTIMIZER.NESTEROV = Key(False)  # SGD
_C.TRAIN.MODEL_EMA = Key(False)  # exponential moving average (EMA) of the weights, which is validated too
_C.TRAIN.MODEL_EMA_DECAY = Key(0.99996, '[0, 1)')  # decay of the EMA per step
_C.TRAIN.RECOMPUTE = Key(False)  # gradient checkpointing: compute blocks again in the backward pass; half the memory, a third more time
_C.TRAIN.NONFINITE = Key('error', ('error', 'skip'))  # loss or gradient not finite: end the run, or skip the step
_C.TRAIN.DROP_LAST = Key(False)  # drop the last incomplete batch of an epoch, as in DeiT

# augmentation, in the order of application
_C.TRAIN.REPEATED_AUG = Key(0, '[0, 1000]')  # repeated augmentation: draws per image, at unchanged epoch length (DeiT: 3); 0: off
_C.TRAIN.CROP_SCALE = Key((0.08, 1.0), '(0, 1]', pair='<=')  # RandomResizedCrop: range of the area
_C.TRAIN.CROP_RATIO = Key((0.75, 4.0 / 3.0), '(0, 100]', pair='<=')  # RandomResizedCrop: range of width / height
_C.TRAIN.HFLIP = Key(0.5, '[0, 1]')  # probability of a horizontal flip
_C.TRAIN.SCALE_RANGE = Key((0.5, 2.0), '(0, 100]', pair='<=', tasks=SEGMENTATION + DETECTION)  # random factor on IMAGE_SCALE; detection: on IMAGE_SIZE
_C.TRAIN.CROP_CLASS_SHARE = Key(0.75, '(0, 1]', tasks=SEGMENTATION)  # maximum fraction of one class in a crop; 1: no limit
_C.TRAIN.PHOTOMETRIC = Key(True, tasks=SEGMENTATION)  # random brightness, contrast, saturation and hue
_C.TRAIN.RAND_AUGMENT = Key(True)  # RandAugment: random operations on each image
_C.TRAIN.RAND_AUGMENT_LAYERS = Key(2, '[1, 100]')  # operations drawn per image, each applied with probability 0.5
_C.TRAIN.RAND_AUGMENT_MAGNITUDE = Key(9, '[0, 10]')  # mean magnitude, 0 to 10; each draw is normal with standard deviation 0.5
_C.TRAIN.RAND_AUGMENT_SPACE = Key('timm', ('timm', 'paddlevit'))  # timm's rand-m9-mstd0.5-inc1, or PaddleViT's
_C.TRAIN.AUTO_AUGMENT = Key(False)  # AutoAugment's ImageNet policy, if RAND_AUGMENT is off
_C.TRAIN.COLOR_JITTER = Key(0.4, '[0, 10]')  # strength of brightness, contrast and saturation, if both policies are off
_C.TRAIN.RANDOM_ERASE_PROB = Key(0.25, '[0, 1]')  # random erasing: probability per image; 0: off
_C.TRAIN.RANDOM_ERASE_MODE = Key('pixel', ('pixel', 'rand', 'const'))  # noise per pixel, one random color, or zeros
_C.TRAIN.RANDOM_ERASE_COUNT = Key(1, '[1, 1000]')  # maximum number of boxes
_C.TRAIN.RANDOM_ERASE_SPLIT = Key(False)  # no random erasing in the first half of each batch

# mixing of a batch and its targets
_C.TRAIN.SMOOTHING = Key(0.1, '[0, 1)', tasks=SUPERVISED)  # label smoothing
_C.TRAIN.MIXUP_ALPHA = Key(0.8, '[0, 1000]', tasks=SUPERVISED)  # 0: no mixup
_C.TRAIN.CUTMIX_ALPHA = Key(1.0, '[0, 1000]', tasks=SUPERVISED)  # 0: no CutMix
_C.TRAIN.CUTMIX_MINMAX = Key(None, '[0, 1]', [float], pair='<', tasks=SUPERVISED)  # range of box side / image side; replaces CUTMIX_ALPHA
_C.TRAIN.MIXUP_PROB = Key(1.0, '[0, 1]', tasks=SUPERVISED)  # probability that a batch (pair, image) is mixed
_C.TRAIN.MIXUP_SWITCH_PROB = Key(0.5, '[0, 1]', tasks=SUPERVISED)  # probability of CutMix if both are on
_C.TRAIN.MIXUP_MODE = Key('batch', ('batch', 'pair', 'elem'), tasks=SUPERVISED)  # one draw per batch, pair or elem

# segmentation loss
_C.TRAIN.AUX_WEIGHT = Key(0.4, '[0, 1000]', tasks=SEGMENTATION)  # weight of the auxiliary loss
_C.TRAIN.AVG_NON_IGNORE = Key(False, tasks=SEGMENTATION)  # divide the loss by the labeled pixels; False: by all pixels

# distillation from a trained model
_C.TRAIN.DISTILLATION_TYPE = Key('none', ('none', 'soft', 'hard'), tasks=SUPERVISED)  # targets from the teacher (DeiT, section 3)
_C.TRAIN.DISTILLATION_ALPHA = Key(0.5, '[0, 1]', tasks=SUPERVISED)  # weight of the distillation loss; 1 minus this: weight of the cross-entropy
_C.TRAIN.DISTILLATION_TAU = Key(1.0, '[0.001, 1000]', tasks=SUPERVISED)  # temperature of soft distillation
_C.TRAIN.TEACHER_MODEL = Key(None, kind=str, tasks=TAUGHT)  # weights of the teacher; without TEACHER_CFG an exported model
_C.TRAIN.TEACHER_CFG = Key(None, kind=str, tasks=TAUGHT)  # configuration of the teacher: a file or a model name

_C.TRAIN.MAE_DISTILL = Section(models=MAE)  # TASK mae: distillation from the encoder of TEACHER_CFG (MAE-Lite, section 5)
_C.TRAIN.MAE_DISTILL.ATTN_IDX = Key((), '[1, 1000]', [int])  # blocks, from 1, whose attention logits are distilled
_C.TRAIN.MAE_DISTILL.ATTN_ALPHA = Key(1.0, '[0, 1e6]')  # weight of the attention loss
_C.TRAIN.MAE_DISTILL.ATTN_ADAPTER = Key(True)  # learned linear map between the heads, also of equal numbers
_C.TRAIN.MAE_DISTILL.HIDDEN_IDX = Key((), '[0, 1000]', [int])  # blocks, from 0, whose normalized input is distilled; the depth: the output
_C.TRAIN.MAE_DISTILL.HIDDEN_ALPHA = Key(1.0, '[0, 1e6]')  # weight of the feature loss
_C.TRAIN.MAE_DISTILL.HIDDEN_ADAPTER = Key(True)  # learned linear map between the channels, also of equal numbers

# ---------------------------------------------------------------------------------------------------- evaluation
_C.VAL = Section(tasks=SEGMENTATION)
_C.VAL.IS_SLIDE = Key(False)  # sliding windows of CROP_SIZE; False: the whole image
_C.VAL.STRIDE_SIZE = Key((341, 341), '[1, 8192]', length=(2,))  # stride of the windows: (rows, columns)
_C.VAL.SCALE_RATIOS = Key((1.0,), '(0, 100]')  # multi-scale evaluation: factors on IMAGE_SCALE, whose probabilities are averaged
_C.VAL.FLIP = Key(False)  # also average with the flipped image
_C.VAL.SHOW_SCORE = Key(0.5, '[0, 1]', tasks=DETECTION)  # pictures show objects of at least this score

# ---------------------------------------------------------------------------------------------------- run
_C.SAVE = Key('./output')  # parent of the run folders
_C.TAG = Key('')  # name of the run folder; empty: train-/eval- and a time stamp
_C.SAVE_FREQ = Key(10, '[0, 1e9]')  # epochs between epoch_NNNN.pdparams files; 0: none
_C.SAVE_KEEP = Key(3, '[0, 1e9]')  # number of epoch_NNNN.pdparams files to keep; 0: all
_C.SAVE_STEPS = Key(0, '[0, 1e9]')  # optimizer steps between additional saves of last.pdparams; 0: per epoch only
_C.REPORT_FREQ = Key(20, '[1, 1e9]')  # micro-batches between log lines
_C.VALIDATE_FREQ = Key(1, '[1, 1e6]')  # epochs between validations
_C.VALIDATE_ITERS = Key(None, '[1, 1e9]', int)  # optimizer steps between validations, instead of VALIDATE_FREQ
_C.PEER_TIMEOUT = Key(60.0, '[0, 604800]')  # seconds to wait for a process that is stopped or does not join; 0: no limit
_C.SEED = Key(0, '[0, 18446744073709551615]')  # seed of weights, data order, augmentation and dropout
_C.EVAL = Key(False)  # evaluate only
_C.ENGINE = Key('dygraph', ('dygraph', 'paddle', 'onnxruntime', 'openvino'))  # EVAL: the layers, an exported program, or an ONNX file
_C.ENGINE_PRECISION = Key('fp32', ('fp32', 'bf16', 'int8'))  # bf16: ENGINE paddle, openvino; int8: onnxruntime
_C.SAVE_PREDICTIONS = Key(False)  # evaluations write predictions.csv and classes.csv to the run folder
_C.THROUGHPUT = Key(False)  # measure images per second only
_C.AMP = Key(False)  # mixed precision; on a CPU bfloat16 products in training, if the processor has instructions for them
_C.AMP_LEVEL = Key('O1', ('O1', 'O2'))  # on GPU; O1: mixed precision per operation; O2: half-precision weights with float32 master weights
_C.AMP_DTYPE = Key('float16', ('float16', 'bfloat16'))  # on GPU; float16 with loss scaling, or bfloat16
# fmt: on

# Old names, mostly PaddleViT's, and the new names; None: accepted without effect.
_RENAMED = {
    'MODEL.MIXER.HIDDEN_SIZE': 'MODEL.MIXER.EMBED_DIM',
    'MODEL.MIXER.NUM_LAYERS': 'MODEL.MIXER.DEPTH',
    'MODEL.DROP_PATH': 'MODEL.DROPPATH',
    'TRAIN.MODEL_EMA_FORCE_CPU': None,  # the EMA is on the device of the weights
    'TRAIN.IGNORE_INDEX': 'DATA.IGNORE_INDEX',
    'MODEL.PUBLISHED': None,  # the published weights are in configs/zoo.csv
    'NGPUS': None,  # one process per visible device
    'LOCAL_RANK': None,
}

SCHEMA = Schema(_C, _RENAMED, Owners(CLASSIFIERS + DENSE + MAE + MOCOV3, TASKS), paddlevit.adapt)


def add_keys(name: str, section: Section, reads: Collection[str] = ()) -> None:
    """Add the keys of your own model, layer or task; see docs/extending.md.

    >>> keys = Section(models=('mine',))
    >>> keys.WIDTH = Key(64, '[1, 4096]')  # channels
    >>> add_keys('MODEL.MINE', keys)

    Args:
        name: dotted name of the section.
        section: the keys, with the values of MODEL.TYPE or TRAIN.TASK that own them; none: all.
        reads: keys and sections of other models or tasks that also have an effect for the new one, such as 'MODEL.TRANS'.
            Keys of all classifiers, such as MODEL.DROPPATH, always have. Setting any other key is an error.

    Raises:
        ValueError: a key exists already, or one of `reads` does not.
    """
    general = [key for key, owners in SCHEMA.owners.items() if {*CLASSIFIERS} <= {*owners.models}]
    SCHEMA.add(name, section, (*general, *reads))


# ---------------------------------------------------------------------------------------------------- reading
def get_config(cfg_file: str | None = None, opts: list | None = None) -> CN:
    """Return the configuration of a YAML file.

    Args:
        cfg_file: path of a YAML file; None: the defaults.
        opts: alternating keys and values that override the file, such as `['TRAIN.BASE_LR', 5e-4]`.

    Returns:
        A frozen configuration.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value has a wrong type.
    """
    config = SCHEMA.tree()
    if cfg_file is not None:
        SCHEMA.merge_file(config, cfg_file)
    merge_opts(config, opts or [])
    _finish(config)
    config.freeze()
    return config


def update_config(config: CN, args: argparse.Namespace) -> CN:
    """Merge the file that `args.cfg` names, the flags, then `-opts` into `config`, which stays unfrozen."""
    config.defrost()
    given = _given(args)
    cfg_file = config_file_of(args)
    if cfg_file is not None:
        SCHEMA.merge_file(config, cfg_file)
    if 'batch_size' in given:
        SCHEMA.set(config, 'DATA.BATCH_SIZE_EVAL', given['batch_size'], '-batch_size')
    for flag, key in FLAGS.items():
        if flag in given:
            SCHEMA.set(config, key, given[flag], f'-{flag}')
    merge_opts(config, given.get('opts') or [])
    _finish(config)
    return config


def _given(args: argparse.Namespace) -> dict:
    """Return the flags that were given. PaddleViT's own parsers set all others to None, and ignore an ACCUM_ITER of 0."""
    given = {flag: value for flag, value in vars(args).items() if value is not None and value is not False}
    return {flag: value for flag, value in given.items() if flag != 'accum_iter' or value != 0}


def config_file_of(args: argparse.Namespace) -> str | None:
    """Return the YAML file that `-cfg` names, else that of the run folder that `-resume` or `-pretrained` names."""
    given = _given(args)
    if 'cfg' in given:
        return follow_latest(given['cfg'])
    folders = (follow_latest(given[flag]) for flag in ('resume', 'pretrained') if flag in given)
    runs = (os.path.join(folder, 'config.yaml') for folder in folders)
    return next(filter(os.path.isfile, runs), None)


def merge_opts(config: CN, opts: list) -> None:
    """Merge alternating keys and values, as from `-opts`, into `config`."""
    if len(opts) % 2:
        raise UserError(f"-opts takes pairs of KEY VALUE, but '{opts[-1]}' is not part of a pair.")
    for key, value in zip(opts[::2], opts[1::2]):
        if key == 'BASE':
            raise UserError('-opts: BASE has an effect in YAML files only; name the file with -cfg.')
        SCHEMA.set(config, str(key), unquoted(value) if isinstance(value, str) else value, '-opts')


def validate(config: CN) -> None:
    """Check the values without the data. Raises UserError with the key and the allowed values."""
    SCHEMA.check(config)
    for key in ('DATA.IMAGENET_MEAN', 'DATA.IMAGENET_STD'):
        channels, values = config.DATA.IMAGE_CHANNELS, SCHEMA.get(config, key)
        if len(values) != channels and not (channels == 1 and len(values) == 3):
            source = f'{SCHEMA.where(config, key)}: '.removeprefix(': ')
            raise UserError(f'{source}{key} is {values}, but must have {channels} numbers (DATA.IMAGE_CHANNELS).')
    if config.TAG:
        check_run_name(config.TAG)


def _finish(config: CN) -> None:
    """End the layer of the command line and check the result."""
    SCHEMA.end_layer(config)
    validate(config)
    SCHEMA.reset_unused(config)
    for node, key in ((config.MODEL, 'PRETRAINED'), (config.MODEL, 'RESUME'), (config.TRAIN, 'TEACHER_MODEL')):
        if key == 'PRETRAINED' and node[key] == 'auto':
            node[key] = f'auto:{config.MODEL.NAME}'
        elif node[key] is not None and not node[key].startswith('auto:'):  # `latest` may soon point to another run
            node[key] = follow_latest(node[key])


# ---------------------------------------------------------------------------------------------------- printing
def described(config: CN) -> list[tuple[str, str, str]]:
    """Return name, value and source of the value of each key."""
    return [(key, _text(SCHEMA.get(config, key)), SCHEMA.where(config, key) or 'default') for key in SCHEMA.keys]


def describe(config: CN) -> list[str]:
    """Return a line per key: name, value and source of the value."""
    rows = described(config)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f'{key:<{widths[0]}}  {value:<{widths[1]}}  {where}' for key, value, where in rows]


def _text(value) -> str:
    return value if isinstance(value, str) and value else shown(value)


def main() -> None:
    """Print the resolved configuration of a command line; with `-plot FILE.png`, draw its schedules instead."""
    parser = flag_parser('Print the resolved configuration and the source of each value.')
    parser.add_argument(
        '-plot', type=unquoted, metavar='FILE.png', help='draw learning rate and other schedules instead'
    )
    args = get_arguments(parser=parser)
    if args.plot is None:
        print('\n'.join(describe(update_config(get_config(), args))), flush=True)
        return
    import_paddle()
    importlib.import_module('tools._schedules').plot(args)  # as a command; modules of other layers import this one


if __name__ == '__main__':
    run(main)
