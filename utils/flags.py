# SPDX-License-Identifier: Apache-2.0
"""The command line of the launchers, with PaddleViT's flags; tools take some of them and add their own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection
from typing import NoReturn

from utils.cli import unquoted, whole_number
from utils.foreign_flags import translate
from utils.sizes import image_size_flag

# The key that each flag sets; `cfg`, `ngpus` and `opts` set none.
FLAGS = {
    'dataset': 'DATA.DATASET', 'data_path': 'DATA.DATA_PATH', 'output': 'SAVE', 'tag': 'TAG', 'batch_size': 'DATA.BATCH_SIZE',
    'batch_size_eval': 'DATA.BATCH_SIZE_EVAL', 'image_size': 'DATA.IMAGE_SIZE', 'num_classes': 'MODEL.NUM_CLASSES',
    'accum_iter': 'TRAIN.ACCUM_ITER', 'num_workers': 'DATA.NUM_WORKERS', 'pretrained': 'MODEL.PRETRAINED',
    'resume': 'MODEL.RESUME', 'last_epoch': 'TRAIN.LAST_EPOCH', 'teacher_model_path': 'TRAIN.TEACHER_MODEL',
    'eval': 'EVAL', 'save_predictions': 'SAVE_PREDICTIONS', 'amp': 'AMP', 'throughput': 'THROUGHPUT', 'engine': 'ENGINE',
}  # fmt: skip


def get_arguments(argv: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Parse PaddleViT's command line: `-x value` or `-x=value`, with optional quotes around the value.

    Flags of the codes of the papers are translated, see `utils.foreign_flags`.

    Args:
        parser: `flag_parser` with more flags; None: the flags of the launchers.
    """
    words = translate(sys.argv[1:] if argv is None else argv)
    return (parser or flag_parser('Train or evaluate an image classifier.')).parse_args(words)


class FlagParser(argparse.ArgumentParser):
    """A parser whose errors say that -opts, which takes all words after it, took the missing arguments, too."""

    words: list[str] = []

    def parse_known_args(self, args=None, namespace=None):
        """Parse as `argparse` does, and keep the words for `error`."""
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit."""
        if 'arguments are required' in message and '-opts' in self.words:
            message += '; -opts takes all words after it: put it last'
        super().error(message)


def flag_parser(description: str, only: Collection[str] | None = None) -> argparse.ArgumentParser:
    """Build the parser of the launchers' flags, or of `only` some of them, to which a tool adds its own."""
    parser = FlagParser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def add(flag: str, kind: Callable = unquoted, **options) -> None:
        if only is None or flag in only:
            options = options if 'action' in options else {'type': kind, **options}
            parser.add_argument(flag, default=argparse.SUPPRESS, **options)

    add('-cfg', metavar='FILE', help='YAML file that describes model and recipe')
    add('-dataset', metavar='NAME', help='imagenet2012, list, folder, cifar100 or another data set of docs/data.md')
    add('-data_path', metavar='DIR', help='folder of the data')
    add('-output', metavar='DIR', help='parent of the run folder')
    add('-tag', metavar='NAME', help='name of the run folder (default: train-/eval- and a time stamp)')
    add('-batch_size', whole_number, metavar='N', help='images per process, for training and evaluation')
    add('-batch_size_eval', whole_number, metavar='N', help='images per process in evaluation')
    add('-image_size', image_size_flag, metavar='N or H,W', help='side of the input, or height and width, in pixels')
    add('-num_classes', whole_number, metavar='N', help='number of classes (default: taken from the data)')
    add('-accum_iter', whole_number, metavar='N', help='micro-batches per optimizer step')
    add('-num_workers', whole_number, metavar='N', help='image loading processes per training process')
    add('-pretrained', metavar='FILE', help='.pdparams weights, initial or to evaluate; auto: the published ones')
    add('-resume', metavar='RUN_OR_FILE', help='run folder or checkpoint to continue')
    add('-last_epoch', whole_number, metavar='N', help='last finished epoch, if -resume names a file with weights only')
    add('-teacher_model_path', metavar='FILE', help='weights of the teacher for distillation')
    add('-ngpus', whole_number, metavar='N', help='processes (default: NPROC, or one per GPU; CPU: two)')
    add('-eval', action='store_true', help='evaluate only')
    add('-save_predictions', action='store_true', help='evaluations write predictions.csv and classes.csv')
    add('-amp', action='store_true', help='mixed precision: bfloat16 or float16')
    add('-engine', metavar='NAME', help='runs -eval: dygraph, paddle, onnxruntime or openvino (default: dygraph)')
    add('-throughput', action='store_true', help='measure images per second and stop')
    parser.add_argument(
        '-opts',
        nargs=argparse.REMAINDER,
        default=[],
        metavar='KEY VALUE',
        help='any configuration keys; must come last',
    )
    return parser
