# SPDX-License-Identifier: Apache-2.0
"""The side of PyTorch and timm: eager mode and `torch.compile`. It runs where Paddle is not installed, too."""

from __future__ import annotations

import contextlib
import importlib
import os

from benchmarks.cases import COMPILED, INFERENCE, Case
from benchmarks.processes import Call
from utils.errors import UserError

SIZE, CLASSES = 224, 1000
SMOOTHING, WEIGHT_DECAY, LEARNING_RATE = 0.1, 0.05, 1e-3
PERTURBATION = 0.02  # of weights that are compared: LayerScale starts near 0, gates near 1


class PyTorch:
    """See `benchmarks.processes.Side`.

    Args:
        threads: threads per operator.
    """

    def __init__(self, threads: int):
        os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '1'  # no processes that wait beside the measurement
        self._threads = threads

    def versions(self) -> dict[str, str]:
        """See `Side`."""
        try:
            torch, timm, _ = (importlib.import_module(name) for name in ('torch', 'timm', 'numpy'))
        except ImportError as error:
            raise UserError(str(error)) from None
        torch.set_num_threads(self._threads)
        return {'torch': torch.__version__, 'timm': timm.__version__, 'torch_threads': str(torch.get_num_threads())}

    def prepare(self, case: Case) -> tuple[Call, dict]:
        """See `Side`; facts: parameters."""
        import torch

        from benchmarks.torch_models import build

        torch.compiler.reset()
        torch.manual_seed(0)
        model = build(case.model)
        facts = {'parameters': sum(parameter.numel() for parameter in model.parameters())}
        autocast = (
            (lambda: torch.autocast('cpu', torch.bfloat16)) if case.precision == 'bf16' else contextlib.nullcontext
        )
        make = forward_call if case.kind == INFERENCE else training_call
        return make(model.train(case.kind != INFERENCE), case, autocast), facts

    def exchange(self, model: str, path: str) -> None:
        """Write random weights, images and their logits."""
        import numpy as np
        import torch

        from benchmarks.torch_models import build

        torch.manual_seed(0)
        net = build(model).eval()
        with torch.inference_mode():
            for parameter in net.parameters():
                parameter += PERTURBATION * torch.randn_like(parameter)
            images = torch.randn(1, 3, SIZE, SIZE)
            logits = net(images)
        weights = {name: value.numpy() for name, value in net.state_dict().items()}
        np.savez(path, **weights, images=images.numpy(), logits=logits.numpy())


def forward_call(model, case: Case, autocast) -> Call:
    """Return a forward pass, from images in host memory to logits in host memory."""
    import torch

    images = torch.randn(case.batch, 3, SIZE, SIZE)
    run = torch.compile(model, dynamic=False) if case.runner == COMPILED else model

    def call():
        with torch.inference_mode(), autocast():
            return run(images).float().numpy()

    return call


def training_call(model, case: Case, autocast) -> Call:
    """Return a training step: normalization of uint8 images, passes, fused AdamW."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (case.batch, SIZE, SIZE, 3), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, CLASSES, case.batch))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    run = torch.compile(model, dynamic=False) if case.runner == COMPILED else model

    def call() -> None:
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        images.mul_(1 / 127.5).sub_(1.0)
        with autocast():
            logits = run(images)
        criterion(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return call
