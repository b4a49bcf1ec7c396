# SPDX-License-Identifier: Apache-2.0
"""Exported programs answer as the model does; where they do not, there are none."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import onnxruntime
import paddle
import pytest
from PIL import ExifTags, Image

from config import get_config
from datasets.batch import to_device
from datasets.loader import Batch
from datasets.transforms import build_transform
from deploy.inference import load_classifier
from tests.conftest import ROOT, assert_close
from tests.runs.conftest import run
from tests.tools.conftest import CLASSES, evaluated_logits
from tools import export
from utils.errors import UserError


def flags(trained, target) -> list[str]:
    return [f'-cfg={trained.cfg}', f'-pretrained={trained.weights}', f'-output={target}']


def test_the_guide_reproduces_the_evaluation(trained, tmp_path, monkeypatch):
    """The guide's code, run on the exported files alone, gives the logits of an evaluation."""
    run('tools/export.py', *flags(trained, tmp_path / 'exported' / 'mine'))
    assert sorted(os.listdir(tmp_path / 'exported')) == ['mine.json', 'mine.pdiparams', 'mine.preprocess.json']
    spec = json.loads((tmp_path / 'exported' / 'mine.preprocess.json').read_text())
    assert (spec['num_classes'], spec['crop_pct'], spec['resize_short']) == (CLASSES, 0.9, 44)
    assert spec['input'] == {'name': 'x', 'dtype': 'float32', 'shape': [None, 3, 40, 40]}

    with open(os.path.join(ROOT, 'docs', 'predict_export.md'), encoding='utf-8') as file:
        (code,) = re.findall(r'```python\n(.*?)```', file.read(), re.DOTALL)
    paths = [
        os.path.join(folder, name) for folder, _, names in sorted(os.walk(trained.images)) for name in sorted(names)
    ]
    assert "['a.jpg', 'b.jpg']" in code
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    exec(code.replace("['a.jpg', 'b.jpg']", repr(paths)), variables)
    assert_close(variables['logits'], evaluated_logits(trained), 1e-5)


def test_the_guide_squashes_and_turns_what_the_evaluation_does(tmp_path, monkeypatch):
    opts = ['DATA.IMAGE_SIZE', 40, 'DATA.EVAL_CROP', 'squash', 'DATA.IMAGENET_MEAN', (0.1, 0.2, 0.3)]
    opts += ['DATA.EXIF_ROTATE', True]
    config = get_config(None, opts)
    spec = export.describe(config, CLASSES)
    assert (spec['resize_short'], spec['crop_pct'], spec['image_size']) == (None, 1.0, 40)
    (tmp_path / 'exported').mkdir()
    (tmp_path / 'exported' / 'mine.preprocess.json').write_text(json.dumps(spec))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), 'uint8'))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    image.transpose(Image.Transpose.ROTATE_180).save(tmp_path / 'a.png', exif=exif)
    with open(os.path.join(ROOT, 'docs', 'predict_export.md'), encoding='utf-8') as file:
        code = file.read().partition('```python\n')[2].partition('\nconfig = ')[0]
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    exec(code, variables)
    pixels = build_transform(config, training=False).image(image)
    expected = to_device(Batch(pixels[None], {}, np.zeros(1)), (0.1, 0.2, 0.3), (0.5,) * 3).images
    np.testing.assert_allclose(variables['preprocess']('a.png'), expected[0], atol=1e-5)


def test_onnx(trained, tmp_path):
    """ONNX Runtime alone gives the logits of an evaluation from the exported file."""
    export.main([*flags(trained, tmp_path / 'mine'), '-format=onnx'])
    assert sorted(os.listdir(tmp_path)) == ['mine.onnx', 'mine.preprocess.json']
    images = np.random.default_rng(1).standard_normal((2, 3, 40, 40), 'float32')
    session = onnxruntime.InferenceSession(str(tmp_path / 'mine.onnx'), providers=['CPUExecutionProvider'])
    config = get_config(trained.cfg, ['MODEL.PRETRAINED', trained.weights])
    expected = load_classifier(config, log=lambda line: None)(paddle.to_tensor(images)).numpy()
    assert_close(session.run(None, {'x': images})[0], expected, 1e-5)


