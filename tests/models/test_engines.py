# SPDX-License-Identifier: Apache-2.0
"""Inference engines: every one computes what the layers compute."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import paddle
import pytest

from config import SCHEMA, get_config
from models import build_model, engines, onnx_files
from models.engines import ENGINES, LAYERS, EngineModel, check_engine, open_engine, write_engine_file
from models.exported import save_program
from models.onnx_files import convert_program
from tasks import build_task
from tests.conftest import assert_close
from tests.models.helpers import small_config
from tests.runs.conftest import run
from tests.tools.conftest import trained  # noqa: F401 (a fixture)
from tools import predict
from utils import environment
from utils.errors import UserError

REDUCED = (
    *('MODEL.TRANS.DEPTH', 4, 'MODEL.EVIT.KEEP_RATE', 0.7, 'MODEL.EVIT.DROP_LOC', (1,), 'MODEL.EVIT.FUSE_TOKEN', True),
    *('MODEL.TOME.R', 2, 'MODEL.LAMBDA.PRUNE_LAYERS', (0,), 'MODEL.LAMBDA.REMOVED', True),
)
MODELS = {  # together they have all parts of the models that classify
    'gmlp': ('gmlp_ti16_224', ()),
    'ms_mlp': ('ms_mlp_tiny_patch4_shift5_224', ()),
    'reduced': ('deit_tiny_distilled_patch16_224', REDUCED),
    'relative': ('vit_tiny_patch16_224_mae_finetune_rpe', ()),
}


def random_model(config) -> paddle.nn.Layer:
    """A model whose logits depend on all layers."""
    paddle.seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        if parameter.ndim > 1 or not parameter.numpy().any():
            parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    model.eval()
    return model


def images(config, batch: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, *build_task(config).image_shape()), 'float32')


@pytest.mark.parametrize('name', MODELS)
def test_engines_equal_the_layers(name, tmp_path):
    """Logits of any batch size, in each run of an engine, to 1e-5 of the largest."""
    source, options = MODELS[name]
    config = small_config(source, *options)
    model = random_model(config)
    onnx = write_engine_file('onnxruntime', model, images(config, 1).shape[1:], str(tmp_path / 'model'))
    batches = [images(config, size) for size in (1, 3)]
    with paddle.no_grad():
        expected = [model(paddle.to_tensor(batch)).numpy() for batch in batches]
    assert np.abs(expected[1][0] - expected[1][1]).max() > 1e-3
    for engine in ENGINES[1:]:
        found = open_engine(engine, str(tmp_path / 'model') if engine == 'paddle' else onnx)
        for batch, logits in [*zip(batches, expected)] * 2:
            assert_close(found(batch), logits, 1e-5)


def test_evaluation_and_prediction(trained, tmp_path):  # noqa: F811
    """Launcher and predict give the same metrics and classes with each engine."""
    found = {}
    for engine in (LAYERS, 'openvino'):
        folder = tmp_path / engine
        flags = (f'-cfg={trained.cfg}', f'-pretrained={trained.weights}', f'-engine={engine}')
        run('main_single_gpu.py', '-eval', *flags, f'-output={folder}', '-tag=run')
        with open(folder / 'run' / 'metrics.jsonl') as file:
            metrics = json.loads(file.read().splitlines()[-1])
        predict.main([*flags, f'-output={folder / "out.json"}', '-num_workers=0', trained.images])
        found[engine] = metrics, json.loads((folder / 'out.json').read_text())
    (layers, rows), (other, other_rows) = found.values()
    assert (layers['acc1'], layers['images']) == (other['acc1'], other['images'])
    assert layers['loss'] == pytest.approx(other['loss'], rel=1e-5)
    for row, other_row in zip(rows, other_rows):
        for one, two in zip(row['predictions'], other_row['predictions']):
            assert one['class'] == two['class']
            assert one['probability'] == pytest.approx(two['probability'], rel=1e-4)


@pytest.mark.parametrize('engine', ENGINES[1:])
def test_the_layers_keep_their_threads(engine, tmp_path):
    """Paddle's inference would leave one thread, and layers would be half as fast afterwards."""
    library = environment._load_openmp()
    if library is None:
        pytest.skip('no OpenMP runtime in the Paddle package')
    config = small_config('gmlp_ti16_224')
    shape = build_task(config).image_shape()
    run = open_engine(engine, write_engine_file(engine, random_model(config), shape, str(tmp_path / 'model')))
    before = library.omp_get_max_threads()
    try:
        library.omp_set_num_threads(3)
        run(np.zeros((1, *shape), 'float32'))
        assert library.omp_get_max_threads() == 3
    finally:
        library.omp_set_num_threads(before)


