# SPDX-License-Identifier: Apache-2.0
"""Write the features of images: files, or all images below folders.

    python tools/extract_features.py -pretrained output/latest -output features.npz photos/
    python tools/extract_features.py -cfg configs/deit_small_patch16_224.yaml -pretrained auto -tokens -output tokens.npz photos/

A .npz file holds `features` and `names`, the paths of the images. A .npy file holds the features alone, and a .txt file of the
same name one path per line. Loader and transform are those of the evaluation.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse
import contextlib
import os
import sys

import numpy as np

from datasets.bands import image_extensions
from deploy.features import FeatureExtractor, file_features, load_encoder
from engine import distributed
from tools._common import find_images, trained_config
from tools._output import add_output_file
from utils.cli import run
from utils.errors import UserError
from utils.files import TEXT, atomic_write
from utils.flags import flag_parser
from utils.runlog import progress
from utils.text import one_line


def main(argv: list[str] | None = None) -> int:
    """Return 1 if an image could not be read, else 0."""
    args = parse(argv)
    config = trained_config(args)
    paths = find_images(args.images, image_extensions(config.DATA.IMAGE_CHANNELS))
    distributed.start()
    extractor = FeatureExtractor(config, args.tokens, args.normalize)
    results = file_features(config, load_encoder(config), paths, extractor)
    names, features, unreadable = [], [], 0
    for result in progress(results, len(paths), 'images', shown=True):
        if result.error is None:
            names.append(result.image)
            features.append(result.prediction)
        else:
            unreadable += 1
            print(f'{one_line(result.image)}: {result.error}', file=sys.stderr)
    if not features:
        raise UserError('none of the images could be read; nothing is written.')
    write(args.target, names, np.stack(features))
    shape = ' x '.join(map(str, features[0].shape))
    print(f'{args.target}: {len(names)} images, {shape} numbers each; {unreadable} images unreadable')
    return int(unreadable > 0)


def write(target: str, names: list[str], features: np.ndarray) -> None:
    """Write features [images, ...] float32 and names, in one .npz file or in a .npy and a .txt file."""
    with contextlib.ExitStack() as stack:  # all files are complete before the first replaces an older one
        file = stack.enter_context(atomic_write(target))
        if target.endswith('.npz'):
            np.savez(file, features=features, names=np.array(names))
        else:
            np.save(file, features)
            lines = stack.enter_context(atomic_write(f'{os.path.splitext(target)[0]}.txt'))
            lines.write(''.join(f'{one_line(name)}\n' for name in names).encode(TEXT['encoding'], 'surrogateescape'))


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = ('-cfg', '-pretrained', '-batch_size', '-image_size', '-num_workers')
    parser = flag_parser('Write the features of images.', flags)
    parser.add_argument('images', nargs='+', metavar='PATH', help='image files, or folders with images anywhere below')
    parser.add_argument(
        '-tokens', action='store_true', help='all tokens of the last block, instead of the pooled features'
    )
    parser.add_argument(
        '-normalize', action='store_true', help='scale pooled features to length 1, as the kNN probe does'
    )
    add_output_file(parser, '.npz', '.npy', required=True)
    parser.set_defaults(batch_size=32)
    args = parser.parse_args(argv)
    if args.tokens and args.normalize:
        raise UserError('-normalize applies to pooled features: leave out -tokens or -normalize.')
    return args


if __name__ == '__main__':
    run(main)
