# SPDX-License-Identifier: Apache-2.0
"""Write docs/layout.png: the packages of this repository; each imports only from rows below its own.

python docs/figures/layout.py
"""

from diagram import FAINT, GRAY, GREEN, RED, SAND, VIOLET, Diagram

WIDTH, HEIGHT, GAP, MARGIN, TOP = 860, 62, 14, 20, 340
ROWS = (  # color, packages with what they hold
    (SAND, ('main_*.py, run_*.sh', 'launchers'), ('tools', 'convert, predict, export,\nbenchmark, plan …'),
     ('benchmarks', 'comparison with PyTorch,\ngrowth, loop')),
    (RED, ('engine', 'training loop, optimizer, schedules, checkpoints, processes, evaluation, run folder')),
    (VIOLET, ('tasks', 'losses and metrics:\nclassification, distillation, MAE, MoCo v3'), ('analysis', 'attention statistics, CKA,\nlayer selection'),
     ('deploy', 'trained models\nfor inference')),
    (GREEN, ('models', 'architectures, layers, weight conversion'), ('datasets', 'storage, transforms, samplers, workers, loader')),
    (GRAY, ('config.py, configs', 'every key; one YAML per model'), ('ops', 'operators in C++\nfor the CPU'),
     ('utils', 'files, logs, safe readers:\nneither models nor data')),
)  # fmt: skip


def main() -> None:
    diagram = Diagram(WIDTH, TOP + 76)
    for row, (color, *packages) in enumerate(ROWS):
        width = (WIDTH - 2 * MARGIN - 30 - GAP * (len(packages) - 1)) / len(packages)
        for column, (name, text) in enumerate(packages):
            x, y = MARGIN + 30 + column * (width + GAP), TOP - row * (HEIGHT + GAP)
            diagram.box(x, y, width, HEIGHT, name, text, color)
    diagram.arrow((MARGIN + 8, TOP + HEIGHT), (MARGIN + 8, TOP - 4 * (HEIGHT + GAP)))
    diagram.text(MARGIN - 4, TOP - 1.5 * (HEIGHT + GAP), 'imports', 9, FAINT, rotation=90)
    diagram.save('layout.png')


if __name__ == '__main__':
    main()