def test_an_engine_model_has_the_attributes_of_its_model(monkeypatch):
    config = small_config('gmlp_ti16_224')
    model = random_model(config)
    monkeypatch.setattr(engines, 'write_engine_file', lambda engine, model, shape, prefix: prefix)
    monkeypatch.setattr(engines, 'open_engine', lambda engine, source, precision: lambda x: 2 * x)
    fast = EngineModel(model, 'paddle', (3, 8, 8))
    assert fast.num_classes == model.num_classes
    assert not fast.training and not fast.parameters()
    np.testing.assert_array_equal(fast(paddle.ones([2, 3])).numpy(), 2)
    with pytest.raises(AttributeError):
        fast.no_such_attribute  # noqa: B018


# ---------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ('options', 'reason'),
    [
        (['TRAIN.TASK', 'mae', 'MODEL.TYPE', 'mae'], 'runs classifiers; TRAIN.TASK mae needs ENGINE dygraph'),
        (['AMP', True], '-amp (AMP) needs -engine dygraph'),
    ],
)
def test_what_engines_do_not_run(options, reason):
    config = get_config(None, ['ENGINE', 'onnxruntime', 'MODEL.NUM_CLASSES', 3, *options])
    with pytest.raises(UserError, match=re.escape(reason)):
        build_task(config).on_engine(paddle.nn.Linear(2, 2))


def test_precisions(monkeypatch):
    monkeypatch.setattr(engines, 'emulates_bfloat16', lambda: True)
    check_engine('onnxruntime')
    with pytest.raises(UserError, match='-engine onnxruntime runs in fp32'):
        check_engine('onnxruntime', 'bf16')
    with pytest.raises(UserError, match='no instructions for bfloat16'):
        check_engine('openvino', 'bf16')
    check_engine('onnxruntime', 'int8')
    with pytest.raises(
        UserError, match=re.escape('-engine openvino does not run in int8 (ENGINE_PRECISION or -precision)')
    ):
        check_engine('openvino', 'int8')
    config = get_config(None, ['ENGINE_PRECISION', 'int8', 'MODEL.NUM_CLASSES', 3])
    with pytest.raises(UserError, match='-engine dygraph does not run in int8'):
        build_task(config).on_engine(paddle.nn.Linear(2, 2))


def test_int8(capfd):
    """Linear layers are quantized; logits change a little, at any batch size; the quantizer prints nothing."""
    source, options = MODELS['reduced']
    config = small_config(source, *options, 'ENGINE', 'onnxruntime', 'ENGINE_PRECISION', 'int8')
    model = random_model(config)
    fast = build_task(config).on_engine(model)
    assert capfd.readouterr().err == ''
    for size in (1, 3):
        batch = paddle.to_tensor(images(config, size))
        with paddle.no_grad():
            expected, found = model(batch).numpy(), fast(batch).numpy()
        assert 1e-5 < np.abs(found - expected).max() / np.abs(expected).max() < 0.15


def test_int8_has_a_quarter_of_the_size(tmp_path):
    save_program(paddle.nn.Linear(256, 1024), [256], str(tmp_path / 'net'))
    path = convert_program(str(tmp_path / 'net'))
    quantized = onnx_files.quantize_weights(path)
    assert 1024 * 256 < os.path.getsize(quantized) < os.path.getsize(path) / 3


@pytest.mark.parametrize(
    ('code', 'reason'),
    [
        (
            'print("[ERROR][Paddle2ONNX] no pd_op.x\\nmore"); raise SystemExit(1)',
            'this model to ONNX: no pd_op.x',
        ),
        ('print("last words"); raise SystemExit(1)', 'this model to ONNX: last words'),
        ('import os; os.abort()', 'this model to ONNX: it ended with status -6'),
        (
            'raise ModuleNotFoundError("No module named \'paddle2onnx\'")',
            'paddle2onnx is not installed: pip install -r',
        ),
    ],
)
def test_a_failed_conversion_is_a_sentence(monkeypatch, tmp_path, code, reason):
    save_program(paddle.nn.Linear(4, 2), [4], str(tmp_path / 'net'))
    monkeypatch.setattr(onnx_files, '_CONVERT', code)
    with pytest.raises(UserError, match=re.escape(reason)):
        convert_program(str(tmp_path / 'net'))
    assert not os.path.exists(tmp_path / 'net.onnx')


def test_a_refused_file_is_a_sentence(tmp_path):
    (tmp_path / 'net.onnx').write_bytes(b'no ONNX file')
    with pytest.raises(UserError, match='ONNX Runtime does not run the converted model: .*Load model from'):
        onnx_files.OnnxRuntime(str(tmp_path / 'net.onnx'))
    with pytest.raises(UserError, match='OpenVINO does not run the converted model: '):
        onnx_files.OpenVino(str(tmp_path / 'net.onnx'))


def test_the_configuration_has_all_engines():
    assert SCHEMA.keys['ENGINE'].allowed == ENGINES


def test_a_missing_package_is_a_sentence():
    with pytest.raises(UserError, match='no_such_package cannot be imported.*requirements-deploy'):
        onnx_files.optional_package('no_such_package')
