#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Remove the attention layers whose weight has decayed to 0: a smaller file, a faster model, the same output.

    python tools/prune.py -pretrained output/my_run -output small.pdparams
    python tools/prune.py -cfg configs/lambda_base_01346_finetune.yaml -pretrained best.pdparams -output small.pdparams

The result fits the same configuration with MODEL.LAMBDA.REMOVED True. It is written only if both models agree.
docs/lambda_vit.md describes the method.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse

import numpy as np
import paddle

from deploy.inference import load_classifier
from models import build_model
from models.profile import profile
from models.vision_transformer import VisionTransformer
from models.weights.load import load_state
from tools._common import trained_config
from tools._output import add_output_file
from utils.cli import run
from utils.errors import UserError
from utils.flags import flag_parser
from utils.formats import write_pdparams
from utils.sizes import image_shape
from utils.weights import METADATA, SUFFIX

TOLERANCE = 1e-5  # largest difference of a logit, relative to the largest logit
IMAGES = 4


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = trained_config(args)
    paddle.set_device('cpu')  # the CPU computes in full float32
    trained = load_trained(config)
    small = without_attention(config, trained)
    shape = image_shape(config)
    difference = compare(trained, small, shape)
    write_pdparams({**small.state_dict(), METADATA: small.weight_rules.metadata(small)}, args.target)
    before, after = (profile(model, [1, *shape]) for model in (trained, small))
    print(f'attention removed from blocks {", ".join(map(str, small.removal.removed_layers))}')
    print(f'parameters: {before.params:,} -> {after.params:,}')
    print(f'multiply-accumulates: {before.macs:,} -> {after.macs:,}')
    print(f'largest relative difference of a logit: {difference:.1e}')
    print(f'written: {args.target}; build the model with MODEL.LAMBDA.REMOVED True')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser('Remove the attention layers whose weight has decayed to 0.', ('-cfg', '-pretrained'))
    add_output_file(parser, SUFFIX, complete=True, required=True)
    return parser.parse_args(argv)


def load_trained(config) -> VisionTransformer:
    """Load the trained model with all its attention layers.

    Raises:
        UserError: no blocks are named, or their attention weight is not 0.
    """
    removal = config.MODEL.LAMBDA
    if not (removal.PRUNE_LAYERS or removal.DONE_LAYERS):
        raise UserError('the configuration names no blocks: set MODEL.LAMBDA.PRUNE_LAYERS to those of the training.')
    removal.REMOVED = False
    model = load_classifier(config)
    if not isinstance(model, VisionTransformer):
        raise UserError(f'MODEL.TYPE is {config.MODEL.TYPE}, but attention is removed from Vision Transformers.')
    for layer in model.removal.prune_layers:
        weight = model.blocks[layer].attn_weight
        if weight:
            raise UserError(
                f"the attention of block {layer} still has the weight {weight:.4g} in '{config.MODEL.PRETRAINED}': "
                'continue the training until its log shows attn_lambda: 0.'
            )
    return model


def without_attention(config, trained: VisionTransformer) -> VisionTransformer:
    """Build the same model without these attention layers."""
    config.MODEL.LAMBDA.REMOVED = True
    config.MODEL.NUM_CLASSES = trained.num_classes
    model = build_model(config)
    arrays = {name: value.numpy() for name, value in trained.state_dict().items()}
    load_state(model, arrays, f"'{config.MODEL.PRETRAINED}'", log=lambda line: None, replace_head=False)
    model.eval()
    return model


@paddle.no_grad()
def compare(trained: VisionTransformer, small: VisionTransformer, shape: list[int]) -> float:
    """Return the largest difference of a logit, relative to the largest logit. Raises UserError if it is too large."""
    images = paddle.to_tensor(np.random.default_rng(0).standard_normal((IMAGES, *shape), 'float32'))
    expected, actual = trained(images).numpy(), small(images).numpy()
    difference = np.abs(actual - expected).max() / max(np.abs(expected).max(), np.finfo('float32').tiny)
    if not difference <= TOLERANCE:  # NaN included
        raise UserError(
            f'the output of the model without these layers differs by {difference:.1e}: nothing is written.'
        )
    return float(difference)


if __name__ == '__main__':
    run(main)
