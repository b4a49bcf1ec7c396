# SPDX-License-Identifier: Apache-2.0
"""Selection of attention layers to remove: NOSE, "MLP Can Be A Good Transformer Learner", arXiv 2404.05657.

A greedy search selects the layer with the smallest transfer entropy, whose removal increases the entropy of the output
most, or decreases it least. It needs neither labels nor training. Channels are modeled as Gaussian; the constants
0.5 ln(2 pi e) per channel cancel in differences and are omitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from models.vision_transformer import VisionTransformer
from tasks import Group
from utils.errors import UserError

HEAD, FEATURE = TARGETS = ('head', 'feature')


class ChannelStatistics:
    """Count, mean and squared deviations of each channel, merged over batches and processes (Chan et al., 1983).

    Computed in float64. The result equals that of all samples at once.
    """

    def __init__(self):
        self.count = 0
        self.mean: Tensor | None = None
        self.deviations: Tensor | None = None

    def add(self, samples: Tensor) -> None:
        """Add samples [n, C]."""
        samples = samples.astype('float64')
        mean = samples.mean(0)
        deviations = (samples - mean).square().sum(0)
        count = samples.shape[0]
        if self.mean is None:
            self.mean, self.deviations = paddle.zeros_like(mean), paddle.zeros_like(mean)
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.deviations = self.deviations + deviations + difference.square() * (self.count * count / total)
        self.count = total

    def std(self, context: Group, ddof: int = 0) -> np.ndarray:
        """Return the standard deviation of each channel over all processes, [C]; every process must have samples.

        Raises:
            UserError: too few samples.
        """
        count = context.sum(paddle.to_tensor([self.count], 'float64')).item()
        if count <= ddof:
            raise UserError(f'{int(count)} images are too few for a standard deviation.')
        mean = context.sum(self.mean * (self.count / count))
        deviations = self.deviations + (self.mean - mean).square() * self.count
        return (context.sum(deviations) / (count - ddof)).sqrt().numpy()


def entropy(statistics: ChannelStatistics, target: str, context: Group) -> float:
    """Return the entropy of an output without its constants. The standard deviation of a constant channel is `tiny`.

    head: sum_k log2(std of logit k), with n - 1. feature: sum_c ln(std of channel c), with n.
    """
    std = np.maximum(statistics.std(context, ddof=1 if target == HEAD else 0), np.finfo('float64').tiny)
    return float((np.log2(std) if target == HEAD else np.log(std)).sum())


@dataclass(frozen=True)
class Step:
    """One step of `select_layers`.

    Attributes:
        base: entropy without the layers chosen before.
        entropies: entropy after the removal of each remaining layer.
        chosen: the selected layer.
    """

    base: float
    entropies: dict[int, float]
    chosen: int

    @property
    def transfer(self) -> dict[int, float]:
        """Return the transfer entropy of each remaining layer: `base` minus the entropy without it."""
        return {layer: self.base - value for layer, value in self.entropies.items()}


def select_layers(
    model: VisionTransformer,
    batches: Callable[[int], Iterable[Tensor]],
    number: int,
    context: Group,
    target: str = HEAD,
) -> Iterator[Step]:
    """Select attention layers to remove by a greedy search, and yield each step.

    During the search a removed layer is the identity, y = x, not 2x as in the model that is trained later. At the end
    the model is restored.

    Args:
        model: a trained model, equal on every process.
        batches: step, from 0 -> normalized images [b, C, H, W] of this process; the same images in every step.
        number: number of layers to select.
        context: process group.
        target: 'head': entropy of the logits; 'feature': entropy of the input of the classifier.

    Raises:
        UserError: more layers than the model has.
    """
    left = model.attention_layers()
    if not 1 <= number < len(left):
        raise UserError(f'cannot select {number} attention layers: the model has {len(left)}, and one must remain.')
    base = None
    try:
        for step in range(number):
            sums = {layer: ChannelStatistics() for layer in [None, *left]}
            for images in batches(step):
                for layer, output in _outputs(model, images, left, target, base is None):
                    sums[layer].add(output)
            if base is None:
                base = entropy(sums[None], target, context)
            entropies = {layer: entropy(sums[layer], target, context) for layer in left}
            chosen = max(left, key=entropies.__getitem__)  # the first one of equal entropies
            yield Step(base, entropies, chosen)
            model.blocks[chosen].set_attn_weight(0.0, identity=1.0)
            left.remove(chosen)
            base = entropies[chosen]
    finally:
        for layer in model.attention_layers():
            model.blocks[layer].set_attn_weight(1.0)


@paddle.no_grad()
def _outputs(model: VisionTransformer, images: Tensor, layers: list[int], target: str, whole: bool):
    """Yield (layer, output [b, channels] without its attention), and with `whole` (None, output of the full model).

    The blocks before a removed layer are computed only once.
    """
    model.eval()
    for layer, results in enumerate(model.iter_intermediates(images, want=('block_input',))):
        if layer in layers:
            model.blocks[layer].set_attn_weight(0.0, identity=1.0)
            try:
                yield layer, _output(model, model.run_blocks(*results.block_input, first=layer)[0], target)
            finally:
                model.blocks[layer].set_attn_weight(1.0)
    if whole:
        yield None, _output(model, model.forward_features(images), target)


def _output(model: VisionTransformer, tokens: Tensor, target: str) -> Tensor:
    output = model.forward_head(tokens, pre_logits=target == FEATURE)
    return output[0] if isinstance(output, tuple) else output  # a distilled model: the class token


@paddle.no_grad()
def branch_entropies(
    model: VisionTransformer, batches: Iterable[Tensor], context: Group
) -> dict[str, dict[int, float]]:
    """Compute the entropy of the output of each residual branch; samples are all tokens of all images.

    Returns:
        'attn' and 'mlp': block -> sum_c ln(std of channel c).
    """
    model.eval()
    sums = {
        'attn': {layer: ChannelStatistics() for layer in model.attention_layers()},
        'mlp': {layer: ChannelStatistics() for layer in range(model.depth)},
    }
    for images in batches:
        for layer, results in enumerate(model.iter_intermediates(images, want=('attn_out', 'mlp_out'))):
            for name, output in (('attn', results.attn_out), ('mlp', results.mlp_out)):
                if layer in sums[name]:
                    sums[name][layer].add(output.flatten(0, 1))
    return {
        name: {layer: entropy(statistics, FEATURE, context) for layer, statistics in layers.items()}
        for name, layers in sums.items()
    }
