# SPDX-License-Identifier: Apache-2.0
"""kNN probe: classify validation images by their nearest training images in feature space.

The protocol is that of "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
(https://arxiv.org/abs/1805.01978, section 3.4), as DINO uses it (https://arxiv.org/abs/2104.14294).
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

import datasets
from datasets.batch import Batch, on_device
from datasets.subset import evenly_spaced
from models.features import extract_features
from tasks.base import Group, Interrupted, MeanEvaluator
from utils.device import upload
from utils.errors import UserError
from utils.runlog import progress

NEIGHBORS = 20
TEMPERATURE = 0.07  # the weight of a neighbor is exp(cosine similarity / TEMPERATURE)
MAX_IMAGES = 100_000  # training images in the feature bank, evenly spaced over the data set
TITLES = {'knn_acc1': 'kNN Acc@1', 'knn_acc5': 'kNN Acc@5'}


class KNNEvaluator(MeanEvaluator):
    """kNN accuracy. Each `reset` encodes the training images with the transform of the evaluation.

    Each process encodes its shard of the images; an all-reduce then gives all features to all processes. Classes without
    a neighbor are never predicted, not even in the top five.

    Args:
        config: resolved configuration; only DATA is read.
        transform: transform of the evaluation.
    """

    def __init__(self, config, transform):
        super().__init__(TITLES, ('knn_acc1', 'max'))
        self.transform = transform
        self.config = config.clone()
        self.config.defrost()
        self.config.DATA.CACHE = 'no'  # keep the memory for the cache of training
        self.config.MODEL.NUM_CLASSES = None  # from the training images; the validation images may have fewer
        self._dataset: datasets.Dataset | None = None

    def reset(self, model: nn.Layer, group: Group, should_stop: Callable[[], bool]) -> None:
        """See `Evaluator`."""
        super().reset(model, group, should_stop)
        if self._dataset is None:
            self._dataset = evenly_spaced(datasets.build_dataset(self.config, 'train'), MAX_IMAGES)
        self._bank, self._classes = self._encode_training_images(model, group, should_stop)

    def sums(self, batch: Batch, features: Tensor) -> Tensor:
        """Return [top-1 hits, top-5 hits] of features [B, C]."""
        votes = vote(features, self._bank, self._classes, self._dataset.num_classes)
        most, predicted = paddle.topk(votes, min(5, votes.shape[-1]), axis=-1)
        hits = paddle.logical_and(predicted == batch.targets['label'].unsqueeze(-1), most > 0)
        return paddle.stack([hits[:, 0].sum(), hits.sum()]).astype('float64')

    def _encode_training_images(self, model, group: Group, should_stop) -> tuple[Tensor, Tensor]:
        """Return features [N, C] and classes [N] of the training images, equal on every process."""
        data, size = self.config.DATA, len(self._dataset)
        indices, features, stopped = [], [], False
        loader = datasets.build_dataloader(
            self.config, self._dataset, False, group.rank, group.world_size, self.transform
        )
        with loader:
            batches = on_device(loader.epoch(0, borrow=True), data.IMAGENET_MEAN, data.IMAGENET_STD)
            for batch in progress(batches, loader.num_batches, 'training features', group.is_main):
                stopped = should_stop()
                if stopped:
                    break
                if len(batch):
                    features.append(extract_features(model, batch.images))
                    indices.append(upload(batch.indices))
        # The stop flag is all-reduced, so that all processes stop together.
        if group.sum(paddle.to_tensor([float(stopped)])).item():
            raise Interrupted
        bank, encoded = paddle.zeros([size, model.embed_dim]), paddle.zeros([size])
        if indices:
            own = paddle.concat(indices)
            bank = paddle.scatter(bank, own, paddle.concat(features))
            encoded = paddle.scatter(encoded, own, paddle.ones([len(own)]))
        readable = paddle.nonzero(group.sum(encoded)).flatten()
        if len(readable) == 0:
            raise UserError(f'none of the training images of {self._dataset.source} could be read.')
        classes = paddle.to_tensor(self._dataset.labels)
        return group.sum(bank)[readable], classes[readable]


def vote(features: Tensor, bank: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Sum the weights of the nearest neighbors for each class.

    Args:
        features: features of the images to classify, [B, C], of length 1.
        bank: feature bank of the training images, [N, C], of length 1.
        classes: classes of the training images, [N] int64.
        num_classes: K.

    Returns:
        [B, K].
    """
    similarity = paddle.matmul(features, bank, transpose_y=True)
    similarity, nearest = paddle.topk(similarity, min(NEIGHBORS, len(bank)), axis=-1)
    one_hot = F.one_hot(paddle.gather(classes, nearest.flatten()), num_classes)
    weights = paddle.exp(similarity / TEMPERATURE).unsqueeze(-1)
    return (one_hot.reshape([*nearest.shape, -1]) * weights).sum(1)
