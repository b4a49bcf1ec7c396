# SPDX-License-Identifier: Apache-2.0
"""AP of boxes and masks: vectors of pycocotools, any number of processes, results as COCO's JSON."""

import json
import os

import numpy as np
import paddle
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from config import get_config
from datasets.batch import Batch
from datasets.coco import read_annotations
from datasets.detection import BOXES, CLASSES, DetectionDataset
from tasks.detection_metrics import METRICS, Detected, DetectionEvaluator, coco_results, coco_statistics
from tests.conftest import golden
from tests.runs.conftest import run
from tests.tasks.helpers import ALONE


@pytest.fixture(scope='module')
def vectors():
    return golden('vitdet-cocoeval')


@pytest.mark.parametrize(('kind', 'name'), [('bbox', 'stats_bbox'), ('segm', 'stats_segm')])
def test_statistics(vectors, kind, name):
    statistics, per_class = coco_statistics(vectors.meta['gt'], vectors.meta['dt'], kind)
    np.testing.assert_allclose(statistics, vectors[f'out/{name}'], atol=1e-6)
    assert len(per_class) == 3 and per_class.mean() == pytest.approx(float(vectors[f'out/{name}'][0]), abs=1e-6)


# ---------------------------------------------------------------------------------------------------- evaluator
def write_truth(vectors, folder) -> DetectionDataset:
    """The images of the golden as a validation set on disk, whose annotations count from 0."""
    truth = vectors.meta['gt']
    for number, entry in enumerate(truth['annotations']):
        entry['id'] = number  # which pycocotools would take for no object
    for image in truth['images']:
        image['file_name'] = f'{image["id"]}.png'
        (folder / image['file_name']).write_bytes(b'not read here')
    (folder / 'truth.json').write_text(json.dumps(truth))
    return DetectionDataset(read_annotations(str(folder / 'truth.json')), str(folder), training=False)


def found_in(vectors, dataset, index) -> Detected:
    """The detections of the golden in image `index`."""
    results = [entry for entry in vectors.meta['dt'] if entry['image_id'] == dataset.image_ids[index]]
    numbers = {category.id: number for number, category in enumerate(dataset.categories)}
    boxes = np.array([entry['bbox'] for entry in results], 'float64').reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores, classes = [e['score'] for e in results], [numbers[e['category_id']] for e in results]
    masks = [entry['segmentation'] for entry in results]
    return Detected(boxes, np.array(scores), np.array(classes, int), masks, (120, 160), paddle.zeros([3, 60, 80]))


def evaluated(vectors, dataset, group, indices) -> DetectionEvaluator:
    """An evaluator that has seen the images `indices`, in batches of two, on one process of `group`."""
    config = get_config(opts=['TRAIN.TASK', 'detection'])
    evaluator = DetectionEvaluator(dataset, dataset.class_names, config.DATA, 0.5)
    evaluator.reset(None, group, lambda: False)
    for start in range(0, len(indices), 2):
        some = list(indices[start : start + 2])
        objects = [dataset.objects(index) for index in some]
        targets = {BOXES: [o.boxes() for o in objects], CLASSES: [o.classes for o in objects]}
        outputs = [found_in(vectors, dataset, index) for index in some]
        evaluator.process(Batch([None] * len(some), targets, np.array(some)), outputs)
    evaluator.reduce(group)
    return evaluator


def test_evaluator(vectors, tmp_path):
    dataset = write_truth(vectors, tmp_path)
    evaluator = evaluated(vectors, dataset, ALONE, range(len(dataset)))
    result = evaluator.result()
    for kind, name in (('box', 'stats_bbox'), ('mask', 'stats_segm')):
        found = [result[f'{kind}_{metric}'] for metric in METRICS]
        expected = np.where(vectors[f'out/{name}'] == -1, np.nan, vectors[f'out/{name}'])
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert set(evaluator.titles) < set(result) and evaluator.best == ('box_ap', 'max')
    lines = evaluator.details()
    assert lines[0].startswith('box   AP 0.2777  AP50 0.3826') and 'APl -' in lines[0] and lines[1].startswith('mask')
    assert len(lines) == 5 and lines[2].split()[1:3] == ['box', 'AP']
    classes = evaluator.class_results(())
    assert [list(row) for row in classes] == [['name', 'box_ap', 'mask_ap']] * 3
    assert np.nanmean([row['box_ap'] for row in classes]) == pytest.approx(result['box_ap'])
    picture = evaluator.pictures(None)['detection']
    assert picture.size == (2 * 80 + 3 * 4, 4 * 60 + 5 * 4)


def test_results_are_those_of_coco(vectors, tmp_path):
    """pycocotools reads the file, and computes the same from it."""
    dataset = write_truth(vectors, tmp_path)
    evaluator = evaluated(vectors, dataset, ALONE, range(len(dataset)))
    ((name, text),) = evaluator.files().items()
    assert name == 'detections.json'
    (tmp_path / name).write_text(text)
    truth = COCO()
    truth.dataset = vectors.meta['gt']
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / name)), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    np.testing.assert_allclose(evaluation.stats, vectors['out/stats_bbox'], atol=1e-6)


def test_images_that_were_not_read_do_not_count(vectors, tmp_path):
    dataset = write_truth(vectors, tmp_path)
    some = [0, 3, 4]
    truth = dataset.truth(some)
    assert {entry['image_id'] for entry in truth['annotations']} <= set(dataset.image_ids[some].tolist())
    results = [
        e
        for index in some
        for e in coco_results(found_in(vectors, dataset, index), int(dataset.image_ids[index]), [1, 3, 7])
    ]
    expected = coco_statistics(truth, results, 'segm')[0]
    found = evaluated(vectors, dataset, ALONE, some).result()
    np.testing.assert_allclose([found['mask_ap'], found['mask_ar100']], expected[[0, 8]])


def test_nothing_found(vectors, tmp_path):
    dataset = write_truth(vectors, tmp_path)
    statistics, per_class = coco_statistics(dataset.truth(range(len(dataset))), [], 'segm')
    assert statistics[0] == 0 and (per_class == 0).all()
    empty = {'images': dataset.truth([0])['images'], 'annotations': [], 'categories': dataset.truth([0])['categories']}
    assert (coco_statistics(empty, [], 'bbox')[0] == -1).all()


def test_two_processes(vectors, tmp_path):
    """Each evaluates its own images; both have the metrics of all, and the main one has all results."""
    dataset = write_truth(vectors, tmp_path)
    run(os.path.join('tests', 'tasks', 'detection_on_ranks.py'), str(tmp_path), NPROC='2')
    alone = evaluated(vectors, dataset, ALONE, range(len(dataset)))
    for rank in (0, 1):
        with open(tmp_path / f'{rank}.json', encoding='utf-8') as file:
            found = json.load(file)
        np.testing.assert_array_equal(list(found['result'].values()), list(alone.result().values()))
        assert found['details'] == alone.details()
        assert json.loads(found['files']) == (json.loads(alone.files()['detections.json']) if rank == 0 else [])
