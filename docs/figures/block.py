# SPDX-License-Identifier: Apache-2.0
"""Write docs/block.png: the block of the Vision Transformer and the options that papers add to it.

python docs/figures/block.py
"""

from diagram import BLUE, FAINT, GREEN, RED, SAND, VIOLET, Diagram

X, WIDTH = 60, 220  # the block
OPTION_X, OPTION_WIDTH = 330, 520
LAYERS = (  # lower edge, height, title, color
    (20, 34, 'patches + positions', SAND),
    (90, 30, 'LayerNorm', BLUE),
    (134, 40, 'token mixer', GREEN),
    (208, 40, 'token reducers', RED),
    (282, 30, 'LayerNorm', BLUE),
    (326, 34, 'MLP', BLUE),
    (410, 34, 'pooling + head', VIOLET),
)
OPTIONS = (  # middle, color, title, lines
    (425, VIOLET, 'class token · class + distillation token (DeiT) · mean of the patch tokens (MAE-Lite)', 'MODEL.TRANS.DISTILLED, MODEL.TRANS.GLOBAL_POOL'),
    (343, BLUE, 'LayerScale (CaiT) · stochastic depth, on both branches', 'MODEL.TRANS.LAYER_SCALE, MODEL.DROPPATH'),
    (228, RED, 'EViT: keep the tokens that the class token attends to, fuse the rest\nToMe: merge similar tokens', 'MODEL.EVIT.KEEP_RATE, MODEL.EVIT.FUSE_TOKEN, MODEL.TOME.R'),
    (154, GREEN, 'attention (DeiT) · + relative position bias (MAE-Lite)\nλ-weighted attention that decays to none (attention removal)', 'MODEL.TRANS.REL_POS, MODEL.LAMBDA.PRUNE_LAYERS, MODEL.LAMBDA.REMOVED'),
    (37, SAND, 'absolute positions · all patches (DeiT) · visible patches only (MAE)', 'MODEL.TRANS.PATCH_SIZE, MODEL.TRANS.ABS_POS, MODEL.MAE.MASK_RATIO'),
)  # fmt: skip


def main() -> None:
    diagram, middle = Diagram(870, 470), X + WIDTH / 2
    for low, height, title, color in LAYERS:
        diagram.box(X, low, WIDTH, height, title, color=color)
    for (low, height, *_), (above, *_) in zip(LAYERS, LAYERS[1:]):
        diagram.arrow((middle, low + height), (middle, above))
    for start, end in ((72, 190), (264, 384)):  # residual connections
        diagram.axes.plot([middle, X - 12, X - 12, middle - 6], [start, start, end, end], color=FAINT, linewidth=1)
        diagram.axes.plot(middle, end, 'o', markersize=10, color='white', markeredgecolor=FAINT, zorder=3)
        diagram.text(middle, end - 1, '+', 10, FAINT, zorder=4)
    diagram.text(X - 34, 226, 'block, × depth', 9, FAINT, rotation=90)
    for y, color, title, keys in OPTIONS:
        lines = title.count('\n') + 1
        diagram.box(OPTION_X, y - 21 - 9 * (lines - 1), OPTION_WIDTH, 42 + 18 * (lines - 1), '', color=color)
        diagram.text(OPTION_X + 12, y + 8 + 2 * (lines - 1), title, 8.5, ha='left', linespacing=1.4)
        diagram.text(OPTION_X + 12, y - 9 - 7 * (lines - 1), keys, 7.5, FAINT, ha='left', family='monospace')
    for y, *_ in OPTIONS:
        diagram.arrow((OPTION_X, y), (X + WIDTH, y))
    diagram.save('block.png')


if __name__ == '__main__':
    main()
