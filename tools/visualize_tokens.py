#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Shows which patches of an image a Vision Transformer keeps, drops, fuses and merges on its way.

    python tools/visualize_tokens.py -cfg configs/evit_small_patch16_224_k07_fuse.yaml -pretrained evit.pdparams \
        -output pictures photos/ cat.jpg
    python tools/visualize_tokens.py -pretrained output/latest -output pictures -grid grid.png -columns 2 photos/

Writes a PNG strip per image: the image as the model sees it, then a panel for each block that reduced the tokens.
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

from config import flag_parser
from deploy.inference import load_classifier
from engine import distributed
from models.vision_transformer import VisionTransformer
from tools._common import find_images, trained_config
from tools._output import add_output_file, add_output_folder
from tools._pictures import readable, single_batch
from utils.cli import run
from utils.errors import UserError
from utils.files import atomic_write


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = trained_config(args)
    paths = find_images(args.images)
    targets = strip_paths(paths, args.folder)
    if args.grid and os.path.realpath(args.grid) in map(os.path.realpath, [*paths, *targets]):
        raise UserError(f"-grid '{args.grid}' is the path of another picture of this run; give another one.")
    distributed.start()
    model = load_classifier(config)
    strips, drawn = [], 0
    with atomic_write(args.grid) if args.grid else contextlib.nullcontext() as grid:
        for index, image in readable(paths, config):
            path, target = paths[index], targets[index]
            strip = draw_strip(path, image, reductions(model, config, image))
            with atomic_write(target) as file:
                strip.save(file, 'PNG')
            print(f'{path}: {target}', flush=True)
            drawn += 1
            if grid:
                strips.append(strip)
        if grid:
            tile(strips, args.columns).save(grid, 'PNG')
    print(f'{len(paths)} images, {len(paths) - drawn} of them unreadable')


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flag_parser(
        'Show which patches are kept, dropped, fused and merged.', ('-cfg', '-pretrained', '-image_size')
    )
    parser.add_argument('images', nargs='+', metavar='PATH', help='image files, or folders with images anywhere below')
    add_output_folder(parser, 'for a PNG per image', required=True)
    add_output_file(parser, '.png', flag='-grid', dest='grid', what='file that shows all images')
    parser.add_argument('-columns', type=int, default=1, metavar='N', help='images side by side in the grid')
    args = parser.parse_args(argv)
    if args.columns < 1:
        raise UserError(f'-columns is {args.columns}, but must be at least 1.')
    return args


def strip_paths(paths: Sequence[str], folder: str) -> list[str]:
    """`folder/NAME_tokens.png` for each image; a number tells equal names apart, and no image is written over."""
    taken = {os.path.realpath(path) for path in paths}
    targets = []
    for path in paths:
        stem = os.path.join(folder, os.path.splitext(os.path.basename(path))[0])
        names = (f'{stem}_tokens{number}.png' for number in itertools.chain([''], itertools.count(2)))
        targets.append(next(name for name in names if os.path.realpath(name) not in taken))
        taken.add(os.path.realpath(targets[-1]))
    return targets


# ---------------------------------------------------------------------------------------------------- bookkeeping
class Stage(NamedTuple):
    """The tokens of one image of n patches after a reduction.

    Tokens have numbers: i < n is patch i on its own; n + j is the token that reduction j fused, which is no patch.

    Attributes:
        row: numbers of the tokens after the class token, in their order, [k] or with a fused one [k + 1].
        holders: for each patch the number of the token that it is or has become a part of, [n]; DROPPED: of none.
    """

    row: np.ndarray
    holders: np.ndarray


DROPPED = -1


def trace_tokens(kept: Sequence[np.ndarray], num_patches: int, fuse: bool) -> list[Stage]:
    """Follows the patches of one image through EViT's reductions (arXiv 2202.07800, section 3.2).

    Args:
        kept: for each reduction the places it kept, [k], counted in the row that the one before left.
        num_patches: n.
        fuse: the other tokens were fused into one at the end of the row, not dropped. A fused token is kept, dropped
            or fused like any other in the next reduction.
    """
    stages = []
    row = holders = np.arange(num_patches)
    for number, places in enumerate(kept):
        new = num_patches + number if fuse else DROPPED
        rest = np.delete(row, places)
        row = np.append(row[places], new) if fuse else row[places]
        holders = np.where(np.isin(holders, rest), new, holders)
        stages.append(Stage(row, holders))
    return stages


def merged_holders(source: np.ndarray) -> np.ndarray:
    """Which token each patch belongs to, from what `TokenState.source` says of one image.

    Args:
        source: which of the n patches are in each of the k tokens, [k, n] of 0 and 1; each patch is in one at most.

    Returns:
        [n] as in `Stage`, but for several patches in one token, which have the number n + the first of them.
    """
    num_patches = source.shape[1]
    first = source.argmax(1)
    numbers = np.where(source.sum(1) > 1, num_patches + first, first)
    return np.where(source.any(0), numbers[source.argmax(0)], DROPPED)


