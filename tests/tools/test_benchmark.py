# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures what it says, and the models take turns."""

from __future__ import annotations

import json
import os
import statistics
import sys

import numpy as np
import paddle
import pytest

from config import get_config
from engine import throughput
from engine.distributed import Context
from engine.throughput import BenchmarkCase, loader_speed, peak_memory, time_interleaved
from models import build_model, engines
from models.exported import Predictor, save_program
from tests.models.helpers import small_config
from tests.runs.conftest import run
from tools import benchmark
from utils.errors import UserError

CONFIG = """
DATA: {{IMAGE_SIZE: 32}}
MODEL:
  TYPE: gmlp
  MIXER: {{PATCH_SIZE: 8, EMBED_DIM: {width}, DEPTH: 2, MLP_RATIO: 4}}
"""


@pytest.fixture(scope='session')
def files(tmp_path_factory) -> list[str]:
    """A small and a wide model."""
    root = tmp_path_factory.mktemp('models')
    for width in (16, 768):
        (root / f'width{width}.yaml').write_text(CONFIG.format(width=width))
    return [str(root / f'width{width}.yaml') for width in (16, 768)]


def test_table_and_json(files, tmp_path):
    output = tmp_path / 'out.json'
    extra = ['-batch_size=2', '-rounds=3', f'-json={output}', '-num_classes=10']
    out, _ = run('tools/benchmark.py', *files, *extra)
    result = json.loads(output.read_text())
    facts, (small, wide) = result['environment'], result['models']
    assert (facts['engine'], facts['batch_size'], facts['paddle']) == ('dygraph', 2, paddle.__version__)
    assert facts['threads'] == len(os.sched_getaffinity(0))
    for file, row in zip(files, (small, wide)):
        weights = build_model(get_config(file, ['MODEL.NUM_CLASSES', 10])).parameters()
        assert row['params'] == sum(weight.size for weight in weights)
        assert len(row['batch_seconds']) == len(row['single_seconds']) == 3
        assert row['images_per_second'] == pytest.approx(2 / statistics.median(row['batch_seconds']))
        assert row['latency_ms'] == pytest.approx(1000 * statistics.median(row['single_seconds']))
        assert file in out
    # one image of 16 tokens: patches, two blocks (C -> 4C, tokens, 2C -> C), classifier
    for row, c in ((small, 16), (wide, 768)):
        assert row['macs'] == 16 * 192 * c + 2 * (16 * c * 4 * c + 16 * 16 * 2 * c + 16 * 2 * c * c) + 10 * c
    assert (small['ratio'], wide['ratio']) == (1, wide['images_per_second'] / small['images_per_second'])
    assert wide['ratio'] < 1
    assert sys.platform != 'linux' or wide['memory_bytes'] - small['memory_bytes'] > 3 * wide['params']


def test_training_step(files, tmp_path, capsys):
    """Recomputing saves at least half of what blocks keep for the backward pass; its cost in time is reported."""
    output = tmp_path / 'out.json'
    keys = {'PATCH_SIZE': 4, 'EMBED_DIM': 64, 'DEPTH': 8, 'MLP_RATIO': 8}
    options = [str(item) for key, value in keys.items() for item in (f'MODEL.MIXER.{key}', value)]
    flags = ['-training', '-batch_size=32', '-rounds=2', '-num_classes=10', '-dataset=digits', '-num_workers=0']
    flags += [f'-json={output}']
    benchmark.main([files[0], *flags, '-opts', *options])
    out = capsys.readouterr().out
    (row,) = json.loads(output.read_text())['models']
    plain, again = row['plain'], row['recompute']
    for step in (plain, again):
        assert len(step['step_seconds']) == 2
        assert step['step_ms'] == pytest.approx(1000 * statistics.median(step['step_seconds']))
    if sys.platform == 'linux':
        activations = 8 * 32 * 64 * 512 * 4  # blocks, images, tokens, inner channels, bytes: what is kept at least
        assert plain['memory_bytes'] - again['memory_bytes'] > activations / 2
        assert f'{again["memory_bytes"] / plain["memory_bytes"]:.2f}' in out
    assert f'{again["step_ms"] / plain["step_ms"]:.2f}' in out
    loader = row['loader']
    assert loader['workers'] == 0
    assert loader['headroom'] == pytest.approx(loader['images_per_second'] * plain['step_ms'] / 32000)
    assert out.splitlines()[-1].split()[-2:] == [f'{loader["images_per_second"]:.1f}', f'{loader["headroom"]:.2f}']


