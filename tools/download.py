# SPDX-License-Identifier: Apache-2.0
"""Download and convert the published weights of configurations; `-pretrained=auto` does the same where they are needed.

    python tools/download.py deit_small_patch16_224 gmlp_s16_224
    python tools/download.py -list

Prints the .pdparams file of each. Files stay below $LEANVIT_CACHE, by default ~/.cache/leanvit.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse

from models.weights.published import fetch, file_url
from models.zoo import PUBLISHED
from utils.cli import run
from utils.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Fetch each name. An error of one does not stop the others; it gives exit status 2."""
    args = parse(argv)
    if args.list:
        for name, published in PUBLISHED.items():
            if published.url:
                kind = 'file' if file_url(published.url) else 'page'
                print(f'{name:<44} {kind}  {published.url}')
        return 0
    failed = 0
    for name in args.names:
        try:
            print(fetch(name))
        except UserError as error:
            print(f'error: {error}')
            failed = 2
    return failed


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Download published weights.', allow_abbrev=False)
    parser.add_argument('names', nargs='*', metavar='NAME', help='names of configurations, see -list')
    parser.add_argument(
        '-list', action='store_true', help='print the names with published weights, and where these are'
    )
    args = parser.parse_args(argv)
    if not args.names and not args.list:
        parser.error('give names of configurations, or -list')
    return args


if __name__ == '__main__':
    run(main)