def test_int8(trained, tmp_path):
    export.main([*flags(trained, tmp_path / 'plain'), '-format=onnx'])
    export.main([*flags(trained, tmp_path / 'mine'), '-format=onnx', '-precision=int8'])
    assert sorted(os.listdir(tmp_path)) == [f'{name}{end}' for name in ('mine', 'plain') for end in ('.onnx', '.preprocess.json')]  # fmt: skip
    images = np.random.default_rng(1).standard_normal((2, 3, 40, 40), 'float32')
    found, expected = (
        onnxruntime.InferenceSession(str(tmp_path / f'{name}.onnx'), providers=['CPUExecutionProvider'])
        for name in ('mine', 'plain')
    )
    found, expected = (session.run(None, {'x': images})[0] for session in (found, expected))
    assert 1e-5 < np.abs(found - expected).max() / np.abs(expected).max() < 0.15
    with pytest.raises(UserError, match='-precision int8 needs -format onnx'):
        export.main([*flags(trained, tmp_path / 'mine'), '-precision=int8'])


class Deviating(export.Predictor):
    """A program that is off by a little, from its second run with a batch size on."""

    def __call__(self, images: np.ndarray, **more: np.ndarray) -> np.ndarray:
        logits = super().__call__(images, **more)
        self.sizes = [*getattr(self, 'sizes', []), len(images)]
        return logits + 1e-4 * np.abs(logits).max() * (self.sizes.count(3) > 1)


def test_a_program_that_disagrees_is_not_left_behind(trained, tmp_path, monkeypatch):
    target = tmp_path / 'net.v1'
    export.main(flags(trained, target))
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert len(before) == 3
    monkeypatch.setattr(export, 'Predictor', Deviating)
    with pytest.raises(UserError, match='disagrees with the model by 1.0e-04'):
        export.main(flags(trained, target))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    with pytest.raises(UserError, match='disagrees'):
        export.main(flags(trained, tmp_path / 'other'))
    assert set(os.listdir(tmp_path)) == set(before)


@pytest.mark.parametrize('moved', [0, 1, 2])
def test_an_interrupted_move_leaves_nothing_that_loads(trained, tmp_path, monkeypatch, moved):
    """Never the program of one export beside the weights of another."""
    target = tmp_path / 'net'
    for suffix in (export.PROGRAM, export.WEIGHTS, export.PREPROCESS):
        (tmp_path / f'net{suffix}').write_text('older')
        (tmp_path / f'new{suffix}').write_text('newer')
    replace, calls = os.replace, []

    def failing(source, destination):
        calls.append(source)
        if len(calls) > moved:
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, 'replace', failing)
    with pytest.raises(KeyboardInterrupt):
        export.publish(str(tmp_path / 'new'), str(target))
    assert not os.path.exists(f'{target}{export.PROGRAM}')
    monkeypatch.setattr(os, 'replace', replace)


def test_any_name(trained, tmp_path):
    """Paddle itself takes only names that are UTF-8."""
    target = str(tmp_path / 'dat\udce9' / 'net\udce9')
    export.main(flags(trained, target))
    assert sorted(os.listdir(os.path.dirname(target))) == [
        f'net\udce9{suffix}' for suffix in ('.json', '.pdiparams', '.preprocess.json')
    ]


def test_a_full_disk(trained, tmp_path, monkeypatch):
    """Paddle does not notice it."""
    save = export.save_program

    def cut(model, shape, prefix, more):
        save(model, shape, prefix, more)
        os.truncate(prefix + export.PROGRAM, 0)

    monkeypatch.setattr(export, 'save_program', cut)
    with pytest.raises(UserError, match='cannot be read back, so nothing is written; free space on its disk'):
        export.main(flags(trained, tmp_path / 'net'))
    assert not os.listdir(tmp_path)


def test_mistakes(trained, tmp_path):
    for target, text in [(tmp_path, 'is the folder'), ('/proc/x/y', "cannot write '/proc/x/y'")]:
        with pytest.raises(UserError, match=text):
            export.main(flags(trained, target))
