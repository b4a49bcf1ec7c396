# SPDX-License-Identifier: Apache-2.0
"""Ground truth and weights of the detection vectors."""

import numpy as np
import paddle

from models.detection import MaskRCNN
from models.layers import MixerSpec
from tests.conftest import golden
from tests.models.helpers import port

MEAN = np.array([123.675, 116.28, 103.53], 'float32').reshape(3, 1, 1)
STD = np.array([58.395, 57.12, 57.375], 'float32').reshape(3, 1, 1)


def polygons(arrays: dict, prefix: str, instances: int) -> list[list[np.ndarray]]:
    """Polygons of each instance, from the flat lists of the vectors."""
    owners, lengths, numbers = (arrays[f'{prefix}_{part}'] for part in ('instance', 'len', 'xy'))
    result = [[] for _ in range(instances)]
    for owner, end, length in zip(owners.astype(int), np.cumsum(lengths).astype(int), lengths.astype(int)):
        result[owner].append(numbers[end - length : end].astype('float64'))
    return result


def vitdet_mixers(sizes: dict) -> list[MixerSpec]:
    """Mixers of the blocks of a detectron2 model."""
    windowed = MixerSpec('windowed', options={'size': sizes['window_size']})
    return [windowed if i in sizes['window_block_indexes'] else MixerSpec('decomposed') for i in range(sizes['depth'])]


def tiny_detector(g, **options):
    """The detector of the vectors `vitdet-detector`."""
    sizes = g.meta['config']
    rpn = {
        'sizes': [size for (size,) in sizes['anchor_sizes']],
        'candidates': sizes['pre_nms_topk'],
        'proposals': sizes['post_nms_topk'],
        'samples': sizes['rpn_batch'],
    }
    heads = {
        'samples': sizes['roi_batch'],
        'box_convs': len(sizes['box_conv']),
        'box_features': sizes['box_fc'][0],
        'mask_convs': len(sizes['mask_conv']) - 1,
    }
    model = MaskRCNN(
        sizes['num_classes'],
        sizes['out_channels'],
        rpn,
        heads,
        img_size=sizes['img_size'],
        position_size=sizes['pretrain_img_size'],
        embed_dim=sizes['embed_dim'],
        depth=sizes['depth'],
        num_heads=sizes['num_heads'],
        mixer=vitdet_mixers(sizes),
        drop_path_rate=0.0,
        **options,
    )
    return port(model, golden('vitdet-detector').group('sd'))


def padded(images, side: int):
    """uint8 images [3, h, w] -> normalized and padded batch [B, 3, side, side], and sizes [B, 2]."""
    batch = np.zeros([len(images), 3, side, side], 'float32')
    for plane, image in zip(batch, images):
        plane[:, : image.shape[1], : image.shape[2]] = (image - MEAN) / STD
    return paddle.to_tensor(batch), paddle.to_tensor([image.shape[1:] for image in images])
