# SPDX-License-Identifier: Apache-2.0
"""Evaluates the detections of tests/goldens/vitdet-cocoeval.npz, each process those of its own images, unequally many; what it
reports goes to FOLDER/RANK.json.

python tests/tasks/detection_on_ranks.py FOLDER
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from engine.launch import is_worker, launch


def main(folder: str) -> None:
    from datasets.coco import read_annotations
    from datasets.detection import DetectionDataset
    from engine import distributed
    from tests.conftest import golden
    from tests.tasks.test_detection_metrics import evaluated

    context = distributed.start()
    dataset = DetectionDataset(read_annotations(os.path.join(folder, 'truth.json')), folder, training=False)
    mine = range(context.rank, len(dataset), context.world_size)
    evaluator = evaluated(golden('vitdet-cocoeval'), dataset, context, mine)
    report = {
        'result': evaluator.result(),
        'details': evaluator.details(),
        'files': evaluator.files()['detections.json'],
    }
    with open(os.path.join(folder, f'{context.rank}.json'), 'w', encoding='utf-8') as file:
        json.dump(report, file)


if __name__ == '__main__':
    if not is_worker():
        sys.exit(launch())
    main(*sys.argv[1:])
