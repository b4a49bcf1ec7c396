# SPDX-License-Identifier: Apache-2.0
"""Convert published weights to .pdparams.

    python tools/port_weights.py -cfg configs/gmlp_s16_224.yaml -source gmlp_s16_224.pth -output gmlp_s16_224.pdparams

PyTorch is not needed, and no code of the source file is run. Every array of the source is used, or dropped for a printed
reason. Any other array is an error that lists names and shapes; nothing is written then.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse

from config import get_config
from models import build_model
from models.weights.convert import port_with_report
from tools._output import add_output_file
from utils.cli import run
from utils.formats import PADDLE, file_format, read_file, write_pdparams
from utils.weights import METADATA, SUFFIX, choose_state_dict


def main(argv: list[str] | None = None) -> None:
    """Read the source, convert it, print a report, and write the result."""
    args = parse(argv)
    config = get_config(args.cfg, args.opts)
    name = f"'{args.source}'"
    where, arrays = choose_state_dict(read_file(args.source), prefer_ema=args.ema, source=name)
    kind = file_format(args.source)
    print(f'{args.source}: {kind} file, {len(arrays)} arrays' + (f" under '{where}'" if where else ''))
    model = build_model(config)
    state, report = port_with_report(model, arrays, own_names=kind == PADDLE, source=name)
    print(report)
    metadata = model.weight_rules.metadata(model)
    write_pdparams({**state, METADATA: metadata} if metadata else state, args.target)
    print(f'written: {args.target}')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Convert published weights to .pdparams.', allow_abbrev=False)
    parser.add_argument('-cfg', required=True, metavar='FILE', help='YAML file that describes the model')
    parser.add_argument(
        '-source', required=True, metavar='FILE',
        help='.pth, .pt, .pth.tar, .safetensors, .npz or .pkl (detectron2) of the published model, or .pdparams of PaddleViT',
    )  # fmt: skip
    add_output_file(parser, SUFFIX, complete=True, required=True)
    parser.add_argument('-ema', action='store_true', help='take the averaged weights of a training checkpoint')
    parser.add_argument(
        '-opts', nargs=argparse.REMAINDER, default=[], metavar='KEY VALUE',
        help='configuration keys that override the file, such as MODEL.NUM_CLASSES 10; must come last',
    )  # fmt: skip
    return parser.parse_args(argv)


if __name__ == '__main__':
    run(main)
