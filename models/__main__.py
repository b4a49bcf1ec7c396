# SPDX-License-Identifier: Apache-2.0
"""`python -m models [PATTERN]`: print a table of the models that match, such as 'evit*'; default: all models."""

from __future__ import annotations

import sys

from config import get_config
from models import list_models
from models.profile import profile_config
from models.registry import config_file
from models.zoo import PUBLISHED, Published
from utils.cli import run
from utils.errors import UserError
from utils.sizes import image_shape, size_text

COLUMNS = '{:<44} {:>9} {:>8} {:>6} {:>6} {:>6}  {}'


def main(pattern: str = '*') -> None:
    """Print one line per configuration; the accuracies are those of the published weights in the last column."""
    names = list_models(pattern)
    if not names:
        raise UserError(f"no model matches '{pattern}'; `python -m models` lists all.")
    print(COLUMNS.format('name', 'params M', 'MACs G', 'image', 'top-1', 'top-5', 'published weights'))
    for name in names:
        print(row(name), flush=True)


def row(name: str) -> str:
    """Return the line of one configuration."""
    config = get_config(config_file(name))
    size, published = size_text(config.DATA.IMAGE_SIZE), PUBLISHED.get(name, Published(name))
    cost = profile_config(config, [1, *image_shape(config)])
    accuracies = ['-' if acc is None else f'{acc:.2f}' for acc in (published.acc1, published.acc5)]
    return COLUMNS.format(
        name, f'{cost.params / 1e6:.3f}', f'{cost.macs / 1e9:.3f}', size, *accuracies, published.url or '-'
    )


if __name__ == '__main__':
    run(lambda: main(*sys.argv[1:2]))
