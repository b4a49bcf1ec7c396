#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw the patches of an image that the blocks of a Vision Transformer keep, drop, fuse and merge.

    python tools/visualize_tokens.py -cfg configs/evit_small_patch16_224_k07_fuse.yaml -pretrained evit.pdparams \
        -output pictures photos/ cat.jpg
    python tools/visualize_tokens.py -pretrained output/latest -output pictures -grid grid.png -columns 2 photos/

Writes a PNG strip per image: the input of the model, then a panel for each block that reduced the tokens.
docs/visualize.md explains the panels.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()

import argparse
import colorsys
import contextlib
import itertools
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle
from PIL import Image, ImageDraw, ImageFont

from datasets.bands import image_extensions
from deploy.inference import load_classifier
from engine import distributed
from models.vision_transformer import VisionTransformer
from tasks.pictures import as_image
from tools._common import find_images, trained_config
from tools._output import add_output_file, add_output_folder
from tools._pictures import readable, single_batch
from utils.cli import run
from utils.errors import UserError
from utils.files import atomic_write
from utils.flags import flag_parser
from utils.text import one_line


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = trained_config(args)
    paths = find_images(args.images, image_extensions(config.DATA.IMAGE_CHANNELS))
    targets = strip_paths(paths, args.folder)
    if args.grid and os.path.realpath(args.grid) in map(os.path.realpath, [*paths, *targets]):
        raise UserError(f"-grid '{args.grid}' is the path of another picture of this run; give another path.")
    distributed.start()
    model = load_classifier(config)
    strips, drawn = [], 0
    with atomic_write(args.grid) if args.grid else contextlib.nullcontext() as grid:
        for index, image in readable(paths, config):
            path, target = paths[index], targets[index]
            strip = draw_strip(path, image, reductions(model, config, image))
            with atomic_write(target) as file:
                strip.save(file, 'PNG')
            print(f'{one_line(path)}: {one_line(target)}', flush=True)
            drawn += 1
            if grid:
                strips.append(strip)
        if grid:
            tile(strips, args.columns).save(grid, 'PNG')
    print(f'{len(paths)} images, {len(paths) - drawn} of them unreadable')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser(
        'Draw which patches are kept, dropped, fused and merged.', ('-cfg', '-pretrained', '-image_size')
    )
    parser.add_argument('images', nargs='+', metavar='PATH', help='image files, or folders with images anywhere below')
    add_output_folder(parser, 'for a PNG per image', required=True)
    add_output_file(parser, '.png', flag='-grid', dest='grid', what='file with all images')
    parser.add_argument('-columns', type=int, default=1, metavar='N', help='images side by side in the grid')
    args = parser.parse_args(argv)
    if args.columns < 1:
        raise UserError(f'-columns is {args.columns}, but must be at least 1.')
    return args


def strip_paths(paths: Sequence[str], folder: str) -> list[str]:
    """Return `folder/NAME_tokens.png` for each image, with a number for equal names; never the path of an input image."""
    taken = {os.path.realpath(path) for path in paths}
    targets = []
    for path in paths:
        stem = os.path.join(folder, os.path.splitext(os.path.basename(path))[0])
        names = (f'{stem}_tokens{number}.png' for number in itertools.chain([''], itertools.count(2)))
        targets.append(next(name for name in names if os.path.realpath(name) not in taken))
        taken.add(os.path.realpath(targets[-1]))
    return targets


# ---------------------------------------------------------------------------------------------------- tokens
class Stage(NamedTuple):
    """Tokens of one image of n patches after a reduction.

    Token number i < n is the single patch i; number n + j is the token that reduction j fused.

    Attributes:
        row: numbers of the tokens after the class token, in order, [k] or with a fused token [k + 1].
        owners: number of the token that each patch belongs to, [n]; DROPPED: none.
    """

    row: np.ndarray
    owners: np.ndarray


DROPPED = -1