class Reduction(NamedTuple):
    """What a block did to the tokens of an image.

    Attributes:
        block: its number, from 0.
        holders: of `trace_tokens` or `merged_holders`, after it.
        merged: of the latter.
    """

    block: int
    holders: np.ndarray
    merged: bool = False


def reductions(model: VisionTransformer, config, image: np.ndarray) -> list[Reduction]:
    """Run a model on an image [H, W, C] uint8 and return what each block that reduced the tokens did.

    Raises:
        UserError: no block did.
    """
    if not isinstance(model, VisionTransformer):
        raise UserError(f'MODEL.TYPE is {config.MODEL.TYPE}, whose tokens all stay; give the -cfg of an EViT.')
    with paddle.no_grad():
        seen = model.forward_intermediates(single_batch(image, config), want=('source',))
    blocks = {number: block for number, block in seen.blocks.items() if block.reduced}
    if not blocks:
        raise UserError(
            f"no block of '{config.MODEL.NAME}' reduces its tokens; give the -cfg of an EViT, or end the command "
            'with -opts MODEL.EVIT.KEEP_RATE 0.7 or with -opts MODEL.TOME.R 8.'
        )
    sources = [block.source[0, model.num_prefix :, model.num_prefix :].numpy() for block in blocks.values()]
    if seen.state.size is not None:
        return [Reduction(number, merged_holders(source), merged=True) for number, source in zip(blocks, sources)]
    kept = [places[0].numpy() for places in seen.state.indices]
    stages = trace_tokens(kept, sources[0].shape[1], fuse=config.MODEL.EVIT.FUSE_TOKEN)
    return [Reduction(number, stage.holders) for number, stage in zip(blocks, stages)]


# ---------------------------------------------------------------------------------------------------- drawing
Colour = tuple[int, int, int]

PANEL = 224  # smallest side of a panel, pixels; smaller images are enlarged by a whole number
MARGIN, GAP, LINE, CHIP = 12, 6, 21, 10  # around a strip, between its panels, a line of text, a spot of colour
PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (110, 110, 110)
DROPPED_COLOUR, DROPPED_OUTLINE = (236, 236, 236), (150, 150, 150)
# Of fused tokens, in the order they came into being: Okabe and Ito's, which colour-blind people can tell apart.
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (213, 94, 0), (0, 114, 178), (240, 228, 66))
GOLDEN = (5**0.5 - 1) / 2  # between the hues of outlines, of which no two in a row are alike
# How much of such a patch is its colour; the rest is the image in grey.
DROPPED_SHARE, FUSED_SHARE, MERGED_SHARE = 0.86, 0.66, 1.0


def draw_strip(path: str, image: np.ndarray, steps: Sequence[Reduction]) -> Image.Image:
    """An image [H, W, C] uint8 and what became of its patches, with captions."""
    num_patches = len(steps[0].holders)
    scale = math.ceil(PANEL / len(image))
    side = scale * len(image)
    patch = len(image) // math.isqrt(num_patches)
    width = 2 * MARGIN + (side + GAP) * (1 + len(steps)) - GAP
    strip = Image.new('RGB', (width, 2 * MARGIN + side + GAP + 2 * LINE), PAPER)
    canvas = ImageDraw.Draw(strip)
    left, below = MARGIN, MARGIN + side + GAP
    strip.paste(draw_holders(image, np.arange(num_patches), scale), (left, MARGIN))
    write(canvas, (left, below), shorten(path, side - CHIP), INK)
    write(canvas, (left, below + LINE), f'{num_patches} patches of {patch} px', FAINT)
    for block, holders, merged in steps:
        left += side + GAP
        strip.paste(draw_holders(image, holders, scale, merged), (left, MARGIN))
        tokens = len(np.unique(holders[holders != DROPPED]))
        write(canvas, (left, below), f'block {block}: {tokens} tokens', INK)
        if merged:
            write(canvas, (left, below + LINE), merged_counts(holders), FAINT)
        else:
            write_counts(canvas, (left, below + LINE), holders, side)
    return strip


