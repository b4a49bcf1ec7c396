# SPDX-License-Identifier: Apache-2.0
"""Predictions are those of an evaluation, and every image is accounted for."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from PIL import ExifTags, Image

from datasets import transforms
from tests.runs.conftest import run
from tests.tools.conftest import CLASSES, evaluated_logits, random_state
from tools import predict
from utils.errors import UserError
from utils.formats import write_pdparams


def flags(trained) -> list[str]:
    return [f'-cfg={trained.cfg}', f'-pretrained={trained.weights}']


def in_process(*argv: str) -> int:
    return predict.main([*argv, '-opts', 'DATA.NUM_WORKERS', '0'])


def test_predictions_are_those_of_the_evaluation(trained, tmp_path):
    output = tmp_path / 'new folder' / 'out.json'
    run('tools/predict.py', *flags(trained), '-topk=99', f'-output={output}', trained.images)
    rows = json.loads(output.read_text())
    logits = evaluated_logits(trained)
    expected = F.softmax(paddle.to_tensor(logits), axis=-1).numpy()
    assert len(rows) == len(expected) == 3 * CLASSES
    assert len(set(logits.argmax(-1))) > 2
    for row, probabilities in zip(rows, expected):
        assert [entry['class'] for entry in row['predictions']] == np.argsort(-probabilities).tolist()
        listed = [entry['probability'] for entry in row['predictions']]
        np.testing.assert_allclose(listed, np.sort(probabilities)[::-1], rtol=0, atol=1e-6)

    out, _ = run('main_single_gpu.py', *flags(trained), '-eval', f'-output={tmp_path}')
    labels = [int(re.search(r'class(\d)', row['image']).group(1)) for row in rows]
    right = [row['predictions'][0]['class'] == label for row, label in zip(rows, labels)]
    assert float(re.search(r'Validation Acc@1: (\d\.\d+)', out).group(1)) == pytest.approx(np.mean(right), abs=1e-4)


def test_unreadable_images_keep_their_place(trained, tmp_path):
    """Damaged files, files without a suffix, names that are no text; the others do not suffer."""
    good = os.path.join(trained.images, 'class0', '0.png')
    folder = tmp_path / 'some'
    (folder / 'b').mkdir(parents=True)
    (folder / 'a.jpg').write_bytes(b'not an image')
    (folder / 'notes.txt').write_text('no suffix of an image')
    (folder / '.hidden.png').write_bytes(b'')
    with open(good, 'rb') as file:
        (folder / 'b' / 'cut.png').write_bytes(file.read()[:200])
    shutil.copy(good, os.fsencode(folder) + b'/b/\xff.png')
    shutil.copy(good, tmp_path / 'bare')
    names = tmp_path / 'names.txt'
    names.write_text(''.join(f'name, {k}\n' for k in range(CLASSES)))
    output = tmp_path / 'out.csv'
    extra = ['-topk=2', f'-class_names={names}', '-batch_size=2', f'-output={output}']
    out, err = run('tools/predict.py', *flags(trained), *extra, str(folder), str(tmp_path / 'bare'), good, status=1)
    assert f"left out below '{folder}', not images by their extensions: 1 .txt (1 in all)" in err
    with open(output, encoding='utf-8', errors='surrogateescape', newline='') as file:
        header, *rows = csv.reader(file)
    assert header == ['image', 'class1', 'name1', 'probability1', 'class2', 'name2', 'probability2', 'error']
    expected = [folder / 'a.jpg', folder / 'b' / 'cut.png', folder / 'b' / '\udcff.png', tmp_path / 'bare', good]
    assert [row[0] for row in rows] == [str(path) for path in expected]
    assert [row[1:-1] for row in rows[:2]] == [[''] * 6] * 2
    assert 'not an image' in rows[0][-1]
    assert rows[1][-1]
    for row in rows[2:]:  # the last digit depends on what else is in the batch
        assert [row[1], row[2], row[4], row[5]] == [rows[4][1], rows[4][2], rows[4][4], rows[4][5]]
        np.testing.assert_allclose([float(row[3]), float(row[6])], [float(rows[4][3]), float(rows[4][6])], rtol=1e-5)
        assert row[2] == f'name, {row[1]}'
        assert row[-1] == ''
    assert '5 images, 2 of them unreadable' in out
    assert not [name for name in os.listdir(tmp_path) if name.endswith('.tmp')]


def test_one_line_per_image_whatever_its_name(trained, tmp_path, capsys):
    shutil.copy(os.path.join(trained.images, 'class0', '0.png'), tmp_path / 'a\nb.png')
    assert in_process(*flags(trained), str(tmp_path)) == 0
    *_, line, total = capsys.readouterr().out.splitlines()
    assert line.startswith(f'{tmp_path}/a\\nb.png: ')
    assert total == '1 images, 0 of them unreadable'


@pytest.mark.parametrize('name', ['', 'none', 'none.pdparams'])
def test_weights_that_do_not_exist(tmp_path, name):
    with pytest.raises(UserError, match='is neither a weight file nor a run folder'):
        predict.main([f'-pretrained={tmp_path}/{name}', 'photos'])


def test_paths_after_opts(capsys):
    with pytest.raises(SystemExit, match='2'):
        predict.main(['-cfg=x.yaml', '-opts', 'SEED', '1', 'photos'])
    assert capsys.readouterr().err.endswith('required: PATH; -opts takes all words after it: put it last\n')


def test_status_1_when_nothing_can_be_read(trained, tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ('a.jpg', 'b.jpg')]
    for path in paths:
        open(path, 'wb').close()
    assert in_process(*flags(trained), *paths) == 1
    assert f'{paths[1]}: the file is empty' in capsys.readouterr().out


def test_thin_and_damaged_images_cost_no_other_answer(trained, tmp_path, capsys):
    """Each gets an answer or a reason, and the status is 1 for a single reason."""
    paths = [str(tmp_path / name) for name in ('a.png', 'b.png', 'c.png')]
    Image.new('RGB', (1, 30000)).save(paths[0])
    Image.new('F', (4, 4)).save(paths[1], 'TIFF')
    Image.new('RGB', (40, 40)).save(paths[2])
    assert in_process(*flags(trained), '-topk=1', *paths) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if '.png: ' in line]
    assert [line.partition(': ')[0] for line in lines] == paths
    assert (
        re.search(r': \d \d\.\d{4}$', lines[0]) and 'floating point' in lines[1] and re.search(r': \d \d\.', lines[2])
    )
    assert in_process(*flags(trained), paths[0], paths[2]) == 0


def test_too_little_memory_is_a_reason(trained, monkeypatch, capsys):
    monkeypatch.setattr(
        transforms.ResizeShort, 'apply', lambda self, image, placement: (_ for _ in ()).throw(MemoryError())
    )
    assert in_process(*flags(trained), os.path.join(trained.images, 'class0', '0.png')) == 1
    assert '0.png: there is not enough memory to read it' in capsys.readouterr().out


def test_orientation(trained, tmp_path, capsys):
    """With DATA.EXIF_ROTATE a picture and its turned copy with an EXIF orientation have the same answers."""
    exif, image = Image.Exif(), Image.open(os.path.join(trained.images, 'class0', '0.png'))
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / 'a.png')
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'b.png', exif=exif)
    answers = []
    for rotate in ('False', 'True'):
        predict.main([*flags(trained), str(tmp_path), '-opts', 'DATA.NUM_WORKERS', '0', 'DATA.EXIF_ROTATE', rotate])
        lines = [line for line in capsys.readouterr().out.splitlines() if '.png: ' in line]
        answers.append([line.partition('.png: ')[2] for line in lines])
    assert answers[0][0] == answers[1][0] == answers[1][1] != answers[0][1]


def test_a_run_folder_says_what_it_is(trained, tmp_path, capsys):
    """Its configuration is used, and of a checkpoint the averaged weights, which are those of `trained`."""
    shutil.copy(trained.cfg, tmp_path / 'config.yaml')
    averaged, other = random_state(trained.cfg, seed=0), random_state(trained.cfg, seed=1)
    write_pdparams({'model': other, 'model_ema': averaged, 'epoch': 3}, str(tmp_path / 'last.pdparams'))
    assert in_process(f'-pretrained={tmp_path}', '-topk=1', trained.images) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if '.png: ' in line]
    printed = [int(line.rpartition(': ')[2].split()[0]) for line in lines]
    assert printed == evaluated_logits(trained).argmax(-1).tolist()


def test_mistakes(trained, tmp_path):
    (tmp_path / 'empty').mkdir()
    names = tmp_path / 'names.txt'
    names.write_text('one\ntwo\n')
    weights, images = flags(trained), trained.images
    mistakes = [
        ([*weights, str(tmp_path / 'none')], 'no file or folder .*none'),
        ([*weights, str(tmp_path / 'empty')], r'no image \(.*jpg.* below .*empty'),
        ([*weights, '-output=out.txt', images], r'out\.txt.*must end in \.csv or \.json'),
        ([*weights, '-output=/proc/out.csv', images], "cannot write '/proc/out.csv'"),
        ([*weights, '-topk=0', images], '-topk is 0'),
        ([*weights, f'-class_names={names}', images], r'names\.txt.* 2 lines.*7 classes'),
        ([*weights, f'-class_names={tmp_path}/x', images], 'cannot read -class_names .*x'),
        ([weights[0], images], '-pretrained is missing'),
        ([weights[1], images], '-cfg is missing'),
        ([weights[0], f'-pretrained={tmp_path}/w', images], 'no weights'),
    ]
    for argv, text in mistakes:
        with pytest.raises(UserError, match=text):
            in_process(*argv)
    with pytest.raises(UserError, match='7 classes.*3 classes'):
        predict.main([*weights, images, '-opts', 'MODEL.NUM_CLASSES', '3'])