class SlowLoader:
    """Three batches of four images an epoch, two seconds each, a minute for the first one."""

    def __init__(self):
        self.clock = 0.0

    def epoch(self, epoch: int, borrow: bool):
        for _ in range(3):
            self.clock += 2.0 if self.clock else 60.0
            yield range(4)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True


def test_speed_of_a_loader(monkeypatch):
    """The first batch, for which workers start, is not counted; epochs follow one another."""
    loader = SlowLoader()
    monkeypatch.setattr(throughput.time, 'perf_counter', lambda: loader.clock)
    assert loader_speed(loader, 7) == 2.0 and loader.closed and loader.clock == 74.0


TRAINED = {
    'supervised': ['MODEL.TYPE', 'vit', 'MODEL.TRANS.DISTILLED', True, 'TRAIN.DISTILLATION_TYPE', 'hard'],
    'mae': ['MODEL.TYPE', 'mae', 'TRAIN.TASK', 'mae', 'MODEL.MAE.DECODER_EMBED_DIM', 16, 'MODEL.MAE.DECODER_DEPTH', 1],
    'segmentation': [
        'MODEL.TYPE',
        'upernet',
        'TRAIN.TASK',
        'segmentation',
        'MODEL.NUM_CLASSES',
        5,
        'TRAIN.RANDOM_ERASE_PROB',
        0.0,
        'MODEL.UPERNET.OUT_INDICES',
        (0, 0, 0, 0),
        'MODEL.UPERNET.CHANNELS',
        8,
        'MODEL.UPERNET.AUX_CHANNELS',
        8,
    ],  # fmt: skip
    'mocov3': ['MODEL.TYPE', 'mocov3', 'TRAIN.TASK', 'mocov3', 'DATA.VIEWS', 2, 'MODEL.MOCO.MLP_DIM', 16],
}


@pytest.mark.parametrize('task', TRAINED)
def test_training_step_of_each_objective(task):
    """With the losses that training has, but no teacher; gradients do not stay."""
    small = ['DATA.IMAGE_SIZE', 32, 'MODEL.TRANS.EMBED_DIM', 16, 'MODEL.TRANS.DEPTH', 1, 'MODEL.TRANS.NUM_HEADS', 2]
    case = BenchmarkCase(task, get_config(None, [*small, *TRAINED[task]]))
    call = case.training_call(4, Context(0, 1, False))
    call()
    call()


def test_exported_program(files, tmp_path):
    output = tmp_path / 'out.json'
    run('tools/benchmark.py', files[0], '-backend=exported', '-batch_size=2', '-rounds=1', f'-json={output}')
    result = json.loads(output.read_text())
    assert result['environment']['engine'] == 'paddle'
    assert result['models'][0]['images_per_second'] > 0


def test_models_take_turns():
    order = []
    calls = [lambda name=name: order.append(name) for name in 'abc']
    seconds = time_interleaved(calls, Context(0, 1, False), rounds=3, warmup=2)
    assert ''.join(order) == 'abc' * 5
    assert [len(taken) for taken in seconds] == [3, 3, 3]


class Killed(BenchmarkCase):
    """A model that is too much for the machine."""

    def calls(self, batch_sizes, context):
        os._exit(137)