def draw_holders(image: np.ndarray, holders: np.ndarray, scale: int = 1, merged: bool = False) -> Image.Image:
    """Draws which token each patch belongs to.

    Args:
        image: [H, W, C] uint8, H = W, C 1 or 3.
        holders: the token of each patch, row by row, [n], as in `Stage`. A patch that is its own token is shown as it
            is; those DROPPED fade; those of any other token take its colour, and an outline where another token begins.
        scale: side of a pixel of the image in the drawing.
        merged: paint tokens of several patches in the mean colour of these, as the figures of ToMe do: there are too
            many of them for colours of their own, which only their outlines have.
    """
    side = math.isqrt(len(holders))
    cell = scale * (len(image) // side)

    def spread(values: np.ndarray) -> np.ndarray:  # [n] or [n, 3] over the pixels of the patches
        return values.reshape(side, side, -1).repeat(cell, 0).repeat(cell, 1)

    pixels = np.broadcast_to(image, (*image.shape[:2], 3)).repeat(scale, 0).repeat(scale, 1)
    grey = (pixels @ [0.299, 0.587, 0.114])[..., np.newaxis]
    colours = (token_colours(token, len(holders), merged) for token in holders)
    fills, outlines = (np.array(column, float) for column in zip(*colours))
    if merged:
        patches = pixels.reshape(side, cell, side, cell, 3).mean((1, 3)).reshape(-1, 3)
        for token in np.unique(holders[holders != DROPPED]):
            fills[holders == token] = patches[holders == token].mean(0)
    share = spread(np.where(holders == DROPPED, DROPPED_SHARE, MERGED_SHARE if merged else FUSED_SHARE))
    painted = share * spread(fills) + (1 - share) * grey
    drawn = np.where(borders(holders.reshape(side, side), cell), spread(outlines), painted)
    alone = spread(holders == np.arange(len(holders)))
    return Image.fromarray(np.where(alone, pixels, np.rint(drawn)).astype(np.uint8))


def borders(grid: np.ndarray, cell: int) -> np.ndarray:
    """Pixels [side * cell, side * cell, 1] along the edges between cells of different values in grid [side, side]."""
    width = max(1, cell // 12)
    edge = np.zeros((len(grid), cell, len(grid), cell), bool)
    rows = (grid[1:] != grid[:-1])[:, np.newaxis, :, np.newaxis]
    edge[:-1, -width:] |= rows
    edge[1:, :width] |= rows
    columns = (grid[:, 1:] != grid[:, :-1])[:, np.newaxis, :, np.newaxis]
    edge[:, :, :-1, -width:] |= columns
    edge[:, :, 1:, :width] |= columns
    return edge.reshape(len(grid) * cell, -1, 1)


def token_colours(token: int, num_patches: int, merged: bool = False) -> tuple[Colour, Colour]:
    """Fill and outline of a fused or merged token, the same in all panels, or of DROPPED."""
    if token == DROPPED:
        return DROPPED_COLOUR, DROPPED_OUTLINE
    if merged:
        red, green, blue = colorsys.hsv_to_rgb(token * GOLDEN % 1, 1, 1)
        colour = (round(255 * red), round(255 * green), round(255 * blue))
    else:
        colour = PALETTE[(token - num_patches) % len(PALETTE)]
    return colour, colour


def merged_counts(holders: np.ndarray) -> str:
    """How many patches are on their own, and how many are merged into how many tokens or dropped."""
    tokens, sizes = np.unique(holders[holders >= len(holders)], return_counts=True)
    dropped = np.count_nonzero(holders == DROPPED)
    alone = f'{len(holders) - sizes.sum() - dropped} alone'
    if dropped:
        return f'{alone}, {sizes.sum()} in {len(tokens)}, {dropped} dropped'
    return f'{alone}, {sizes.sum()} merged into {len(tokens)}'


def write_counts(canvas: ImageDraw.ImageDraw, at: tuple[int, int], holders: np.ndarray, width: int) -> None:
    """How many patches are on their own, and how many in each fused token or dropped; in all, where space is short."""
    num_patches = len(holders)
    tokens, sizes = np.unique(holders[holders != np.arange(num_patches)], return_counts=True)
    fate = 'dropped' if DROPPED in tokens else 'fused'
    kept = f'{num_patches - sizes.sum()} kept'
    texts = [*map(str, sizes[:-1]), f'{sizes[-1]} {fate}']
    if sum(_FONT.getlength(text) + 2.5 * CHIP for text in [kept, *texts]) > width + 2.5 * CHIP:
        write(canvas, at, f'{kept}, {sizes.sum()} {fate} into {len(sizes)}', FAINT)
        return
    left, top = write(canvas, at, kept, FAINT), at[1]
    for token, text in zip(tokens, texts):
        left += CHIP
        fill, outline = token_colours(token, num_patches)
        canvas.rectangle((left, top + 5, left + CHIP - 1, top + 4 + CHIP), fill, outline)
        left = write(canvas, (left + CHIP + CHIP // 2, top), text, FAINT)


def write(canvas: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: Colour) -> int:
    """Writes a line and returns where it ends."""
    canvas.text(at, text, fill=colour, font=_FONT)
    return at[0] + math.ceil(_FONT.getlength(text))


def shorten(path: str, width: int) -> str:
    """As much of the end of a path as fits."""
    text = os.fsencode(path).decode('utf-8', 'replace')
    while _FONT.getlength(text) > width:
        text = '…' + text.lstrip('…')[1:]
    return text


_FONT = ImageFont.load_default(15)


def tile(strips: Sequence[Image.Image], columns: int) -> Image.Image:
    """Strips of one size in rows of `columns`."""
    width, height = strips[0].size
    columns = min(columns, len(strips))
    grid = Image.new('RGB', (columns * width, math.ceil(len(strips) / columns) * height), PAPER)
    for number, strip in enumerate(strips):
        grid.paste(strip, (number % columns * width, number // columns * height))
    return grid


if __name__ == '__main__':
    run(main)
