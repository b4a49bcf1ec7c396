# SPDX-License-Identifier: Apache-2.0
"""Attention entropy, attention distance and CKA of Vision Transformers (MAE-Lite, https://arxiv.org/abs/2205.14443).

Statistics are accumulated over batches; no features are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from models.vision_transformer import VisionTransformer
from utils.errors import UserError

PATCH_DISTANCE = 14.0  # between neighboring patches of any size: the constant of the published figures
LOG_EPS = 1e-6
CHUNK = 16  # images per step, which limits the memory of float64 copies
MIN_BATCH = 4  # images that the unbiased estimate of HSIC needs
MIN_HSIC_RATIO = 1e-13  # relative to the squared products of a layer: a smaller HSIC is a rounding error


# ---------------------------------------------------------------------------------------------------- attention
class AttentionStatistics:
    """Mean entropy and mean distance of the attention of each head.

    Class and distillation token are excluded before the softmax, so that A = softmax(S) sums to 1 over the patch
    tokens. This differs slightly from the attention of the forward pass. For image b, head h and token p

        entropy(b, h, p) = -sum_q A[p, q] ln(A[p, q] + 1e-6)
        distance(b, h, p) = sum_q A[p, q] D[p, q],

    where D[p, q] is the Euclidean distance between the positions of p and q. Both are averaged over p and b, then over
    the batches. Softmax and logarithm are computed in float32, distances and means in float64.

    Args:
        depth: number of layers.
        patch_distance: distance of neighboring patches, in the unit of the results.
        per_image: equal weight for every image; False: for every batch, also smaller ones (the published figures).
    """

    def __init__(self, depth: int, patch_distance: float = PATCH_DISTANCE, per_image: bool = False):
        self.patch_distance = patch_distance
        self.per_image = per_image
        self.tokens: list[int | None] = [None] * depth
        self._sums: list[Tensor | None] = [None] * depth
        self._weights = [0] * depth

    def add(self, layer: int, scores: Tensor, num_prefix: int = 1, positions: Tensor | None = None) -> None:
        """Add the attention of a layer for a batch.

        Args:
            layer: number of the layer, from 0.
            scores: attention logits, [B, H, P + N, P + N].
            num_prefix: P, number of tokens before the patch tokens.
            positions: positions of the patch tokens, [N, 2] or [B, N, 2], in units of patches; None: a square grid in
                row-major order.

        Raises:
            UserError: N is not a square number.
        """
        scores = scores[:, :, num_prefix:, num_prefix:]
        batch, heads, tokens, _ = scores.shape
        if positions is None:
            positions = square_grid(tokens)
        sums = paddle.zeros([2, heads], 'float64')
        for begin in range(0, batch, CHUNK):
            part = slice(begin, begin + CHUNK)
            distances = self.patch_distance * _pairwise(
                positions if positions.ndim == 2 else positions[part].unsqueeze(1)
            )
            sums = sums + _entropy_and_distance(scores[part], distances)
        weight = batch if self.per_image else 1
        sums = sums * (weight / batch)
        self._sums[layer] = sums if self._sums[layer] is None else self._sums[layer] + sums
        self._weights[layer] += weight
        self.tokens[layer] = tokens

    def result(self) -> dict[str, list[list[float] | None]]:
        """Return 'entropy' and 'distance': for each layer one value per head; None for layers without attention.

        Raises:
            UserError: the attention of a layer is not finite.
        """
        result = {'entropy': [], 'distance': []}
        for layer, (sums, weight) in enumerate(zip(self._sums, self._weights)):
            means = [None, None] if sums is None else (sums / weight).tolist()
            if sums is not None and not np.isfinite(means).all():
                raise UserError(f'the attention of block {layer} is not finite: the weights are damaged, use others.')
            for values, mean in zip(result.values(), means):
                values.append(mean)
        return result


def square_grid(patches: int) -> Tensor:
    """Return the positions (row, column) of the patches of a square image in row-major order, [patches, 2] float64."""
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UserError(f'{patches} patches form no square; give their positions.')
    return grid_positions((side, side))


def grid_positions(grid: tuple[int, int]) -> Tensor:
    """Return the positions (row, column) of a grid (rows, columns) of patches in row-major order, [patches, 2] float64."""
    rows, columns = np.divmod(np.arange(grid[0] * grid[1], dtype='float64'), grid[1])
    return paddle.to_tensor(np.stack([rows, columns], axis=-1))


def mean_grid_distance(grid: tuple[int, int], patch_distance: float = PATCH_DISTANCE) -> float:
    """Return the mean distance of uniform attention on a grid (rows, columns) of patches."""
    return patch_distance * _pairwise(grid_positions(grid)).mean().item()


def _pairwise(positions: Tensor) -> Tensor:
    """Compute pairwise Euclidean distances: [..., N, 2] -> [..., N, N]."""
    return (positions.unsqueeze(-2) - positions.unsqueeze(-3)).square().sum(-1).sqrt()


def _entropy_and_distance(scores: Tensor, distances: Tensor) -> Tensor:
    """Average over tokens, sum over images: scores [b, H, N, N], distances [..., N, N] -> [2, H] float64."""
    scores = scores.astype('float32')
    weights = F.softmax(scores, axis=-1)
    entropy = -(weights * (weights + LOG_EPS).log()).sum(-1)
    distance = (weights.astype('float64') * distances).sum(-1)
    nan_if_not_finite = 0.0 * scores.sum().astype(
        'float64'
    )  # NaN if a score is not finite; the softmax on CPUs hides it
    return (
        paddle.stack([values.astype('float64').mean(-1).sum(0) for values in (entropy, distance)]) + nan_if_not_finite
    )


@paddle.no_grad()
def measure_attention(
    model: VisionTransformer, batches: Iterable[Tensor], patch_distance: float = PATCH_DISTANCE
) -> dict[str, object]:
    """Compute entropy and distance of all attention heads, averaged over images.

    After token reduction (EViT, ToMe), the statistics are over the remaining tokens. The position of a token with
    several patches is the mean of their positions.

    Args:
        model: a Vision Transformer.
        batches: normalized images [b, C, H, W].
        patch_distance: see `AttentionStatistics`.

    Returns:
        `images`: number of images; `tokens`: number of patch tokens in each block; `entropy` and `distance`: for each
        block one value per head. None for blocks without attention.
    """
    model.eval()
    statistics, images = AttentionStatistics(model.depth, patch_distance, per_image=True), 0
    for batch in batches:
        for layer, scores, positions in _attention(model, batch):
            statistics.add(layer, scores, model.num_prefix, positions)
        images += len(batch)
    return {'images': images, 'tokens': statistics.tokens, **statistics.result()}


def _attention(model: VisionTransformer, images: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the arguments of `AttentionStatistics.add` for each block with attention."""
    source, prefix, grid = None, model.num_prefix, grid_positions(model.grid_of(images))
    for layer, results in enumerate(model.iter_intermediates(images, want=('attn_logits', 'source'))):
        if results.attn_logits is not None:
            positions = grid
            if source is not None:
                source = source[:, prefix:, prefix:].astype('float64')
                positions = paddle.matmul(source, grid) / source.sum(-1, keepdim=True)
            yield layer, results.attn_logits, positions
        source = results.source