def trace_tokens(kept: Sequence[np.ndarray], num_patches: int, fuse: bool) -> list[Stage]:
    """Trace the patches of one image through EViT's reductions (arXiv 2202.07800, section 3.2).

    Args:
        kept: for each reduction the kept indices [k] into the previous row of tokens.
        num_patches: n.
        fuse: True if the other tokens are fused into one token at the end of the row instead of dropped. The next
            reduction treats a fused token like any other token.
    """
    stages = []
    row = owners = np.arange(num_patches)
    for number, indices in enumerate(kept):
        new = num_patches + number if fuse else DROPPED
        rest = np.delete(row, indices)
        row = np.append(row[indices], new) if fuse else row[indices]
        owners = np.where(np.isin(owners, rest), new, owners)
        stages.append(Stage(row, owners))
    return stages


def merged_owners(source: np.ndarray) -> np.ndarray:
    """Return the token of each patch from `TokenState.source` of one image.

    Args:
        source: [k, n] of 0 and 1: the patches in each of the k tokens; each patch is in one token at most.

    Returns:
        [n] as in `Stage`. A token of several patches has the number n + its first patch.
    """
    num_patches = source.shape[1]
    first = source.argmax(1)
    numbers = np.where(source.sum(1) > 1, num_patches + first, first)
    return np.where(source.any(0), numbers[source.argmax(0)], DROPPED)


class Reduction(NamedTuple):
    """Tokens of an image after a block that reduced them.

    Attributes:
        block: number of the block, from 0.
        owners: from `trace_tokens` or `merged_owners`.
        merged: True for `merged_owners`.
        grid: (rows, columns) of patches; None: a square.
    """

    block: int
    owners: np.ndarray
    merged: bool = False
    grid: tuple[int, int] | None = None


def reductions(model: VisionTransformer, config, image: np.ndarray) -> list[Reduction]:
    """Run a model on an image [H, W, C] uint8 and return the reduction of each block that reduced the tokens.

    Raises:
        UserError: no block reduced the tokens.
    """
    if not isinstance(model, VisionTransformer):
        raise UserError(f'MODEL.TYPE is {config.MODEL.TYPE}, which keeps all tokens; give the -cfg of an EViT.')
    with paddle.no_grad():
        seen = model.forward_intermediates(single_batch(image, config), want=('source',))
    blocks = {number: block for number, block in seen.blocks.items() if block.reduced}
    if not blocks:
        raise UserError(
            f"no block of '{config.MODEL.NAME}' reduces its tokens; give the -cfg of an EViT, or end the command "
            'with -opts MODEL.EVIT.KEEP_RATE 0.7 or with -opts MODEL.TOME.R 8.'
        )
    grid = model.patch_embed.grid_size
    sources = [block.source[0, model.num_prefix :, model.num_prefix :].numpy() for block in blocks.values()]
    if seen.state.size is not None:
        return [Reduction(number, merged_owners(source), True, grid) for number, source in zip(blocks, sources)]
    kept = [indices[0].numpy() for indices in seen.state.indices]
    stages = trace_tokens(kept, sources[0].shape[1], fuse=config.MODEL.EVIT.FUSE_TOKEN)
    return [Reduction(number, stage.owners, grid=grid) for number, stage in zip(blocks, stages)]


# ---------------------------------------------------------------------------------------------------- drawing
Color = tuple[int, int, int]

PANEL = 224  # minimum side of a panel in pixels; smaller images are enlarged by an integer factor
MARGIN, GAP, LINE, CHIP = 12, 6, 21, 10  # pixels: around a strip, between panels, per line of text, of a color sample
PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (110, 110, 110)
DROPPED_COLOR, DROPPED_OUTLINE = (236, 236, 236), (150, 150, 150)
# Colors of fused tokens, in the order of their reductions: Okabe and Ito's, distinct for color-blind readers.
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (213, 94, 0), (0, 114, 178), (240, 228, 66))
GOLDEN = (5**0.5 - 1) / 2  # step between the hues of consecutive outlines, for distinct hues
# Opacity of the color of a patch over the gray image.
DROPPED_SHARE, FUSED_SHARE, MERGED_SHARE = 0.86, 0.66, 1.0


