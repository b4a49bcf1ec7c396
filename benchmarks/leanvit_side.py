# SPDX-License-Identifier: Apache-2.0
"""The side of this suite: inference engines and training steps, as `tools/benchmark.py` measures them."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace

import numpy as np
import paddle

from benchmarks.cases import INFERENCE, LAYERS, Case
from benchmarks.processes import Call
from config import get_config
from engine import distributed
from engine.precision import Precision
from engine.throughput import BenchmarkCase
from models import build_model
from models.engines import check_engine, write_engine_file
from models.exported import cpu_threads
from models.registry import config_file
from models.weights.convert import port_state_dict
from utils.errors import UserError

# A step has what PyTorch's has: label smoothing and AdamW; no mixing of images, clipping, EMA or layer-wise decay.
STEP = {
    'TRAIN.MIXUP_ALPHA': 0.0, 'TRAIN.CUTMIX_ALPHA': 0.0, 'TRAIN.GRAD_CLIP': 0.0, 'TRAIN.MODEL_EMA': False,
    'TRAIN.LAYER_DECAY': 1.0,
}  # fmt: skip
EVIT_STEP = {'MODEL.EVIT.SHRINK_START_EPOCH': 0, 'MODEL.EVIT.SHRINK_EPOCHS': 0}  # the keep rate from the first step on
MIXED = {'AMP': True, 'AMP_DTYPE': 'bfloat16'}
ENGINE_PACKAGES = ('onnxruntime', 'openvino')


class LeanViT:
    """See `benchmarks.processes.Side`.

    Args:
        folder: exported files.
    """

    def __init__(self, folder: str):
        self._context = distributed.start()
        self._folder = folder

    def versions(self) -> dict[str, str]:
        """See `Side`; engines that are not installed are left out."""
        versions = {'paddle': paddle.__version__, 'leanvit_threads': str(cpu_threads())}
        for name in ENGINE_PACKAGES:
            try:
                versions[name] = importlib.import_module(name).__version__
            except ImportError:
                continue
        return versions

    def prepare(self, case: Case) -> tuple[Call, dict]:
        """See `Side`; facts: parameters, and whether mixed precision is active."""
        if case.kind == INFERENCE and case.runner != LAYERS:
            return self._engine(case)
        mixed = case.precision == 'bf16'
        config = configuration(case.model, {**STEP, **(MIXED if mixed else {})})
        active = Precision(config, self._context.on_gpu).is_mixed
        if case.kind == INFERENCE:
            if mixed and not active:
                raise UserError('mixed precision of the layers is not active here')
            return BenchmarkCase(case.model, config).calls([case.batch], self._context)[0], {}
        call = BenchmarkCase(case.model, config).training_call(case.batch, self._context)
        return call, {'mixed_precision': active}

    def _engine(self, case: Case) -> tuple[Call, dict]:
        check_engine(case.runner, case.precision)
        config = configuration(case.model, {'ENGINE': case.runner})
        plain = BenchmarkCase(case.model, config, precision=case.precision)
        prefix = os.path.join(self._folder, case.model)
        kind = 'paddle' if case.runner == 'paddle' else 'onnx'
        if not os.path.exists(f'{prefix}.{kind}.done'):
            write_engine_file(case.runner, build_model(config), plain.image_shape(), prefix)
            open(f'{prefix}.{kind}.done', 'w').close()
        program = prefix if kind == 'paddle' else f'{prefix}.onnx'
        return replace(plain, program=program).calls([case.batch], self._context)[0], {}

    def exchange(self, model: str, path: str) -> float:
        """Load PyTorch's weights, and return the largest difference of a logit, relative to the largest one."""
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        images, expected = arrays.pop('images'), arrays.pop('logits')
        net = build_model(configuration(model, {}))
        net.set_state_dict(port_state_dict(net, arrays))
        net.eval()
        with paddle.no_grad():
            found = net(paddle.to_tensor(images)).numpy()
        return float(np.abs(found - expected).max() / np.abs(expected).max())


def configuration(model: str, options: dict):
    """Return the configuration of a model, for 1000 classes."""
    options = {'MODEL.NUM_CLASSES': 1000, **(EVIT_STEP if model.startswith('evit') else {}), **options}
    return get_config(config_file(model), [item for pair in options.items() for item in pair])