def test_a_process_killed_for_memory_is_told(files):
    with pytest.raises(UserError, match='wide: there is not enough memory for one batch of 8 images'):
        peak_memory(Killed('wide', get_config(files[1])), batch_size=8)


def has_avx512() -> bool:
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return 'avx512f' in file.read().split()
    except OSError:
        return False


@pytest.mark.skipif(not has_avx512(), reason='oneDNN leaves the program in float32 on processors without AVX-512')
def test_bfloat16(files, tmp_path):
    model = build_model(get_config(files[0], ['MODEL.NUM_CLASSES', 10]))
    paddle.nn.initializer.Normal()(model.head.weight)
    save_program(model, [3, 32, 32], str(tmp_path / 'net'))
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), 'float32')
    exact, rounded = (Predictor(str(tmp_path / 'net'), precision)(images) for precision in ('fp32', 'bf16'))
    assert 1e-5 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.05


@pytest.mark.skipif(not has_avx512(), reason='oneDNN leaves the program in float32 on processors without AVX-512')
@pytest.mark.parametrize('name', ['ms_mlp_tiny_patch4_shift5_224', 'lambda_small_024_tome_r22'])
def test_bfloat16_of_programs_that_shift_and_merge(tmp_path, name):
    config = small_config(name)
    model = build_model(config)
    for block in model.sublayers():
        if hasattr(block, 'gamma') and isinstance(block.gamma, paddle.Tensor):
            block.gamma.set_value(paddle.ones_like(block.gamma))
    shape = [config.DATA.IMAGE_CHANNELS, config.DATA.IMAGE_SIZE, config.DATA.IMAGE_SIZE]
    save_program(model, shape, str(tmp_path / 'net'))
    images = np.random.default_rng(0).standard_normal((2, *shape), 'float32')
    exact, rounded = (Predictor(str(tmp_path / 'net'), precision)(images) for precision in ('fp32', 'bf16'))
    assert 1e-5 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.1


def test_bfloat16_needs_instructions_for_it(files, monkeypatch):
    monkeypatch.setattr(engines, 'emulates_bfloat16', lambda: True)
    with pytest.raises(UserError, match='no instructions for bfloat16'):
        benchmark.main([files[0], '-backend=exported', '-precision=bf16'])


@pytest.mark.parametrize(
    'opts, text',
    [
        (['AMP', True], '-amp .AMP. needs -engine dygraph'),
        (['TRAIN.TASK', 'mae', 'MODEL.TYPE', 'mae'], 'TASK mae needs'),
    ],
)
def test_throughput_refuses_what_an_evaluation_refuses(opts, text):
    config = get_config(opts=['ENGINE', 'paddle', *opts])
    with pytest.raises(UserError, match=text):
        throughput.measure(config, Context(0, 1, False))


def test_mistakes(files, tmp_path):
    mistakes = [
        (['gmlp_ti16_225'], "unknown model 'gmlp_ti16_225'.*Did you mean 'gmlp_ti16_224'"),
        ([files[0], '-precision=bf16'], '-precision needs another -engine'),
        ([files[0], '-amp', '-backend=exported'], '-amp needs -engine dygraph'),
        (['mae_digits', '-engine=paddle'], 'TRAIN.TASK mae needs ENGINE dygraph'),
        (['detect_digits', '-engine=onnxruntime'], 'TRAIN.TASK detection needs ENGINE dygraph'),
        ([files[0], '-training', '-backend=exported'], '-training needs -engine dygraph'),
        ([files[0], '-data_path=x'], '-dataset and -data_path need -training'),
        ([files[0], '-rounds=0'], '-rounds is 0'),
        ([files[0], '-batch_size=0'], 'DATA.BATCH_SIZE is 0'),
        ([files[0], '-json=/proc/out.json'], "cannot write '/proc/out.json'"),
    ]
    for argv, text in mistakes:
        with pytest.raises(UserError, match=text):
            benchmark.main(argv)