# ---------------------------------------------------------------------------------------------------- similarity
class CKA:
    """Linear CKA of the layers of two models, an unbiased minibatch estimate.

    X [b, ...] are the flattened activations of a layer on b images. K = X X^T without its diagonal; L is the same for
    the other layer (https://arxiv.org/abs/2010.15327, equations 2 and 3):

        HSIC(K, L) = [tr(K L) + (1'K 1)(1'L 1) / ((b - 1)(b - 2)) - 2 / (b - 2) 1'K L 1] / (b (b - 3))
        CKA = mean HSIC(K, L) / sqrt(mean HSIC(K, K) mean HSIC(L, L)),

    with means over batches, in float64. The estimate can be slightly negative.
    """

    def __init__(self):
        self.images = 0
        self._batches = 0
        self._first: int | None = None
        self._hsic: Tensor | None = None
        self._scale: Tensor | None = None

    def add(self, first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
        """Add a batch: the activations [b, ...] of each layer of both models for the same images.

        Generators need less memory than lists.

        Raises:
            UserError: fewer than four images.
        """
        first = [_gram(features) for features in first]
        grams = paddle.stack([*first, *(_gram(features) for features in second)])
        hsic, scale = _hsic(grams)
        self._hsic = hsic if self._hsic is None else self._hsic + hsic
        self._scale = scale if self._scale is None else self._scale + scale
        self._first = len(first)
        self._batches += 1
        self.images += grams.shape[1]

    def hsic(self) -> np.ndarray:
        """Return the mean HSIC of all pairs of layers, those of the first model first, [M + N, M + N].

        Raises:
            UserError: no batch was added.
        """
        if self._hsic is None:
            raise UserError(f'CKA needs a batch of at least {MIN_BATCH} images, but there is none.')
        return self._hsic.numpy() / self._batches

    def result(self) -> np.ndarray:
        """Return CKA, [M, N]; NaN for a layer with the same activations for all images.

        Raises:
            UserError: no batch was added, or a layer is not finite.
        """
        hsic = self.hsic()
        own = hsic.diagonal()
        for model, layers in (('first', own[: self._first]), ('second', own[self._first :])):
            for layer in np.flatnonzero(~np.isfinite(layers)):
                raise UserError(
                    f'layer {layer} of the {model} model is not finite: the weights are damaged, use others.'
                )
        own = np.where(own > MIN_HSIC_RATIO * self._scale.numpy() / self._batches, own, np.nan)
        return hsic[: self._first, self._first :] / np.sqrt(np.outer(own[: self._first], own[self._first :]))


def _gram(features: Tensor) -> Tensor:
    """Compute the Gram matrix of features [b, ...] with zero diagonal, [b, b] float64."""
    if len(features) < MIN_BATCH:
        raise UserError(f'CKA needs batches of at least {MIN_BATCH} images, not {len(features)}.')
    rows = features.flatten(1).astype('float64')
    return paddle.matmul(rows, rows, transpose_y=True) * (1.0 - paddle.eye(len(rows), dtype='float64'))


def _hsic(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Compute HSIC of all pairs of layers, [n, n], and its first term for each layer itself, [n]; grams [n, b, b]."""
    b = grams.shape[-1]
    flat, rows = grams.flatten(1), grams.sum(-1)
    totals = rows.sum(-1)
    traces = paddle.matmul(flat, flat, transpose_y=True)  # the matrices are symmetric
    products = paddle.outer(totals, totals) / ((b - 1) * (b - 2))
    mixed = paddle.matmul(rows, rows, transpose_y=True) * (2 / (b - 2))
    return (traces + products - mixed) / (b * (b - 3)), flat.square().sum(-1) / (b * (b - 3))


@paddle.no_grad()
def compare_layers(
    first: VisionTransformer, second: VisionTransformer, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[np.ndarray, int]:
    """Compute CKA of the layers of two models; see `representations`.

    Args:
        first, second: Vision Transformers.
        batches: pairs of the same images, normalized for each model, [b, C, S, S]. Batches of fewer than four are
            skipped.

    Returns:
        `CKA.result`, [depth + 1, depth + 1], and the number of images.
    """
    first.eval()
    second.eval()
    cka = CKA()
    for ours, theirs in batches:
        if len(ours) >= MIN_BATCH:
            cka.add(representations(first, ours), representations(second, theirs))
    return cka.result(), cka.images


def representations(model: VisionTransformer, images: Tensor) -> Iterator[Tensor]:
    """Yield the normalized input of each block and the normalized output, by patch: depth + 1 times [b, patches, C].

    The norm is `norm1`, `norm2` for blocks without attention, and for the output the last norm of the model (`fc_norm`
    of a pooling model, here without pooling). After token reduction (EViT, ToMe), a patch has the features of its
    token; dropped patches are 0.
    """
    source, prefix = None, model.num_prefix
    for results in model.iter_intermediates(images, want=('inputs', 'source', 'tokens')):
        yield _by_patch(results.inputs, source, prefix)
        source, last = results.source, results.tokens
    norm = model.fc_norm if model.global_pool else model.norm
    yield _by_patch(norm(last), source, prefix)


def _by_patch(tokens: Tensor, source: Tensor | None, num_prefix: int) -> Tensor:
    """[b, num_prefix + N, C] -> [b, patches, C]; `source` as in `BlockIntermediates`."""
    tokens = tokens[:, num_prefix:]
    if source is None:
        return tokens
    return paddle.matmul(source[:, num_prefix:, num_prefix:], tokens, transpose_x=True)
