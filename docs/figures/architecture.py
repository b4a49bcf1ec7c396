# SPDX-License-Identifier: Apache-2.0
"""Write docs/architecture.png: the data flow from configuration and storage to the files of a run.

python docs/figures/architecture.py
"""

from diagram import BLUE, GREEN, RED, SAND, VIOLET, Diagram

WIDTH = 176
BOXES = {  # x, y, height, lines, color
    'configuration': (20, 270, 90, 'defaults < BASE < YAML\n< flags < -opts', SAND),
    'model': (252, 270, 90, 'embedding, blocks, head;\nown or converted weights', GREEN),
    'task': (484, 270, 90, 'losses of a micro-batch', RED),
    'optimizer step': (716, 210, 130, 'accumulate micro-batches,\nall-reduce, clip,\nAdamW, EMA', RED),
    'storage': (20, 135, 96, 'folder, list, CIFAR, digits,\nzip, LMDB', BLUE),
    'workers': (252, 135, 96, 'decode, crop, augment;\nuint8 in shared memory', BLUE),
    'batch': (484, 135, 96, 'normalize, erase, mix\non the device', BLUE),
    'evaluation': (484, 30, 70, 'each image exactly once', RED),
    'run folder': (716, 30, 110, 'last, best, epoch_NNNN,\nlog.txt, metrics.jsonl,\nVisualDL', VIOLET),
}
ARROWS = (
    ((196, 315), (250, 315), ''),
    ((108, 268), (108, 233), ''),
    ((428, 315), (482, 315), 'logits'),
    ((196, 183), (250, 183), 'files'),
    ((428, 183), (482, 183), 'uint8'),
    ((572, 232), (572, 268), ''),
    ((572, 133), (572, 102), ''),
    ((660, 305), (714, 285), 'loss'),
    ((660, 60), (714, 60), 'metrics'),
    ((804, 208), (804, 142), ''),
)


def main() -> None:
    diagram = Diagram(912, 380)
    for title, (x, y, height, lines, color) in BOXES.items():
        diagram.box(x, y, WIDTH, height, title, lines, color)
    for start, end, label in ARROWS:
        diagram.arrow(start, end, label)
    diagram.save('architecture.png')


if __name__ == '__main__':
    main()