def draw_strip(path: str, image: np.ndarray, steps: Sequence[Reduction]) -> Image.Image:
    """Draw an image [H, W, C] uint8 and its tokens after each reduction, with captions."""
    num_patches = len(steps[0].owners)
    grid = steps[0].grid or square(num_patches)
    patch = len(image) // grid[0]
    scale = math.ceil(PANEL / min(image.shape[:2]))
    height, side = (scale * length for length in image.shape[:2])
    width = 2 * MARGIN + (side + GAP) * (1 + len(steps)) - GAP
    strip = Image.new('RGB', (width, 2 * MARGIN + height + GAP + 2 * LINE), PAPER)
    canvas = ImageDraw.Draw(strip)
    left, below = MARGIN, MARGIN + height + GAP
    strip.paste(draw_owners(image, np.arange(num_patches), scale, grid=grid), (left, MARGIN))
    write(canvas, (left, below), shorten(path, side - CHIP), INK)
    write(canvas, (left, below + LINE), f'{num_patches} patches of {patch} px', FAINT)
    for block, owners, merged, _ in steps:
        left += side + GAP
        strip.paste(draw_owners(image, owners, scale, merged, grid), (left, MARGIN))
        tokens = len(np.unique(owners[owners != DROPPED]))
        write(canvas, (left, below), f'block {block}: {tokens} tokens', INK)
        if merged:
            write(canvas, (left, below + LINE), merged_counts(owners), FAINT)
        else:
            write_counts(canvas, (left, below + LINE), owners, side)
    return strip


def square(patches: int) -> tuple[int, int]:
    """Return the square grid of a number of patches."""
    return (math.isqrt(patches),) * 2


