# SPDX-License-Identifier: Apache-2.0
"""What the layers of Vision Transformers do: how far and how evenly heads look, and how alike two models see.

The analyses of MAE-Lite, https://arxiv.org/abs/2205.14443. Batch after batch goes into sums; no features are kept.
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

PATCH_DISTANCE = 14.0  # between neighbouring patches, whatever their size: the constant of the published figures
LOG_EPS = 1e-6
CHUNK = 16  # images whose attention is looked at together, so that its float64 copies stay small
MIN_BATCH = 4  # images that the unbiased estimate of HSIC needs
MIN_HSIC_RATIO = 1e-13  # of a layer's squared products, what its HSIC must exceed to be more than rounding


# ---------------------------------------------------------------------------------------------------- attention
class AttentionStatistics:
    """Mean entropy and mean distance of the attention of each head.

    Class and distillation token are left out before the softmax, so that A = softmax(S) adds up to 1 over the patch
    tokens; it is not quite the attention that the network uses. For image b, head h and token p

        entropy(b, h, p) = -sum_q A[p, q] ln(A[p, q] + 1e-6)
        distance(b, h, p) = sum_q A[p, q] D[p, q],

    where D[p, q] is the Euclidean distance between the positions of p and q. Both are averaged over p and b, then over
    the batches. Softmax and logarithm are float32, distances and means float64.

    Args:
        depth: number of layers.
        patch_distance: between neighbouring patches, in the unit of the distances.
        per_image: let every image count the same; False: every batch, however small (the published figures).
    """

    def __init__(self, depth: int, patch_distance: float = PATCH_DISTANCE, per_image: bool = False):
        self.patch_distance = patch_distance
        self.per_image = per_image
        self.tokens: list[int | None] = [None] * depth
        self._sums: list[Tensor | None] = [None] * depth
        self._weights = [0] * depth

    def add(self, layer: int, scores: Tensor, num_prefix: int = 1, positions: Tensor | None = None) -> None:
        """Takes in the attention of a layer for a batch.

        Args:
            layer: its number, from 0.
            scores: scaled scores before the softmax, [B, H, P + N, P + N].
            num_prefix: P, tokens before the patch tokens.
            positions: of the patch tokens, [N, 2] or [B, N, 2], neighbouring patches being 1 apart; None: token i is patch
                i of a square grid, row by row.

        Raises:
            UserError: N tokens form no square.
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
        """'entropy' and 'distance': for each layer a number per head; None where no attention was added.

        Raises:
            UserError: the attention of a layer is not finite.
        """
        result = {'entropy': [], 'distance': []}
        for layer, (sums, weight) in enumerate(zip(self._sums, self._weights)):
            means = [None, None] if sums is None else (sums / weight).tolist()
            if sums is not None and not np.isfinite(means).all():
                raise UserError(f'the attention of block {layer} is not finite: the weights are damaged.')
            for values, mean in zip(result.values(), means):
                values.append(mean)
        return result


def square_grid(patches: int) -> Tensor:
    """Places (row, column) of the patches of a square image, row by row, [patches, 2] float64."""
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UserError(f'{patches} patches form no square; attention distances are defined on square images.')
    rows, columns = np.divmod(np.arange(patches, dtype='float64'), side)
    return paddle.to_tensor(np.stack([rows, columns], axis=-1))


def mean_grid_distance(patches: int, patch_distance: float = PATCH_DISTANCE) -> float:
    """Mean distance of attention that is the same everywhere."""
    return patch_distance * _pairwise(square_grid(patches)).mean().item()


def _pairwise(positions: Tensor) -> Tensor:
    """Euclidean distances of points [..., N, 2] -> [..., N, N]."""
    return (positions.unsqueeze(-2) - positions.unsqueeze(-3)).square().sum(-1).sqrt()


def _entropy_and_distance(scores: Tensor, distances: Tensor) -> Tensor:
    """Means over the tokens, summed over the images: scores [b, H, N, N], distances [..., N, N] -> [2, H] float64."""
    scores = scores.astype('float32')
    weights = F.softmax(scores, axis=-1)
    entropy = -(weights * (weights + LOG_EPS).log()).sum(-1)
    distance = (weights.astype('float64') * distances).sum(-1)
    damage = 0.0 * scores.sum().astype('float64')  # NaN where a score is not finite, which the CPU's softmax conceals
    return paddle.stack([values.astype('float64').mean(-1).sum(0) for values in (entropy, distance)]) + damage


