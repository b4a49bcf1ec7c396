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
from engine.distributed import Context
from engine.exported import Predictor, save_program
from engine.throughput import Subject, peak_memory, time_interleaved
from models import build_model
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
    assert (facts['backend'], facts['batch_size'], facts['paddle']) == ('dygraph', 2, paddle.__version__)
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


def test_exported_program(files, tmp_path):
    output = tmp_path / 'out.json'
    run('tools/benchmark.py', files[0], '-backend=exported', '-batch_size=2', '-rounds=1', f'-json={output}')
    result = json.loads(output.read_text())
    assert result['environment']['backend'] == 'exported'
    assert result['models'][0]['images_per_second'] > 0


def test_models_take_turns():
    order = []
    calls = [lambda name=name: order.append(name) for name in 'abc']
    seconds = time_interleaved(calls, Context(0, 1, False), rounds=3, warmup=2)
    assert ''.join(order) == 'abc' * 5
    assert [len(taken) for taken in seconds] == [3, 3, 3]


class Killed(Subject):
    """A model that is too much for the machine."""

    def calls(self, batch_sizes, context):
        os._exit(137)


def test_a_process_killed_for_memory_is_told(files):
    with pytest.raises(UserError, match='wide: there is not enough memory for one batch of 8 images'):
        peak_memory(Killed('wide', get_config(files[1])), batch_size=8)


def test_bfloat16(files, tmp_path, monkeypatch):
    model = build_model(get_config(files[0], ['MODEL.NUM_CLASSES', 10]))
    paddle.nn.initializer.Normal()(model.head.weight)
    save_program(model, [3, 32, 32], str(tmp_path / 'net'))
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), 'float32')
    exact, rounded = (Predictor(str(tmp_path / 'net'), precision)(images) for precision in ('fp32', 'bf16'))
    assert 1e-5 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.05

    monkeypatch.setattr(benchmark, 'emulates_bfloat16', lambda: True)
    with pytest.raises(UserError, match='no instructions for bfloat16'):
        benchmark.main([files[0], '-backend=exported', '-precision=bf16'])


def test_mistakes(files, tmp_path):
    mistakes = [
        (['gmlp_ti16_225'], "unknown model 'gmlp_ti16_225'.*Did you mean 'gmlp_ti16_224'"),
        ([files[0], '-precision=bf16'], '-precision belongs to -backend exported'),
        ([files[0], '-amp', '-backend=exported'], '-amp belongs to -backend dygraph'),
        ([files[0], '-rounds=0'], '-rounds is 0'),
        ([files[0], '-batch_size=0'], 'DATA.BATCH_SIZE is 0'),
        ([files[0], '-json=/proc/out.json'], "cannot write '/proc/out.json'"),
    ]
    for argv, text in mistakes:
        with pytest.raises(UserError, match=text):
            benchmark.main(argv)
