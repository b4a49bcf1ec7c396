# SPDX-License-Identifier: Apache-2.0
"""What the comparison measures: models, precisions, batches, and what runs them. Standard library only."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass

LEANVIT, TORCH = 'leanvit', 'torch'
SIDES = (LEANVIT, TORCH)
INFERENCE, TRAINING = 'inference', 'training'
KINDS = (INFERENCE, TRAINING)
PRECISIONS = ('fp32', 'bf16')
DENSE, REDUCED = 'deit_small_patch16_224', 'evit_small_patch16_224_k05_fuse'
# Configurations of this suite, in groups that are measured in the same rounds: EViT is compared with DeiT, too.
GROUPS = (
    ('gmlp_s16_224',),
    (DENSE, REDUCED),
    ('vit_tiny_patch16_224_mae_finetune',),  # 12 heads
    ('ms_mlp_tiny_patch4_shift5_224',),
)
MODELS = tuple(name for group in GROUPS for name in group)
LAYERS, EAGER, COMPILED = 'dygraph', 'eager', 'compile'
ENGINES = {  # of this suite, by precision
    'fp32': (LAYERS, 'paddle', 'onnxruntime', 'openvino'),
    'bf16': (LAYERS, 'paddle', 'openvino'),
}


@dataclass(frozen=True)
class Case:
    """A measurement.

    Attributes:
        model: name in MODELS.
        kind: one of KINDS: a forward pass, or a training step.
        precision: 'fp32'; 'bf16': mixed precision, or that of an engine.
        batch: images.
        side: framework, one of SIDES.
        runner: engine of this suite, or EAGER or COMPILED of PyTorch.
    """

    model: str
    kind: str
    precision: str
    batch: int
    side: str
    runner: str

    def fields(self) -> dict:
        """Return the attributes by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f'{self.model}, {self.kind}, {self.precision}, batch {self.batch}, {self.side} {self.runner}'


def groups(models: Sequence[str]) -> Iterator[list[str]]:
    """Yield the chosen models by group; EViT brings its dense model."""
    for group in GROUPS:
        chosen = [name for name in group if name in models or (name == DENSE and REDUCED in models)]
        if chosen:
            yield chosen


def cases(models: Sequence[str], kind: str, precision: str, batch: int, compile_training: bool) -> list[Case]:
    """Return what is measured in the same rounds; frameworks alternate."""
    ours = ENGINES[precision] if kind == INFERENCE else (LAYERS,)
    theirs = (EAGER, COMPILED) if kind == INFERENCE or compile_training else (EAGER,)
    sides = [[(LEANVIT, runner) for runner in ours], [(TORCH, runner) for runner in theirs]]
    return [Case(model, kind, precision, batch, *which) for model in models for which in alternating(*sides)]


def alternating(first: Collection, second: Collection) -> list:
    """Return the items of two lists in turns, then the rest of the longer one."""
    longer, shorter = (list(first), list(second)) if len(first) >= len(second) else (list(second), list(first))
    mixed = [item for pair in zip(longer, shorter) for item in pair]
    return mixed + longer[len(shorter) :]