@paddle.no_grad()
def measure_attention(
    model: VisionTransformer, batches: Iterable[Tensor], patch_distance: float = PATCH_DISTANCE
) -> dict[str, object]:
    """Entropy and distance of all heads of a model over images, each of which counts the same.

    Where tokens have become fewer (EViT, ToMe), the attention is that among those which are left, and a token of
    several patches stands at the mean of their positions.

    Args:
        batches: normalised images [b, C, S, S].

    Returns:
        `images`: their number; `tokens`: patch tokens that each block attends to; `entropy` and `distance`: for each
        block a number per head. None for blocks without attention.
    """
    model.eval()
    statistics, images = AttentionStatistics(model.depth, patch_distance, per_image=True), 0
    for batch in batches:
        for layer, scores, positions in _attention(model, batch):
            statistics.add(layer, scores, model.num_prefix, positions)
        images += len(batch)
    return {'images': images, 'tokens': statistics.tokens, **statistics.result()}


def _attention(model: VisionTransformer, images: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield the number of each block with attention, and the arguments of `AttentionStatistics.add`; one at a time."""
    source, prefix = None, model.num_prefix
    for layer, results in enumerate(model.iter_intermediates(images, want=('attn_logits', 'source'))):
        if results.attn_logits is not None:
            positions = None
            if source is not None:
                source = source[:, prefix:, prefix:].astype('float64')
                positions = paddle.matmul(source, square_grid(source.shape[2])) / source.sum(-1, keepdim=True)
            yield layer, results.attn_logits, positions
        source = results.source


# ---------------------------------------------------------------------------------------------------- similarity
class CKA:
    """How alike layers of two models represent the same images: linear CKA, estimated without bias from batches.

    With X [b, ...] the flattened activations of a layer on b images, K = X X^T without its diagonal, and L that of the
    other layer (https://arxiv.org/abs/2010.15327, equations 2 and 3):

        HSIC(K, L) = [tr(K L) + (1'K 1)(1'L 1) / ((b - 1)(b - 2)) - 2 / (b - 2) 1'K L 1] / (b (b - 3))
        CKA = mean HSIC(K, L) / sqrt(mean HSIC(K, K) mean HSIC(L, L)),

    the means being over batches. All of it is float64. It can be slightly negative.
    """

    def __init__(self):
        self.images = 0
        self._batches = 0
        self._first: int | None = None
        self._hsic: Tensor | None = None
        self._scale: Tensor | None = None

    def add(self, first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
        """Takes in a batch: of each layer of both models [b, ...], all with the same images. Generators save memory.

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
        """Mean HSIC of each layer with each, those of the first model before those of the second, [M + N, M + N].

        Raises:
            UserError: nothing was added.
        """
        if self._hsic is None:
            raise UserError(f'CKA needs a batch of at least {MIN_BATCH} images, but there is none.')
        return self._hsic.numpy() / self._batches

    def result(self) -> np.ndarray:
        """[M, N]; NaN where the representation of a layer is the same for all images.

        Raises:
            UserError: nothing was added, or a layer is not finite.
        """
        hsic = self.hsic()
        own = hsic.diagonal()
        for model, layers in (('first', own[: self._first]), ('second', own[self._first :])):
            for layer in np.flatnonzero(~np.isfinite(layers)):
                raise UserError(f'layer {layer} of the {model} model is not finite: the weights are damaged.')
        own = np.where(own > MIN_HSIC_RATIO * self._scale.numpy() / self._batches, own, np.nan)
        return hsic[: self._first, self._first :] / np.sqrt(np.outer(own[: self._first], own[self._first :]))


def _gram(features: Tensor) -> Tensor:
    """Inner products of the images' features [b, ...], 0 on the diagonal, [b, b] float64."""
    if len(features) < MIN_BATCH:
        raise UserError(f'CKA needs batches of at least {MIN_BATCH} images, not {len(features)}.')
    rows = features.flatten(1).astype('float64')
    return paddle.matmul(rows, rows, transpose_y=True) * (1.0 - paddle.eye(len(rows), dtype='float64'))


def _hsic(grams: Tensor) -> tuple[Tensor, Tensor]:
    """HSIC of each of n layers with each, [n, n], and the size of its first term with itself, [n], of [n, b, b]."""
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
    """CKA of the layers of two models; see `representations`.

    Args:
        batches: the same images for both, normalised for each, [b, C, S, S]. Batches of fewer than four are left out.

    Returns:
        [depth + 1, depth + 1] as `CKA.result` gives it, and the number of images it is of.
    """
    first.eval()
    second.eval()
    cka = CKA()
    for ours, theirs in batches:
        if len(ours) >= MIN_BATCH:
            cka.add(representations(first, ours), representations(second, theirs))
    return cka.result(), cka.images


def representations(model: VisionTransformer, images: Tensor) -> Iterator[Tensor]:
    """Yield the normalized input of each block, and the output of the last one, by patch: depth + 1 times [b, patches, C].

    That is the output of `norm1`, for blocks without attention that of `norm2`, and at the end that of the model's last
    norm, which a pooling model applies to the tokens here. Where tokens were reduced (EViT, ToMe), each patch is
    represented by the token it is in, and dropped patches are 0.
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