def draw_owners(
    image: np.ndarray,
    owners: np.ndarray,
    scale: int = 1,
    merged: bool = False,
    grid: tuple[int, int] | None = None,
) -> Image.Image:
    """Draw the token of each patch.

    Args:
        image: [H, W, C] uint8, drawn as by `as_image`.
        owners: token of each patch, row by row, [n], as in `Stage`. A patch that is a token of its own is unchanged, and a
            DROPPED patch is pale. Patches of any other token have its color, and an outline at its border.
        scale: pixels of the drawing per pixel of the image.
        merged: fill tokens of several patches with their mean color, as in ToMe's figures, since there are too many for
            distinct fill colors.
        grid: (rows, columns) of patches; None: a square.
    """
    rows, columns = grid or square(len(owners))
    cell = scale * (len(image) // rows)

    def spread(values: np.ndarray) -> np.ndarray:  # [n] or [n, 3] -> values of the pixels
        return values.reshape(rows, columns, -1).repeat(cell, 0).repeat(cell, 1)

    pixels = np.asarray(as_image(image).convert('RGB')).repeat(scale, 0).repeat(scale, 1)
    gray = (pixels @ [0.299, 0.587, 0.114])[..., np.newaxis]
    colors = (token_colors(token, len(owners), merged) for token in owners)
    fills, outlines = (np.array(column, float) for column in zip(*colors))
    if merged:
        patches = pixels.reshape(rows, cell, columns, cell, 3).mean((1, 3)).reshape(-1, 3)
        for token in np.unique(owners[owners != DROPPED]):
            fills[owners == token] = patches[owners == token].mean(0)
    share = spread(np.where(owners == DROPPED, DROPPED_SHARE, MERGED_SHARE if merged else FUSED_SHARE))
    painted = share * spread(fills) + (1 - share) * gray
    drawn = np.where(borders(owners.reshape(rows, columns), cell), spread(outlines), painted)
    alone = spread(owners == np.arange(len(owners)))
    return Image.fromarray(np.where(alone, pixels, np.rint(drawn)).astype(np.uint8))


def borders(grid: np.ndarray, cell: int) -> np.ndarray:
    """Return a mask [rows * cell, columns * cell, 1] of the edges between different values in grid [rows, columns]."""
    width = max(1, cell // 12)
    edge = np.zeros((len(grid), cell, grid.shape[1], cell), bool)
    rows = (grid[1:] != grid[:-1])[:, np.newaxis, :, np.newaxis]
    edge[:-1, -width:] |= rows
    edge[1:, :width] |= rows
    columns = (grid[:, 1:] != grid[:, :-1])[:, np.newaxis, :, np.newaxis]
    edge[:, :, :-1, -width:] |= columns
    edge[:, :, 1:, :width] |= columns
    return edge.reshape(len(grid) * cell, -1, 1)


def token_colors(token: int, num_patches: int, merged: bool = False) -> tuple[Color, Color]:
    """Return fill and outline color of a fused or merged token, the same in all panels, or of DROPPED."""
    if token == DROPPED:
        return DROPPED_COLOR, DROPPED_OUTLINE
    if merged:
        red, green, blue = colorsys.hsv_to_rgb(token * GOLDEN % 1, 1, 1)
        color = (round(255 * red), round(255 * green), round(255 * blue))
    else:
        color = PALETTE[(token - num_patches) % len(PALETTE)]
    return color, color


def merged_counts(owners: np.ndarray) -> str:
    """Return the numbers of single, merged and dropped patches as text."""
    tokens, sizes = np.unique(owners[owners >= len(owners)], return_counts=True)
    dropped = np.count_nonzero(owners == DROPPED)
    alone = f'{len(owners) - sizes.sum() - dropped} alone'
    if dropped:
        return f'{alone}, {sizes.sum()} in {len(tokens)}, {dropped} dropped'
    return f'{alone}, {sizes.sum()} merged into {len(tokens)}'


def write_counts(canvas: ImageDraw.ImageDraw, at: tuple[int, int], owners: np.ndarray, width: int) -> None:
    """Write the numbers of kept, fused and dropped patches: per fused token, or their sum if space is short."""
    num_patches = len(owners)
    tokens, sizes = np.unique(owners[owners != np.arange(num_patches)], return_counts=True)
    action = 'dropped' if DROPPED in tokens else 'fused'
    kept = f'{num_patches - sizes.sum()} kept'
    texts = [*map(str, sizes[:-1]), f'{sizes[-1]} {action}']
    if sum(_FONT.getlength(text) + 2.5 * CHIP for text in [kept, *texts]) > width + 2.5 * CHIP:
        write(canvas, at, f'{kept}, {sizes.sum()} {action} into {len(sizes)}', FAINT)
        return
    left, top = write(canvas, at, kept, FAINT), at[1]
    for token, text in zip(tokens, texts):
        left += CHIP
        fill, outline = token_colors(token, num_patches)
        canvas.rectangle((left, top + 5, left + CHIP - 1, top + 4 + CHIP), fill, outline)
        left = write(canvas, (left + CHIP + CHIP // 2, top), text, FAINT)


def write(canvas: ImageDraw.ImageDraw, at: tuple[int, int], text: str, color: Color) -> int:
    """Write a line of text and return its right end."""
    canvas.text(at, text, fill=color, font=_FONT)
    return at[0] + math.ceil(_FONT.getlength(text))


def shorten(path: str, width: int) -> str:
    """Shorten a path from its start to `width` pixels."""
    text = os.fsencode(path).decode('utf-8', 'replace')
    while _FONT.getlength(text) > width:
        text = '…' + text.lstrip('…')[1:]
    return text


_FONT = ImageFont.load_default(15)


def tile(strips: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arrange strips of equal size in rows of `columns`."""
    width, height = strips[0].size
    columns = min(columns, len(strips))
    grid = Image.new('RGB', (columns * width, math.ceil(len(strips) / columns) * height), PAPER)
    for number, strip in enumerate(strips):
        grid.paste(strip, (number % columns * width, number // columns * height))
    return grid


if __name__ == '__main__':
    run(main)
